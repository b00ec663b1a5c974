"""Benchmarks the memory estimate of `ligo plan`: tensors of real ranks at the peak of two steps, on the CPU."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from megatron_ligo.common.atomic_files import write_json

log = logging.getLogger(__name__)

HELP = "plan: peak memory of fits and pretraining runs at many layouts, planned over measured"
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
EXPERTS = {
    "small": {"num_layers": 2, "hidden_size": 192, "ffn_size": 512, "num_heads": 6, "num_kv_heads": 3, "head_dim": 32}
    | {"vocab_size": 4000},
    "large": {"num_layers": 3, "hidden_size": 384, "ffn_size": 704, "num_heads": 12, "num_kv_heads": 6}
    | {"num_experts": 4, "top_k": 2},
}
SHARED_EXPERT = {
    "small": EXPERTS["small"] | {"model_type": "qwen2", "qkv_bias": True},
    "large": EXPERTS["large"] | {"ffn_size": 256},
}
BF16_STATES = {"ds_config": f"{ROOT / 'launch_scripts' / 'grow_1b.json'}"}
OFFLOAD = {"zero": 3, "ds_config": f"{ROOT / 'megatron_ligo' / 'ds_configs' / 'zero3_offload.json'}"}
# Kind of job, number of processes, sizes, and further fields of the job (StepJob).
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
    "pretraining, experts": ("plain", 1, EXPERTS, {"tokens": 1024, "sequences": 2}),
    "pretraining, EP2": ("plain", 2, EXPERTS, {"tokens": 512, "sequences": 2, "parallel": {"ep": 2}}),
    "fit": ("fit", 1, WIDE, {"tokens": 1024, "sequences": 4}),
    "fit, micro-batches": ("fit", 1, WIDE, {"tokens": 512, "micro_batches": 2}),
    "fit, rank 32": ("fit", 1, WIDE, {"tokens": 512, "operator": {"rank": 32}}),
    "fit, dense heads": ("fit", 1, WIDE, {"tokens": 512, "sequences": 2, "operator": {"method": "ligo"}}),
    "fit, recomputed": ("fit", 1, NARROW, {"tokens": 1024, "sequences": 4, "recompute": True}),
    "fit, distilled": ("fit", 1, WIDE, {"tokens": 512, "sequences": 2, "distill": 0.5}),
    "fit, lagged": ("fit", 1, WIDE, {"tokens": 512, "sequences": 2, "lagged": True}),
    "fit, TP2": ("fit", 2, NARROW, {"tokens": 1024, "sequences": 2, "parallel": {"tp": 2}}),
    "fit, PP2": ("fit", 2, WIDE, {"tokens": 256, "micro_batches": 4, "parallel": {"pp": 2}}),
    "fit, experts": ("fit", 1, EXPERTS, {"tokens": 1024, "sequences": 2}),
    "fit, EP2": ("fit", 2, EXPERTS, {"tokens": 512, "sequences": 2, "parallel": {"ep": 2}}),
    "fit, dropped neurons": ("fit", 1, EXPERTS, {"tokens": 512, "sequences": 2, "operator": {"expert_drop": 0.5}}),
    "fit, a shared expert": (
        "fit",
        1,
        SHARED_EXPERT,
        {"tokens": 1024, "sequences": 2, "operator": {"expert_start": "shared"}},
    ),
    "fit, ZeRO 3": ("fit", 2, WIDE, {"tokens": 256, "parallel": {"zero": 3}}),
}


# Elements of a bucket of gradients: DeepSpeed allocates it whole, and a profile's own would hide the rest.
BUCKET_SIZE = 1_000_000


def with_small_buckets(job: dict, folder: Path) -> dict:
    """Returns the fields of a job with buckets of BUCKET_SIZE, in a profile that it writes to the folder."""
    from megatron_ligo.config.run_config import ParallelSection
    from megatron_ligo.training.deepspeed_profile import read_profile

    parallel = job.get("parallel", {})
    profile = read_profile(ParallelSection(**parallel))
    profile["zero_optimization"] |= {"reduce_bucket_size": BUCKET_SIZE}
    path = folder / "profile.json"
    write_json(path, profile)
    return job | {"parallel": parallel | {"ds_config": str(path)}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(f'"{case}"' for case in CASES)
    parser.add_argument("--case", action="append", choices=CASES, metavar="CASE", help=f"one of {names} (default: all)")


def measure(args: argparse.Namespace, folder: Path) -> dict:
    from megatron_ligo.bench.steps.memory_peak import PeakMemoryProbe
    from megatron_ligo.bench.steps.rank_pool import RankProcesses

    results = {}
    for case in args.case or CASES:
        kind, world_size, sizes, options = CASES[case]
        ranks = RankProcesses(
            world_size, PeakMemoryProbe, kind=kind, job=with_small_buckets({**sizes, **options}, folder)
        )
        results[case] = compare_by_stage(ranks.call("measure"))
        ranks.close()
        log.info("%s: %s", case, results[case])
    return {"what": "plan", "goal": GOAL, "cases": results}


def compare_by_stage(ranks: list[dict]) -> list[dict]:
    """Compares the fullest rank of each stage: planned over measured bytes, measured bytes, planned bytes by kind."""
    stages = []
    for stage in sorted({rank["stage"] for rank in ranks}):
        top = max((rank for rank in ranks if rank["stage"] == stage), key=lambda rank: rank["measured"])
        ratio = round(sum(top["planned"].values()) / top["measured"], 3)
        stages.append({"ratio": ratio, "measured": top["measured"], "planned": top["planned"]})
    return stages


def format_text(results: dict) -> str:
    lines = [f"planned / measured peak of a rank's tensors (goal: within {results['goal']:.0%})"]
    for case, stages in results["cases"].items():
        ratios = ", ".join(f"{stage['ratio']:.2f} of {stage['measured'] / 2**20:.0f} MiB" for stage in stages)
        lines.append(f"  {case:26s} {ratios}")
    return "\n".join(lines)
