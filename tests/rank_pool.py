"""Real ranks for many cases: forked from one process that has imported everything, gloo over a file store, no ports.

A case is a module-level function `case(**arguments) -> plain data`, run on every rank; `Ranks.run` gives rank 0's
result, or raises with the failing rank's traceback. Each case has ranks of its own: nothing that engines, groups and
their threads leave behind reaches the next one. A case that hangs is killed and fails.
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
    # What a library starts here (Megatron-core's own save starts a server of torch's) is ended with the rank.
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
    # The parent ends all ranks together: one that leaves early closes the connections of those that still work.
    pipe.recv()


class Ranks:
    """`world` ranks at a time, new ones for each case."""

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
                    results[rank] = (False, "ended without a word")
                if not results[rank][0]:
                    # The others may wait for the one that failed, for ever.
                    deadline = min(deadline, time.monotonic() + GRACE)
        for rank, (good, value) in results.items():
            if not good:
                raise RuntimeError(f"rank {rank} of {self.world}:\n{value}")
        silent = [rank for rank in range(self.world) if rank not in results]
        if silent:
            raise TimeoutError(f"ranks {silent} of {self.world} gave no answer within {timeout} s")
        return results[0][1]
