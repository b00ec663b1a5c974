"""Repeats with their spread, each in a process of its own, and the anonymous memory of a piece of work."""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_ligo.checkpoint.manifest import library_versions

SAMPLE_SECONDS = 0.002


def apart(function: Callable, *arguments: object) -> object:
    """What a function of a module gives in a new process: nothing of earlier work is in its memory."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=warnings.simplefilter, initargs=("ignore",)) as pool:
        return pool.submit(function, *arguments).result()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of some repeats."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def shown(found: dict[str, float], form: str = ".2f") -> str:
    """`0.52 (0.48 to 0.55)`, or one number where there was one repeat."""
    median, least, most = (format(found[name], form) for name in ("median", "min", "max"))
    return median if least == most else f"{median} ({least} to {most})"


@dataclass
class Memory:
    """Bytes of anonymous memory above the start: the most that was seen."""

    peak: int = 0


@contextmanager
def anonymous_memory() -> Iterator[Memory]:
    """Samples this process's memory that belongs to no file while the body runs."""
    memory, start, ended = Memory(), _anonymous(), threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            memory.peak = max(memory.peak, _anonymous() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel tells no RssAnon")


def machine() -> dict[str, object]:
    """What a figure depends on besides the code."""
    return {"cores": os.cpu_count(), "python": platform.python_version(), "versions": library_versions()}
