"""Benchmarks a fit step against a plain training step (Megatron-core under DeepSpeed) of the same large model.

Both run on the same tokens, in turn, each on its own ranks; times are processor times. `time_over_flops` is the time
ratio divided by the FLOP ratio: 1 means that the fit step runs at the plain step's FLOP rate.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from megatron_ligo.config.run_config import SOURCE_PLACEMENTS

log = logging.getLogger(__name__)

HELP = "fit step: time, memory and tensor-parallel traffic, as ratios to a plain step of the large model"

SMALL_CASE = {
    "small": {"num_layers": 6, "hidden_size": 256, "ffn_size": 688, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64},
    "large": {"num_layers": 12, "hidden_size": 768, "ffn_size": 2048, "num_heads": 12, "num_kv_heads": 12},
    "vocab": 8192,
}
CASES = {
    "x3": SMALL_CASE,
    # SmolLM2-135M's widths with two layers, grown to the quickstart's widths and to those of a 1.1B model.
    "smollm2-x1.3": {
        "small": {"num_layers": 2, "hidden_size": 576, "ffn_size": 1536, "num_heads": 9, "num_kv_heads": 3},
        "large": {"num_layers": 2, "hidden_size": 768, "ffn_size": 2048, "num_heads": 12, "num_kv_heads": 4},
        "vocab": 8192,
    },
    "smollm2-x3.3": {
        "small": {"num_layers": 2, "hidden_size": 576, "ffn_size": 1536, "num_heads": 9, "num_kv_heads": 3},
        "large": {"num_layers": 2, "hidden_size": 1920, "ffn_size": 5120, "num_heads": 30, "num_kv_heads": 10},
        "vocab": 8192,
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", choices=CASES, default="x3", help="model sizes (default: x3, 97M parameters)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096], help="tokens per micro-batch")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--rank", type=int, nargs="+", default=[0, 64], help="rank of the learned maps; 0: full rank")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages")
    parser.add_argument("--source", choices=SOURCE_PLACEMENTS, default=SOURCE_PLACEMENTS[0], help="the key fit.source")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each, taken in turn")


def measure(args: argparse.Namespace, folder: Path) -> dict:
    from megatron_ligo.bench.steps.rank_pool import RankProcesses
    from megatron_ligo.bench.steps.step_jobs import FitStepper, PretrainStepper, StepJob

    case = CASES[args.case]
    results = []
    for tokens in args.tokens:
        shared = {
            "small": {"head_dim": 64, "vocab_size": case["vocab"], **case["small"]},
            "large": case["large"],
            "tokens": tokens,
            "sequences": max(1, tokens // args.seq_length),
            "micro_batches": args.micro_batches,
            "parallel": {"tp": args.tp, "pp": args.pp},
            "precision": args.precision,
            "whole_source": args.source == "whole",
        }
        world = args.tp * args.pp
        plain = RankProcesses(world, PretrainStepper, job=StepJob(**shared))
        for rank in args.rank:
            for recompute in (False, True):
                job = StepJob(**shared, operator={"rank": rank}, recompute=recompute)
                fit = RankProcesses(world, FitStepper, job=job)
                results.append(
                    {"tokens": tokens, "rank": rank, "recompute": recompute, **_compare_steps(args, fit, plain, job)}
                )
                log.info("%s", results[-1])
                fit.close()
        plain.close()
    layout = {key: getattr(args, key) for key in ("tp", "pp", "micro_batches", "precision", "source")}
    return {"what": "fit", "case": args.case, **case, **layout, "results": results}


def format_text(results: dict) -> str:
    layout = f"tp {results['tp']}, pp {results['pp']}, {results['precision']}, source {results['source']}"
    lines = [f"{results['case']}, {layout}: fit step / plain step"]
    for result in results["results"]:
        maps = f"rank {result['rank']}" if result["rank"] else "full-rank maps"
        recompute = ", recomputed" if result["recompute"] else ""
        time = result["cpu_time"]
        spread = f"{time['ratio']} ({time['low']} to {time['high']})"
        traffic = f", tp traffic {result['tp_traffic']}" if "tp_traffic" in result else ""
        lines.append(
            f"  {result['tokens']:5d} tokens, {maps}{recompute}: time {spread}, "
            f"flops {result['flops']}, peak memory {result['peak_memory']}{traffic}"
        )
    return "\n".join(lines)


def _compare_steps(args, fit, plain, job) -> dict:
    from megatron_ligo.arch.flops import train_flops
    from megatron_ligo.bench.steps.rank_pool import compare_pairs, time_in_turn
    from megatron_ligo.models.factored.fit_flops import fit_step_flops

    last: dict[str, list[dict]] = {}

    def step(name, ranks):
        def run() -> float:
            last[name] = ranks.call("step")
            return sum(answer["cpu"] for answer in last[name])

        return run

    fit_seconds, plain_seconds = time_in_turn(args.rounds, step("fit", fit), step("plain", plain))
    operator, tokens = job.build_operator(), job.tokens * job.micro_batches
    fit_flops = fit_step_flops(operator, tokens, job.seq_length)
    plain_flops = train_flops(operator.large, tokens, job.seq_length)
    time = compare_pairs(fit_seconds, plain_seconds)
    memory = [max(answer["peak"] - answer["baseline"] for answer in ranks.call("memory")) for ranks in (fit, plain)]
    figures = {
        "cpu_time": time,
        "flops": round(fit_flops / plain_flops, 3),
        "time_over_flops": round(time["ratio"] * plain_flops / fit_flops, 3),
        "peak_memory": round(memory[0] / memory[1], 3),
        "seconds": {"fit": round(min(fit_seconds), 3), "plain": round(min(plain_seconds), 3)},
        "peak_mib": [round(value / 2**20) for value in memory],
    }
    if args.tp > 1:
        sent = [last[name][0]["tp_bytes"] for name in ("fit", "plain")]
        figures["tp_traffic"] = round(sent[0] / sent[1], 3)
    return figures
