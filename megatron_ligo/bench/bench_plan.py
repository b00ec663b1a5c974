"""The memory that `tools/plan.py` tells, against what real ranks take: tensors at the peak of two steps, on the CPU."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

log = logging.getLogger(__name__)

HELP = "peak memory of fits and pretrainings at many layouts, planned over measured"
GOAL = 0.15
ROOT = Path(__file__).resolve().parents[2]

NARROW = {
    "small": {"num_layers": 3, "hidden_size": 128, "ffn_size": 352, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    | {"vocab_size": 4096},
    "large": {"num_layers": 6, "hidden_size": 384, "ffn_size": 1024, "num_heads": 12, "num_kv_heads": 6},
}
WIDE = {
    "small": {"num_layers": 3, "hidden_size": 192, "ffn_size": 512, "num_heads": 6, "num_kv_heads": 3, "head_dim": 32}
    | {"vocab_size": 8000},
    "large": {"num_layers": 4, "hidden_size": 512, "ffn_size": 1408, "num_heads": 16, "num_kv_heads": 8},
}
BF16_STATES = {"ds_config": f"{ROOT / 'launch_scripts' / 'grow_1b.json'}"}
OFFLOAD = {"zero": 3, "ds_config": f"{ROOT / 'ds_configs' / 'zero3_offload.json'}"}
# What is run, on how many processes, the sizes, and the rest of the job (bench/steps/step_jobs.py).
CASES = {
    "pretraining": ("plain", 1, NARROW, {"tokens": 1024, "sequences": 2}),
    "pretraining, recomputed": ("plain", 1, WIDE, {"tokens": 1024, "sequences": 4, "recompute": True}),
    "pretraining, bf16": ("plain", 1, WIDE, {"tokens": 128, "precision": "bf16"}),
    "pretraining, bf16 states": ("plain", 1, WIDE, {"tokens": 128, "precision": "bf16", "parallel": BF16_STATES}),
    "pretraining, TP2": ("plain", 2, NARROW, {"sequences": 2, "parallel": {"tp": 2}}),
    "pretraining, PP2": ("plain", 2, NARROW, {"tokens": 256, "micro_batches": 4, "parallel": {"pp": 2}}),
    "pretraining, ZeRO 2": ("plain", 2, WIDE, {"tokens": 256, "micro_batches": 2, "parallel": {"zero": 2}}),
    "pretraining, ZeRO 3": ("plain", 2, WIDE, {"tokens": 256, "parallel": {"zero": 3}}),
    "pretraining, offloaded": ("plain", 2, WIDE, {"tokens": 256, "parallel": OFFLOAD}),
    "fit": ("fit", 1, WIDE, {"tokens": 1024, "sequences": 4}),
    "fit, micro-batches": ("fit", 1, WIDE, {"tokens": 512, "micro_batches": 2}),
    "fit, rank 32": ("fit", 1, WIDE, {"tokens": 512, "operator": {"rank": 32}}),
    "fit, dense heads": ("fit", 1, WIDE, {"tokens": 512, "sequences": 2, "operator": {"method": "ligo"}}),
    "fit, recomputed": ("fit", 1, NARROW, {"tokens": 1024, "sequences": 4, "recompute": True}),
    "fit, distilled": ("fit", 1, WIDE, {"tokens": 512, "sequences": 2, "distill": 0.5}),
    "fit, lagged": ("fit", 1, WIDE, {"tokens": 512, "sequences": 2, "lagged": True}),
    "fit, TP2": ("fit", 2, NARROW, {"tokens": 1024, "sequences": 2, "parallel": {"tp": 2}}),
    "fit, PP2": ("fit", 2, WIDE, {"tokens": 256, "micro_batches": 4, "parallel": {"pp": 2}}),
    "fit, ZeRO 3": ("fit", 2, WIDE, {"tokens": 256, "parallel": {"zero": 3}}),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(f'"{case}"' for case in CASES)
    parser.add_argument("--case", action="append", choices=CASES, metavar="CASE", help=f"one of {known} (default: all)")


def measure(args: argparse.Namespace, folder: Path) -> dict:
    from megatron_ligo.bench.steps.memory_peak import PeakMemoryProbe
    from megatron_ligo.bench.steps.rank_pool import RankProcesses

    found = {}
    for case in args.case or CASES:
        kind, world, sizes, more = CASES[case]
        ranks = RankProcesses(world, PeakMemoryProbe, kind=kind, job={**sizes, **more})
        found[case] = compare_by_stage(ranks.call("found"))
        ranks.close()
        log.info("%s: %s", case, found[case])
    return {"what": "plan", "goal": GOAL, "cases": found}


def compare_by_stage(ranks: list[dict]) -> list[dict]:
    """By stage: the ratio of the plan to the rank that took most, its bytes, and those planned by kind."""
    stages = []
    for stage in sorted({rank["stage"] for rank in ranks}):
        top = max((rank for rank in ranks if rank["stage"] == stage), key=lambda rank: rank["measured"])
        ratio = round(sum(top["planned"].values()) / top["measured"], 3)
        stages.append({"ratio": ratio, "measured": top["measured"], "planned": top["planned"]})
    return stages


def as_text(found: dict) -> str:
    lines = [f"planned / measured peak of a rank's tensors (goal: within {found['goal']:.0%})"]
    for case, stages in found["cases"].items():
        told = ", ".join(f"{one['ratio']:.2f} of {one['measured'] / 2**20:.0f} MiB" for one in stages)
        lines.append(f"  {case:26s} {told}")
    return "\n".join(lines)
