"""Groups of real ranks that measurements command: fresh processes, so that the peak of their memory is their own."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path

DIED_SILENTLY = "ended without a word, as the system ends one that takes too much memory"


class RankProcesses:
    """`world` processes, each of which has made an object by `make(**arguments)` and obeys calls of its methods."""

    def __init__(self, world: int, make: Callable, **arguments):
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(rank, world, store, theirs, make, arguments), daemon=True
            )
            process.start()
            # So that the pipe closes when the rank is gone.
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self._answers()

    def call(self, method: str, *arguments) -> list:
        """What each rank's method gives."""
        for pipe in self.pipes:
            # One that is gone is met when the answers are read.
            with suppress(BrokenPipeError):
                pipe.send((method, arguments))
        return self._answers()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()

    def _answers(self) -> list:
        """Of all, whoever is first: the others may wait for one that has failed, for ever."""
        answers: dict[int, object] = {}
        while len(answers) < len(self.pipes):
            for pipe in connection.wait([pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]):
                rank = self.pipes.index(pipe)
                try:
                    good, answers[rank] = pipe.recv()
                except (EOFError, ConnectionError):
                    good, answers[rank] = False, DIED_SILENTLY
                if not good:
                    self.close()
                    raise RuntimeError(f"rank {rank}:\n{answers[rank]}")
        return [answers[rank] for rank in range(len(self.pipes))]


def _rank_main(rank: int, world: int, store: str, pipe, make: Callable, arguments: dict) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        from megatron_ligo.distributed import mesh

        mesh.init_distributed()
        made = make(**arguments)
        pipe.send((True, None))
        while True:
            try:
                method, given = pipe.recv()
            except EOFError:
                # The parent is gone.
                return
            pipe.send((True, getattr(made, method)(*given)))
    except Exception:
        pipe.send((False, traceback.format_exc()))
        time.sleep(60)


def time_in_turn(rounds: int, *steps: Callable[[], float]) -> list[list[float]]:
    """The times of each step over the rounds, the steps taken in turn; a first round is not counted."""
    times: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 1):
        for mine, step in zip(times, steps, strict=True):
            seconds = step()
            if number:
                mine.append(seconds)
    return times


def compare_pairs(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """The median of the ratios of pairs that were measured one after the other, and their spread."""
    pairs = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return {"ratio": round(statistics.median(pairs), 3), "low": round(min(pairs), 3), "high": round(max(pairs), 3)}
