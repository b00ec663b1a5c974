"""Optimizer and buffer sizes that a DeepSpeed profile implies: bytes per element, bucket sizes, offloading."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from megatron_ligo.config.run_config import ParallelSection
from megatron_ligo.training import deepspeed_profile

# DeepSpeed's own defaults, in elements.
DEFAULT_BUCKET_SIZE, DEFAULT_LIVE_PARAMETERS = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class OptimizerMemory:
    """Sizes of the optimizer's state and buffers.

    master_bytes, moment_bytes: bytes per element of a master weight and of one Adam moment.
    bucket_size: elements that are reduced at once.
    allocates_whole_buckets: a bucket has bucket_size elements, however few gradients there are.
    overlaps: outside of pipelines, a bucket is filled while another one is reduced.
    live_parameters: maximum number of gathered parameters that ZeRO 3 keeps.
    sums_in_fp32: gradients of bf16 weights are summed in fp32 outside of pipelines.
    """

    master_bytes: int
    moment_bytes: int
    bucket_size: int
    allocates_whole_buckets: bool
    overlaps: bool
    live_parameters: int
    offloads_optimizer: bool
    offloads_weights: bool
    sums_in_fp32: bool


@cache
def read_optimizer_memory(parallel: ParallelSection, bf16: bool) -> OptimizerMemory:
    """Reads the profile of a layout. bf16: DeepSpeed trains bf16 weights instead of fp32 ones."""
    profile = deepspeed_profile.read_profile(parallel)
    zero, low_precision = profile["zero_optimization"], profile.get("bf16", {})
    return OptimizerMemory(
        master_bytes=2 if bf16 and low_precision.get("bf16_master_weights_and_grads") else 4,
        moment_bytes=2 if bf16 and low_precision.get("bf16_optimizer_states") else 4,
        bucket_size=int(zero.get("reduce_bucket_size", DEFAULT_BUCKET_SIZE)),
        allocates_whole_buckets=bool(zero.get("contiguous_gradients", True)),
        overlaps=bool(zero.get("overlap_comm", True)),
        live_parameters=int(zero.get("stage3_max_live_parameters", DEFAULT_LIVE_PARAMETERS)),
        offloads_optimizer=_is_offloaded(zero, "offload_optimizer"),
        offloads_weights=_is_offloaded(zero, "offload_param"),
        sums_in_fp32=deepspeed_profile.gradient_sums_dtype(profile) == "fp32",
    )


def gradient_bytes(parallel: ParallelSection, weight_bytes: int) -> int:
    """Returns the bytes per element of the gradients' sums, which are also reduced in this dtype."""
    in_fp32 = weight_bytes < 4 and parallel.pp == 1 and read_optimizer_memory(parallel, True).sums_in_fp32
    return 4 if in_fp32 else weight_bytes


def bucket_bytes(parallel: ParallelSection, weight_bytes: int, count: int) -> int:
    """Returns the bytes of the buckets in which DeepSpeed reduces gradients of `count` trained parameters.

    ZeRO 1 and 2 allocate them at the first gradient of a step, ZeRO 3 once for the run. ZeRO 1 reduces the sums of
    gradients, the others the gradients of a micro-batch.
    """
    optimizer = read_optimizer_memory(parallel, weight_bytes < 4)
    elements = optimizer.bucket_size if optimizer.allocates_whole_buckets else min(count, optimizer.bucket_size)
    buckets = 2 if optimizer.overlaps and parallel.zero < 3 and parallel.pp == 1 else 1
    return buckets * elements * (gradient_bytes(parallel, weight_bytes) if parallel.zero == 1 else weight_bytes)


def _is_offloaded(zero: dict, key: str) -> bool:
    return zero.get(key, {}).get("device", "none") != "none"
