"""What a training is about to do, printed before its first step."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.config.run_config import FitSection, TrainingSection
from megatron_ligo.distributed.parallel_dims import ParallelDims
from megatron_ligo.growth.operator import ROUTERS


def describe_job(
    start: str,
    model_config: ModelConfig,
    section: TrainingSection,
    dims: ParallelDims,
    step: int,
    tokens: int,
    flops: float,
) -> str:
    """Returns a small table. step: finished steps. tokens, flops: per step, over all ranks."""
    left = max(section.steps - step, 0)
    sizes = f"{model_config.num_layers} layers x {model_config.hidden_size}"
    heads = f"{model_config.num_heads}/{model_config.num_kv_heads} heads, ffn {model_config.ffn_size}"
    if model_config.num_experts:
        heads += f", {model_config.num_experts} experts of which a token takes {model_config.top_k}"
    batch = f"{section.global_batch_size} samples a step, micro-batches of {section.micro_batch_size}"
    rows = {
        "start": start,
        "model": f"{model_config.arch}, {count_parameters(model_config):,} parameters: {sizes}, {heads}",
        "vocabulary": f"{model_config.vocab_size:,}",
        "layout": f"{describe_dims(dims)}, ZeRO {section.parallel.zero}, {section.precision}; {batch}",
        "steps": f"{step} of {section.steps} done",
        "tokens": f"{tokens:,} a step, {tokens * left:,} to do",
        "FLOPs": f"{flops:.3g} a step, {flops * left:.3g} to do",
        "learning rate": f"{_describe_rates(section)}, {section.warmup_steps} steps of warm-up, {section.schedule}",
        "guard": f"bad_numbers = {section.bad_numbers}, spike = {section.spike:g}",
    }
    width = max(map(len, rows)) + 2
    return "\n".join(f"  {name:<{width}}{text}" for name, text in rows.items())


def _describe_rates(section: TrainingSection) -> str:
    """Returns the peak rate; of a fit also that of the depth maps, if it differs."""
    if isinstance(section, FitSection) and section.depth_lr not in (None, section.lr):
        return f"{section.lr:.3g}, of depth maps {section.depth_lr:.3g}"
    return f"{section.lr:.3g}"


def describe_dims(dims: ParallelDims) -> str:
    context = f" x CP {dims.cp}" if dims.cp > 1 else ""
    experts = f", EP {dims.ep}" if dims.ep > 1 else ""
    return f"TP {dims.tp}{context} x PP {dims.pp} x DP {dims.dp}{experts}"


def describe_operator(counts: Mapping[str, int]) -> str:
    """Returns a table of the operator's trainable parameters: a row per space, one for depth, and one for routers that
    are learned themselves. counts: by map."""
    rows: dict[str, dict[str, list[int]]] = {}
    for name, count in counts.items():
        kind, map_name, *rest = name.split(".")
        whole = {"depth": "mixes", ROUTERS: "weights"}
        row, column = (kind, whole[kind]) if kind in whole else (map_name, rest[-1])
        rows.setdefault(row, {}).setdefault(column, []).append(count)
    width = max(map(len, rows), default=0) + 2
    lines = [f"operator: {sum(counts.values()):,} trainable parameters"]
    for row, columns in rows.items():
        parts = [f"{sum(sizes):>14,} {column}{_format_maps(len(sizes))}" for column, sizes in columns.items()]
        lines.append(f"  {row:<{width}}{'  '.join(parts)}")
    return "\n".join(lines)


def _format_maps(count: int) -> str:
    return f" ({count} maps)" if count > 1 else ""


def count_parameters(model_config: ModelConfig) -> int:
    """Returns the parameters of a model; tied ones count once."""
    arch = architectures.get(model_config.arch)
    return sum(prod(arch.param(key).shape(model_config)) for key in arch.keys(model_config))
