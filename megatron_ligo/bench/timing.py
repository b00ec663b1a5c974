"""Summarises repeats, runs functions in a new process and tracks peak anonymous memory."""

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
    """Calls a module-level function in a new process, whose memory holds nothing of earlier work."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=warnings.simplefilter, initargs=("ignore",)) as pool:
        return pool.submit(function, *arguments).result()


def summarise_repeats(values: Sequence[float]) -> dict[str, float]:
    """Returns the median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def format_spread(summary: dict[str, float], form: str = ".2f") -> str:
    """Formats a summary as `0.52 (0.48 to 0.55)`, or as one number if all repeats agree."""
    median, low, high = (format(summary[name], form) for name in ("median", "min", "max"))
    return median if low == high else f"{median} ({low} to {high})"


@dataclass
class AnonymousMemoryPeak:
    """Peak of the process's anonymous memory above its level at the start, in bytes."""

    peak: int = 0


@contextmanager
def track_anonymous_memory() -> Iterator[AnonymousMemoryPeak]:
    """Samples the process's anonymous memory (not backed by a file) while the body runs."""
    memory, start, ended = AnonymousMemoryPeak(), _read_anonymous_bytes(), threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            memory.peak = max(memory.peak, _read_anonymous_bytes() - start)

    thread = threading.Thread(target=sample)
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
    raise AssertionError("the kernel does not report RssAnon")


def describe_machine() -> dict[str, object]:
    """Returns the properties of the machine and the environment that results depend on."""
    return {"cores": os.cpu_count(), "python": platform.python_version(), "versions": library_versions()}
