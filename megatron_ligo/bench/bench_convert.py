"""Conversions of a synthetic Llama against `cp` + `sync` of the same bytes, and their anonymous memory.

The rate of a path is the source's bytes over the seconds until all is fsynced, digests included; its ratio is to the
rate of `cp` + `sync` in the same repeat. Beside them the libraries' own tools, on a smaller model (peers.py).
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

HELP = "conversion: rates against cp + sync, anonymous memory, the libraries' own tools beside"
GB = 1e9
SHARD_BYTES = {"source": 1_500_000_000, "target": 1_000_000_000}
# What each path should reach, as a part of the rate of cp + sync.
GOALS = {"hf": 0.5, "universal": 1 / 3, "mcore": 1 / 3}
# What memory may be used above the start: so many of the largest tensors, and so many bytes.
LARGEST, MORE = 2, 300_000_000


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gb", type=float, default=4.0, help="size of the model in fp32 (default 4)")
    parser.add_argument("--peer-gb", type=float, default=0.5, help="the same for the libraries' tools (0.5; 0: none)")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is measured (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="as in tools/convert.py (default 2)")
    parser.add_argument("--to", nargs="*", metavar="FORMAT", help="these targets only (default: every one)")


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Every path, repeat by repeat, in turn with cp: what else the machine does meets them alike."""
    model_config = synthetic_reader.synthetic_llama_config(args.gb * GB)
    source = folder / "source"
    timing.run_in_new_process(_write, source, args.gb)
    size = _size(source)
    targets = args.to or formats.writers()
    floor: list[float] = []
    runs: dict[str, list[dict]] = {to: [] for to in targets}
    for _ in range(args.repeats):
        floor.append(_copied(source, folder / "copy"))
        for to in targets:
            runs[to].append(_fresh(folder / "target", partial(_converted, source, to, args.workers)))
    reader = formats.open(source)
    largest = max(torch.Size(reader.info(key).shape).numel() * 4 for key in reader.keys())  # noqa: SIM118 - no dict
    found = {
        "what": "convert",
        "model": {"bytes": size, "largest_tensor": largest, "dims": model_config.to_json()},
        "workers": args.workers,
        "cp_sync": {
            "seconds": floor,
            "bytes_per_second": timing.summarise_repeats([size / seconds for seconds in floor]),
        },
        "paths": {to: _summary(runs[to], floor, size, largest, GOALS.get(to)) for to in targets},
        "machine": timing.describe_machine(),
    }
    shutil.rmtree(source)
    if args.peer_gb:
        found["peers"] = _peers(args, folder)
    return found


def _summary(runs: list[dict], floor: list[float], size: int, largest: int, goal: float | None) -> dict:
    ratios = [least / run["seconds"] for least, run in zip(floor, runs, strict=True)]
    return {
        "seconds": [run["seconds"] for run in runs],
        "bytes_per_second": timing.summarise_repeats([size / run["seconds"] for run in runs]),
        "ratio": timing.summarise_repeats(ratios),
        "goal": goal,
        "anonymous": {"peak": max(run["anonymous"] for run in runs), "limit": LARGEST * largest + MORE},
    }


def _peers(args: argparse.Namespace, folder: Path) -> dict:
    """Each library's own tool against cp + sync of what it wrote."""
    source = folder / "source"
    timing.run_in_new_process(_write, source, args.peer_gb)
    found = {}
    for name, tool in library_tools.TOOLS.items():
        runs = [_fresh(folder / "peer", partial(_beside, tool, source)) for _ in range(args.repeats)]
        for part in (part for part in runs[0] if part != "cp_sync"):
            seconds = [run[part] for run in runs]
            ratios = [run["cp_sync"] / run[part] for run in runs]
            found[f"{name}: {part}"] = {"seconds": seconds, "ratio": timing.summarise_repeats(ratios)}
    return found


def _beside(tool: library_tools.LibraryTool, source: Path, work: Path) -> dict[str, float]:
    work.mkdir()
    seconds = timing.run_in_new_process(tool, source, work, work / "made")
    return {**seconds, "cp_sync": _copied(work / "made", work / "copy")}


def _write(folder: Path, gb: float) -> None:
    options = WriteOptions(extra={"shard_bytes": SHARD_BYTES["source"]})
    convert(synthetic_reader.SyntheticReader(synthetic_reader.synthetic_llama_config(gb * GB)), folder, "hf", options)


def _converted(source: Path, to: str, workers: int, target: Path) -> dict:
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


def _copied(source: Path, target: Path) -> float:
    """Seconds of `cp` and `sync`."""
    return _fresh(target, partial(_copy, source))


def _copy(source: Path, target: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "--recursive", "--reflink=never", source, target], check=True)
    os.sync()
    return time.perf_counter() - start


def _fresh(target: Path, job: Callable[[Path], object]):
    """Does a job with nothing waiting to be written, and removes what it has made."""
    os.sync()
    try:
        return job(target)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def as_text(found: dict) -> str:
    lines = [
        f"{found['model']['bytes'] / GB:.2f} GB in fp32, {found['machine']['cores']} cores, {found['workers']} workers",
        f"{'cp + sync':<28} {timing.format_spread(_mega(found['cp_sync']['bytes_per_second']), '.0f')} MB/s",
        "",
        f"{'path':<28} {'of cp + sync':<24} {'goal':<6} anonymous memory (limit)",
    ]
    for to, path in found["paths"].items():
        goal = f"{path['goal']:.2f}" if path["goal"] else "-"
        memory = f"{path['anonymous']['peak'] / 1e6:.0f} MB ({path['anonymous']['limit'] / 1e6:.0f} MB)"
        lines.append(f"{'hf -> ' + to:<28} {timing.format_spread(path['ratio']):<24} {goal:<6} {memory}")
    for name, peer in found.get("peers", {}).items():
        lines.append(f"{name:<28} {timing.format_spread(peer['ratio'])}")
    return "\n".join(lines)


def _mega(found: dict[str, float]) -> dict[str, float]:
    return {name: value / 1e6 for name, value in found.items()}
