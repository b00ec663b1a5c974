"""What a DeepSpeed profile says of a rank's memory: bytes of the optimizer's numbers, buffers, what is on the host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from megatron_ligo.config.run_config import ParallelSection
from megatron_ligo.training import deepspeed_profile

# Numbers, where a profile does not say it (DeepSpeed's own defaults).
DEFAULT_BUCKET_SIZE, DEFAULT_LIVE_PARAMETERS = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class OptimizerMemory:
    """master, moment: bytes of a number of either; bucket: numbers that are reduced at once; live: gathered
    parameters that ZeRO 3 keeps at most."""

    master: int
    moment: int
    bucket: int
    live: int
    optimizer_on_host: bool
    weights_on_host: bool


@cache
def read_optimizer_memory(parallel: ParallelSection, bf16: bool) -> OptimizerMemory:
    """Of a layout's profile. bf16: DeepSpeed trains bf16 weights, not fp32 ones."""
    table = deepspeed_profile.read(parallel)
    zero, low = table["zero_optimization"], table.get("bf16", {})
    return OptimizerMemory(
        master=2 if bf16 and low.get("bf16_master_weights_and_grads") else 4,
        moment=2 if bf16 and low.get("bf16_optimizer_states") else 4,
        bucket=int(zero.get("reduce_bucket_size", DEFAULT_BUCKET_SIZE)),
        live=int(zero.get("stage3_max_live_parameters", DEFAULT_LIVE_PARAMETERS)),
        optimizer_on_host=_is_offloaded(zero, "offload_optimizer"),
        weights_on_host=_is_offloaded(zero, "offload_param"),
    )


def _is_offloaded(zero: dict, key: str) -> bool:
    return zero.get(key, {}).get("device", "none") != "none"
