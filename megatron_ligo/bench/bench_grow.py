"""Growth of a synthetic Llama against `dd conv=fsync` of the same bytes, and its anonymous memory.

Two operators: `copies`, the default start, whose maps have one entry a row and whose depth maps read one layer, and
`learned`, the same with a small number added to every entry that a fit learns. Bytes are those of all formats that are
written.
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
LAYERS = 2  # large layers that it may hold beside the source
BLOCK = 1 << 20


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gb", type=float, default=0.5, help="size of the small model in fp32 (default 0.5)")
    parser.add_argument("--times", type=float, default=1.5, help="large over small width (default 1.5)")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is measured (default 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the products (default: one a core)")


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Every operator, repeat by repeat, in turn with dd: what else the machine does meets them alike."""
    small = synthetic_reader.synthetic_llama_config(args.gb * 1e9)
    source = folder / "source"
    timing.run_in_new_process(_prepare, small, _large(small, args.times), folder)
    runs: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for _ in range(args.repeats):
        for kind in KINDS:
            run = timing.run_in_new_process(_grow, source, folder / kind, folder / "grown", args.threads)
            shutil.rmtree(folder / "grown")
            run["dd"] = _dd(folder / "zeros", run["bytes"])
            runs[kind].append(run)
    return {
        "what": "grow",
        "small": small.to_json(),
        "times": args.times,
        "formats": list(HANDOFF_FORMATS),
        "paths": {kind: _summary(found) for kind, found in runs.items()},
        "machine": {**timing.describe_machine(), "threads": args.threads},
    }


def _summary(runs: list[dict]) -> dict:
    return {
        "bytes": runs[0]["bytes"],
        "seconds": [run["seconds"] for run in runs],
        "dd_seconds": [run["dd"] for run in runs],
        "ratio": timing.summarise_repeats([run["dd"] / run["seconds"] for run in runs]),
        "goal": GOAL,
        "anonymous": {"peak": max(run["anonymous"] for run in runs), "limit": runs[0]["limit"]},
    }


def _large(small: ModelConfig, times: float) -> LargeSection:
    wide = {name: round(getattr(small, name) * times) for name in ("num_heads", "num_kv_heads", "ffn_size")}
    return LargeSection(num_layers=small.num_layers + 2, hidden_size=wide["num_heads"] * small.head_dim, **wide)


def _prepare(small: ModelConfig, large: LargeSection, folder: Path) -> None:
    convert(synthetic_reader.SyntheticReader(small), folder / "source", "hf")
    operator = build_initial_operator(small, large, OperatorSection())
    for kind in KINDS:
        made = ((name, _tensor(operator, name, kind)) for name in operator.shapes())
        operator_file.write_operator(operator, made, folder / kind, {})


def _tensor(operator: Operator, name: str, kind: str) -> Tensor:
    tensor = operator.tensor(name)
    if kind == "copies" or name.startswith("gain"):
        return tensor
    drawn = 1e-3 * torch.randn(tensor.shape, generator=operator.generator(f"{name}.learned"))
    if name.endswith("expand") and operator.setting("identity", name.split(".")[1]) == "frozen":
        drawn[: tensor.shape[1]] = 0
    return tensor + drawn


def _grow(source: Path, operator: Path, target: Path, threads: int) -> dict:
    torch.set_num_threads(threads)
    reader = formats.open(source)
    grown = GrownReader(operator_file.OperatorFile(operator), reader)
    with timing.track_anonymous_memory() as memory:
        start = time.perf_counter()
        write_handoff(grown, target, torch.float32, HANDOFF_FORMATS, build_growth_record(grown))
        seconds = time.perf_counter() - start
    layer = sum(_bytes(grown, key) for key in grown.keys() if key.startswith("layers.0."))  # noqa: SIM118 - no dict
    held = sum(_bytes(reader, key) for key in reader.keys())  # noqa: SIM118
    # What is a hole takes no room.
    written = sum(path.stat().st_blocks * 512 for path in target.rglob("*") if path.is_file())
    return {"seconds": seconds, "anonymous": memory.peak, "bytes": written, "limit": held + LAYERS * layer}


def _bytes(reader: Reader, key: str) -> int:
    info = reader.info(key)
    return math.prod(info.shape) * info.dtype.itemsize


def _dd(path: Path, nbytes: int) -> float:
    """Seconds of writing so many zeros, with nothing waiting to be written."""
    os.sync()
    start = time.perf_counter()
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={BLOCK}", f"count={nbytes // BLOCK}", "conv=fsync"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def as_text(found: dict) -> str:
    lines = [f"{'operator':<10} {'GB':<6} {'of dd':<24} {'goal':<6} anonymous memory (limit)"]
    for kind, path in found["paths"].items():
        memory = f"{path['anonymous']['peak'] / 1e6:.0f} MB ({path['anonymous']['limit'] / 1e6:.0f} MB)"
        ratio = timing.format_spread(path["ratio"])
        lines.append(f"{kind:<10} {path['bytes'] / 1e9:<6.2f} {ratio:<24} {path['goal']:<6} {memory}")
    return "\n".join(lines)
