"""Rank processes that benchmarks drive: spawned, so that their peak memory is their own."""

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

DIED_SILENTLY = "the process died without a message, as one does that the system kills for its memory"


class RankProcesses:
    """`world_size` processes. Each creates an object by `make(**arguments)` and executes calls of its methods."""

    def __init__(self, world_size: int, make: Callable, **arguments):
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            pipe, rank_pipe = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(rank, world_size, store, rank_pipe, make, arguments), daemon=True
            )
            process.start()
            # Closed here, so that the pipe reports the end of the rank.
            rank_pipe.close()
            self.pipes.append(pipe)
            self.processes.append(process)
        self._receive_answers()

    def call(self, method: str, *arguments) -> list:
        """Calls a method on every rank and returns the results by rank. RuntimeError if a rank fails or dies."""
        for pipe in self.pipes:
            # A dead rank is reported when the answers are received.
            with suppress(BrokenPipeError):
                pipe.send((method, arguments))
        return self._receive_answers()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()

    def _receive_answers(self) -> list:
        """Receives answers in order of arrival: the other ranks may wait forever for one that has failed."""
        answers: dict[int, object] = {}
        while len(answers) < len(self.pipes):
            for pipe in connection.wait([pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]):
                rank = self.pipes.index(pipe)
                try:
                    succeeded, answers[rank] = pipe.recv()
                except (EOFError, ConnectionError):
                    succeeded, answers[rank] = False, DIED_SILENTLY
                if not succeeded:
                    self.close()
                    raise RuntimeError(f"rank {rank}:\n{answers[rank]}")
        return [answers[rank] for rank in range(len(self.pipes))]


def _rank_main(rank: int, world_size: int, store: str, pipe, make: Callable, arguments: dict) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        from megatron_ligo.distributed import mesh

        mesh.init_distributed()
        target = make(**arguments)
        pipe.send((True, None))
        while True:
            try:
                method, method_arguments = pipe.recv()
            except EOFError:
                # The parent process has ended.
                return
            pipe.send((True, getattr(target, method)(*method_arguments)))
    except Exception:
        pipe.send((False, traceback.format_exc()))
        time.sleep(60)


def time_in_turn(rounds: int, *steps: Callable[[], float]) -> list[list[float]]:
    """Runs the steps in turn and returns the seconds of each, by round. A first, unrecorded round warms up."""
    times: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 1):
        for step_times, step in zip(times, steps, strict=True):
            seconds = step()
            if number:
                step_times.append(seconds)
    return times


def compare_pairs(times: list[float], reference_times: list[float]) -> dict[str, float]:
    """Returns the median and the range of the ratios of times measured in the same round."""
    ratios = [own / reference for own, reference in zip(times, reference_times, strict=True)]
    return {"ratio": round(statistics.median(ratios), 3), "low": round(min(ratios), 3), "high": round(max(ratios), 3)}
