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


def run_in_new_process(function: Callable, *arguments: object) -> object:
    """What a function of a module gives in a new process: nothing of earlier work is in its memory."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=warnings.simplefilter, initargs=("ignore",)) as pool:
        return pool.submit(function, *arguments).result()


def summarise_repeats(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of some repeats."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def format_spread(found: dict[str, float], form: str = ".2f") -> str:
    """`0.52 (0.48 to 0.55)`, or one number where there was one repeat."""
    median, least, most = (format(found[name], form) for name in ("median", "min", "max"))
    return median if least == most else f"{median} ({least} to {most})"


@dataclass
class AnonymousMemoryPeak:
    """Bytes of anonymous memory above the start: the most that was seen."""

    peak: int = 0


@contextmanager
def track_anonymous_memory() -> Iterator[AnonymousMemoryPeak]:
    """Samples this process's memory that belongs to no file while the body runs."""
    memory, start, ended = AnonymousMemoryPeak(), _read_anonymous_bytes(), threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            memory.peak = max(memory.peak, _read_anonymous_bytes() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


def _read_anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel tells no RssAnon")


def describe_machine() -> dict[str, object]:
    """What a figure depends on besides the code."""
    return {"cores": os.cpu_count(), "python": platform.python_version(), "versions": library_versions()}
