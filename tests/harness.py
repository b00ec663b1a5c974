"""Many multi-process cases from one start of the ranks: gloo over a file store, no ports.

A case is a module-level function `case(**arguments) -> plain data`, run on every rank; `Pool.run` gives rank 0's
result, or raises with the failing rank's traceback. A case that hangs is killed with its pool and fails.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path

import torch.multiprocessing as mp

TIMEOUT = 600.0
GRACE = 10.0


def _rank_main(rank: int, world: int, store: str, pipe) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    from megatron_ligo.parallel import accelerator, mesh

    accelerator.prepare()
    mesh.start()
    while True:
        job = pipe.recv()
        if job is None:
            return
        case, arguments = job
        try:
            answer = (True, case(**arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        _leave_groups()
        pipe.send(answer)


def _leave_groups() -> None:
    """A case's groups hold sockets, and threads that wake up a hundred times a second."""
    import deepspeed.comm
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    default = dist.distributed_c10d._get_default_group()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not default:
            # DeepSpeed keeps some of them for later engines.
            deepspeed.comm.destroy_process_group(group)
    gc.collect()


class Pool:
    """`world` ranks that run one case after another."""

    def __init__(self, world: int):
        self.world = world
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank_main, args=(rank, world, store, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, case: Callable, timeout: float = TIMEOUT, **arguments):
        for pipe in self.pipes:
            pipe.send((case, arguments))
        results: dict[int, tuple] = {}
        deadline = time.monotonic() + timeout
        while len(results) < self.world:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready = connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self.pipes.index(pipe)
                results[rank] = pipe.recv()
                if not results[rank][0]:
                    # The others may wait for the one that failed, for ever.
                    deadline = min(deadline, time.monotonic() + GRACE)
        silent = [rank for rank in range(self.world) if rank not in results]
        if silent:
            self.close()
        for rank, (good, value) in results.items():
            if not good:
                raise RuntimeError(f"rank {rank} of {self.world}:\n{value}")
        if silent:
            raise TimeoutError(f"ranks {silent} of {self.world} gave no answer within {timeout} s")
        return results[0][1]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()
