"""Benchmarks conversions of a synthetic Llama against `cp` + `sync` of the same bytes, and their anonymous memory.

The rate of a conversion is the source's bytes over the seconds until everything is fsynced, digests included. It is
divided by the rate of `cp` + `sync` in the same repeat. The libraries' own tools convert a smaller model
(library_tools.py).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from megatron_ligo.bench import library_tools, synthetic_reader, timing
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.format import WriteOptions

HELP = "conversion: rates against cp + sync, anonymous memory, and the libraries' own tools"
GB = 1e9
SHARD_BYTES = {"source": 1_500_000_000, "target": 1_000_000_000}
# Target rates, as fractions of the rate of cp + sync.
GOALS = {"hf": 0.5, "universal": 1 / 3, "mcore": 1 / 3}
# Limit of anonymous memory above the start: this many of the largest tensors plus this many bytes.
MAX_LARGEST_TENSORS, MAX_OVERHEAD_BYTES = 2, 300_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gb", type=float, default=4.0, help="model size in fp32 (default: 4)")
    parser.add_argument(
        "--peer-gb", type=float, default=0.5, help="the same for the libraries' tools (default: 0.5; 0: skip)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each measurement (default: 3)")
    parser.add_argument("--workers", type=int, default=2, help="as in ligo convert (default: 2)")
    parser.add_argument("--to", nargs="*", metavar="FORMAT", help="target formats (default: all)")


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Measures conversions and cp in turn, repeat by repeat, so that other load affects them alike."""
    model_config = synthetic_reader.synthetic_llama_config(args.gb * GB)
    source = folder / "source"
    timing.run_in_new_process(_write_source, source, args.gb)
    size = _folder_bytes(source)
    targets = args.to or formats.writers()
    copy_seconds: list[float] = []
    runs: dict[str, list[dict]] = {to: [] for to in targets}
    for _ in range(args.repeats):
        copy_seconds.append(_time_copy(source, folder / "copy"))
        for to in targets:
            job = partial(_convert_in_new_process, source, to, args.workers)
            runs[to].append(_run_and_remove(folder / "target", job))
    reader = formats.open(source)
    largest = max(torch.Size(reader.info(key).shape).numel() * 4 for key in reader.keys())  # noqa: SIM118 - no dict
    results = {
        "what": "convert",
        "model": {"bytes": size, "largest_tensor": largest, "dims": model_config.to_json()},
        "workers": args.workers,
        "cp_sync": {
            "seconds": copy_seconds,
            "bytes_per_second": timing.summarise_repeats([size / seconds for seconds in copy_seconds]),
        },
        "paths": {to: _summarise(runs[to], copy_seconds, size, largest, GOALS.get(to)) for to in targets},
        "machine": timing.describe_machine(),
    }
    shutil.rmtree(source)
    if args.peer_gb:
        results["peers"] = _measure_library_tools(args, folder)
    return results


def _summarise(runs: list[dict], copy_seconds: list[float], size: int, largest: int, goal: float | None) -> dict:
    limit = MAX_LARGEST_TENSORS * largest + MAX_OVERHEAD_BYTES
    ratios = [copy / run["seconds"] for copy, run in zip(copy_seconds, runs, strict=True)]
    return {
        "seconds": [run["seconds"] for run in runs],
        "bytes_per_second": timing.summarise_repeats([size / run["seconds"] for run in runs]),
        "ratio": timing.summarise_repeats(ratios),
        "goal": goal,
        "anonymous": {"peak": max(run["anonymous"] for run in runs), "limit": limit},
    }


def _measure_library_tools(args: argparse.Namespace, folder: Path) -> dict:
    """Measures each library's own tool against cp + sync of its output."""
    source = folder / "source"
    timing.run_in_new_process(_write_source, source, args.peer_gb)
    results = {}
    for name, tool in library_tools.TOOLS.items():
        runs = [_run_and_remove(folder / "peer", partial(_run_library_tool, tool, source)) for _ in range(args.repeats)]
        for part in (part for part in runs[0] if part != "cp_sync"):
            seconds = [run[part] for run in runs]
            ratios = [run["cp_sync"] / run[part] for run in runs]
            results[f"{name}: {part}"] = {"seconds": seconds, "ratio": timing.summarise_repeats(ratios)}
    return results


def _run_library_tool(tool: library_tools.LibraryTool, source: Path, work: Path) -> dict[str, float]:
    work.mkdir()
    target = work / "output"
    seconds = timing.run_in_new_process(tool, source, work, target)
    return {**seconds, "cp_sync": _time_copy(target, work / "copy")}


def _write_source(folder: Path, gb: float) -> None:
    options = WriteOptions(extra={"shard_bytes": SHARD_BYTES["source"]})
    convert(synthetic_reader.SyntheticReader(synthetic_reader.synthetic_llama_config(gb * GB)), folder, "hf", options)


def _convert_in_new_process(source: Path, to: str, workers: int, target: Path) -> dict:
    return timing.run_in_new_process(_convert, source, to, workers, target)


def _convert(source: Path, to: str, workers: int, target: Path) -> dict:
    torch.set_num_threads(1)
    options = WriteOptions(workers=workers, extra={"shard_bytes": SHARD_BYTES["target"]} if to == "hf" else {})
    reader = formats.open(source)
    with timing.track_anonymous_memory() as memory:
        start = time.perf_counter()
        convert(reader, target, to, options)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "anonymous": memory.peak}


def _time_copy(source: Path, target: Path) -> float:
    """Returns the seconds of `cp` and `sync`."""
    return _run_and_remove(target, partial(_copy, source))


def _copy(source: Path, target: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "--recursive", "--reflink=never", source, target], check=True)
    os.sync()
    return time.perf_counter() - start


def _run_and_remove(target: Path, job: Callable[[Path], object]):
    """Syncs pending writes, runs a job on `target` and removes its output."""
    os.sync()
    try:
        return job(target)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def format_text(results: dict) -> str:
    size, cores, workers = results["model"]["bytes"] / GB, results["machine"]["cores"], results["workers"]
    copy = timing.format_spread(_to_megabytes(results["cp_sync"]["bytes_per_second"]), ".0f")
    lines = [
        f"{size:.2f} GB in fp32, {cores} cores, {workers} workers",
        f"{'cp + sync':<28} {copy} MB/s",
        "",
        f"{'conversion':<28} {'of cp + sync':<24} {'goal':<6} anonymous memory (limit)",
    ]
    for to, path in results["paths"].items():
        goal = f"{path['goal']:.2f}" if path["goal"] else "-"
        memory = f"{path['anonymous']['peak'] / 1e6:.0f} MB ({path['anonymous']['limit'] / 1e6:.0f} MB)"
        lines.append(f"{'hf -> ' + to:<28} {timing.format_spread(path['ratio']):<24} {goal:<6} {memory}")
    for name, peer in results.get("peers", {}).items():
        lines.append(f"{name:<28} {timing.format_spread(peer['ratio'])}")
    return "\n".join(lines)


def _to_megabytes(summary: dict[str, float]) -> dict[str, float]:
    return {name: value / 1e6 for name, value in summary.items()}
