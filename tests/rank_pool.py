"""Real ranks for many cases: forked from one process that has imported everything, gloo over a file store, no ports.

A case is a module-level function `case(**arguments) -> plain data` that runs on every rank. `Ranks.run` returns the
result of rank 0, or raises with the failing rank's traceback. Each case gets new ranks, so nothing that engines, groups
and their threads leave behind reaches the next one. A case that hangs is killed and fails.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

TIMEOUT = 240.0
GRACE = 10.0


def _rank_main(rank: int, world: int, store: str, pipe, case: Callable, arguments: dict) -> None:
    # Processes that a library starts here (Megatron-core's save starts a torch server) end with the rank.
    os.setpgid(0, 0)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    import torch
    import torch.distributed as dist

    from megatron_ligo.distributed import mesh

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        mesh.init_distributed()
        answer = (True, case(**arguments))
    except Exception:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    # The parent ends all ranks together: a rank that exits early closes the connections of those still working.
    pipe.recv()


class Ranks:
    """Runs cases on `world` ranks, new ones for each case."""

    def __init__(self, context: ForkServerContext, world: int):
        self.context = context
        self.world = world

    def run(self, case: Callable, timeout: float = TIMEOUT, **arguments):
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            pipes, processes = [], []
            for rank in range(self.world):
                ours, theirs = self.context.Pipe()
                job = (rank, self.world, store, theirs, case, arguments)
                process = self.context.Process(target=_rank_main, args=job, daemon=True)
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
            try:
                return self._answer(pipes, timeout)
            finally:
                for process in processes:
                    process.kill()
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                for process in processes:
                    process.join()

    def _answer(self, pipes: list[connection.Connection], timeout: float):
        results: dict[int, tuple] = {}
        deadline = time.monotonic() + timeout
        while len(results) < self.world:
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ready = connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = pipes.index(pipe)
                try:
                    results[rank] = pipe.recv()
                except EOFError:
                    results[rank] = (False, "ended without a result")
                if not results[rank][0]:
                    # The others may wait forever for the rank that failed.
                    deadline = min(deadline, time.monotonic() + GRACE)
        for rank, (succeeded, value) in results.items():
            if not succeeded:
                raise RuntimeError(f"rank {rank} of {self.world}:\n{value}")
        silent = [rank for rank in range(self.world) if rank not in results]
        if silent:
            raise TimeoutError(f"ranks {silent} of {self.world} gave no result within {timeout} s")
        return results[0][1]
