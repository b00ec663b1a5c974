"""Benchmarks growth of a synthetic Llama against `dd conv=fsync` of the same bytes, and its anonymous memory.

Two operators: `copies`, the default initialisation, whose maps have one entry per row and whose depth maps read one
layer; and `learned`, the same with small noise added to every entry that a fit learns. Bytes are those of all formats
written. No growth is faster than the slower of the disk and the products, which are also timed without writing.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import time
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import layer_index
from megatron_ligo.bench import synthetic_reader, timing
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.config.run_config import HANDOFF_FORMATS, LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.export.handoff import build_growth_record, write_handoff
from megatron_ligo.growth import operator_file
from megatron_ligo.growth.operator import Operator
from megatron_ligo.growth.validation import build_initial_operator

HELP = "growth: rate against dd conv=fsync of the same bytes, anonymous memory"
KINDS = ("copies", "learned")
GOAL = 0.6  # of dd's rate
MAX_LARGE_LAYERS = 2  # memory limit: the source plus this many large layers
BLOCK = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gb", type=float, default=0.5, help="size of the small model in fp32 (default: 0.5)")
    parser.add_argument("--times", type=float, default=1.5, help="ratio of large to small width (default: 1.5)")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each measurement (default: 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="compute threads (default: one per core)")


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Measures both operators and dd in turn, repeat by repeat, so that other load affects them alike."""
    # As the command does (cli.let_waiting_threads_sleep): the growths run in new processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    small = synthetic_reader.synthetic_llama_config(args.gb * 1e9)
    source = folder / "source"
    timing.run_in_new_process(_prepare, small, _large_section(small, args.times), folder)
    runs: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for _ in range(args.repeats):
        for kind in KINDS:
            run = timing.run_in_new_process(_grow, source, folder / kind, folder / "grown", args.threads)
            shutil.rmtree(folder / "grown")
            run["dd"] = _time_dd(folder / "zeros", run["bytes"])
            runs[kind].append(run)
    return {
        "what": "grow",
        "small": small.to_json(),
        "times": args.times,
        "formats": list(HANDOFF_FORMATS),
        "paths": {kind: _summarise(repeats) for kind, repeats in runs.items()},
        "machine": {**timing.describe_machine(), "threads": args.threads},
    }


def _summarise(runs: list[dict]) -> dict:
    return {
        "bytes": runs[0]["bytes"],
        "seconds": [run["seconds"] for run in runs],
        "dd_seconds": [run["dd"] for run in runs],
        "compute_seconds": [run["compute"] for run in runs],
        "ratio": timing.summarise_repeats([run["dd"] / run["seconds"] for run in runs]),
        "of_floor": timing.summarise_repeats([max(run["dd"], run["compute"]) / run["seconds"] for run in runs]),
        "goal": GOAL,
        "anonymous": {"peak": max(run["anonymous"] for run in runs), "limit": runs[0]["limit"]},
    }


def _large_section(small: ModelConfig, times: float) -> LargeSection:
    wide = {name: round(getattr(small, name) * times) for name in ("num_heads", "num_kv_heads", "ffn_size")}
    return LargeSection(num_layers=small.num_layers + 2, hidden_size=wide["num_heads"] * small.head_dim, **wide)


def _prepare(small: ModelConfig, large: LargeSection, folder: Path) -> None:
    convert(synthetic_reader.SyntheticReader(small), folder / "source", "hf")
    operator = build_initial_operator(small, large, OperatorSection())
    for kind in KINDS:
        tensors = ((name, _operator_tensor(operator, name, kind)) for name in operator.shapes())
        operator_file.write_operator(operator, tensors, folder / kind, {})


def _operator_tensor(operator: Operator, name: str, kind: str) -> Tensor:
    tensor = operator.tensor(name)
    if kind == "copies" or name.startswith("gain"):
        return tensor
    noise = 1e-3 * torch.randn(tensor.shape, generator=operator.generator(f"{name}.learned"))
    if name.endswith("expand") and operator.setting("identity", name.split(".")[1]) == "frozen":
        noise[: tensor.shape[1]] = 0
    return tensor + noise


def _grow(source: Path, operator: Path, target: Path, threads: int) -> dict:
    torch.set_num_threads(threads)
    reader = formats.open(source)
    grown = GrownReader(operator_file.OperatorFile(operator), reader)
    with timing.track_anonymous_memory() as memory:
        start = time.perf_counter()
        write_handoff(grown, target, torch.float32, HANDOFF_FORMATS, build_growth_record(grown))
        seconds = time.perf_counter() - start
    compute = _time_products(operator, source)
    layer = sum(_tensor_bytes(grown, key) for key in grown.keys() if layer_index(key) == 0)  # noqa: SIM118 - no dict
    source_bytes = sum(_tensor_bytes(reader, key) for key in reader.keys())  # noqa: SIM118
    # Holes of sparse files take no space.
    written = sum(path.stat().st_blocks * 512 for path in target.rglob("*") if path.is_file())
    return {
        "seconds": seconds,
        "compute": compute,
        "anonymous": memory.peak,
        "bytes": written,
        "limit": source_bytes + MAX_LARGE_LAYERS * layer,
    }


def _time_products(operator: Path, source: Path) -> float:
    """Returns the seconds in which every tensor is computed once and dropped."""
    grown = GrownReader(operator_file.OperatorFile(operator), formats.open(source))
    start = time.perf_counter()
    for key in grown.keys():  # noqa: SIM118 - no dict
        grown.read(key)
    return time.perf_counter() - start


def _tensor_bytes(reader: Reader, key: str) -> int:
    info = reader.info(key)
    return math.prod(info.shape) * info.dtype.itemsize


def _time_dd(path: Path, nbytes: int) -> float:
    """Syncs pending writes and returns the seconds of writing `nbytes` of zeros."""
    os.sync()
    start = time.perf_counter()
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={BLOCK}", f"count={nbytes // BLOCK}", "conv=fsync"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def format_text(results: dict) -> str:
    lines = [f"{'operator':<10} {'GB':<6} {'of dd':<24} {'goal':<6} {'of its floor':<24} anonymous memory (limit)"]
    for kind, path in results["paths"].items():
        memory = f"{path['anonymous']['peak'] / 1e6:.0f} MB ({path['anonymous']['limit'] / 1e6:.0f} MB)"
        ratio = timing.format_spread(path["ratio"])
        floor = timing.format_spread(path["of_floor"])
        lines.append(f"{kind:<10} {path['bytes'] / 1e9:<6.2f} {ratio:<24} {path['goal']:<6} {floor:<24} {memory}")
    return "\n".join(lines)
