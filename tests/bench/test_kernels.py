"""The kernels and the memory of a step on a GPU, counted without one: neither may grow unnoticed."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch.distributed as dist

from megatron_ligo.bench import bench_kernels
from megatron_ligo.bench.steps.fake_device import StepCount, count_step
from megatron_ligo.config.run_config import FitSection, OperatorSection, ParallelSection, PretrainSection
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.planning.planned_job import PlannedJob
from megatron_ligo.planning.traffic import estimate_traffic
from tests.tiny_models import llama_config

# Kernels of a layer, forward and backward, in bf16. A change that lowers them lowers these.
FIT_KERNELS, PLAIN_KERNELS = 117, 87
# Of a fit of Qwen3, whose heads have norms; its plain step has 91.
HEAD_NORM_KERNELS = 135
SIZES = {"hidden_size": 64, "ffn_size": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "tied": True}
LARGE = {"hidden_size": 160, "ffn_size": 320, "num_heads": 8, "num_kv_heads": 4, "head_dim": 16, "tied": True}


def planned_jobs(
    layers: int,
    world_size: int = 1,
    tp: int = 1,
    cp: int = 1,
    recompute: bool = False,
    tokens: int = 512,
    arch: str = "llama",
) -> dict[str, PlannedJob]:
    small, large = (llama_config(arch=arch, model_type=arch, num_layers=layers, **sizes) for sizes in (SIZES, LARGE))
    operator = build_initial_operator(small, large, OperatorSection())
    keys = {
        "precision": "bf16",
        "global_batch_size": world_size // (tp * cp),
        "parallel": ParallelSection(tp=tp, cp=cp),
        "recompute": recompute,
    }
    fit = PlannedJob(operator.large, FitSection(**keys), world_size, tokens, operator, source_bytes=2)
    return {"fit": fit, "plain": replace(fit, operator=None, training=PretrainSection(**keys))}


def counts() -> dict[str, list[StepCount]]:
    dist.destroy_process_group()
    counted = {kind: [count_step(planned_jobs(layers)[kind]) for layers in (8, 16)] for kind in ("fit", "plain")}
    for jobs in (planned_jobs(8, 16, 2), planned_jobs(2, 8, cp=8)):
        for kind, job in jobs.items():
            counted[kind].append(count_step(job))
    counted["fit with head norms"] = [count_step(planned_jobs(layers, arch="qwen3")["fit"]) for layers in (8, 16)]
    # The rank ends with a group, as it began.
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)
    return counted


def test_kernels_of_a_layer_do_not_grow(pools):
    counted = pools(1).run(counts)
    a_layer = {
        kind: (sum(more.kernels.values()) - sum(few.kernels.values())) / 8 for kind, (few, more, *_) in counted.items()
    }
    assert a_layer["plain"] <= PLAIN_KERNELS and a_layer["fit"] <= FIT_KERNELS, a_layer
    assert a_layer["fit"] <= bench_kernels.KERNEL_GOAL * a_layer["plain"]
    assert a_layer["fit with head norms"] <= HEAD_NORM_KERNELS, a_layer
    for kind in bench_kernels.KINDS:
        _, _, sharded, context = counted[kind]
        assert sharded.collectives["allreduce_"] >= 4 * 8, (kind, sharded.collectives)
        # Queries, keys, values and outputs, forward and backward. Counted are what is sent and the room for it.
        assert context.collectives["alltoall_base_"] == 2 * 8
        sent = context.collective_bytes["alltoall_base_"] / 2 * 7 / 8
        assert sent == estimate_traffic(planned_jobs(2, 8, cp=8)[kind])["context parallel"]


def test_the_plan_of_recomputed_steps(pools):
    for name, ratio in pools(1).run(planned_over_counted_growth).items():
        assert ratio == pytest.approx(1, abs=bench_kernels.MEMORY_GOAL), name


def planned_over_counted_growth() -> dict[str, float]:
    """Returns planned over counted bytes that four more layers take, where no launcher has numbered the ranks."""
    dist.destroy_process_group()
    local_rank = os.environ.pop("LOCAL_RANK")
    ratios = {}
    for cp in (1, 2):
        for kind in bench_kernels.KINDS:
            few, many = (
                count_step(planned_jobs(layers, cp, cp=cp, recompute=True, tokens=4096 * cp)[kind]) for layers in (4, 8)
            )
            ratios[f"{kind}, cp {cp}"] = (many.planned - few.planned) / (many.peak - few.peak)
    # Of twelve layers, built in batches of eight and four, weights and not activations are at the peak.
    count = count_step(planned_jobs(12, recompute=True, tokens=64)["fit"])
    ratios["fit of few tokens"] = count.planned / count.peak
    os.environ["LOCAL_RANK"] = local_rank
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)
    return ratios


@pytest.mark.long
@pytest.mark.parametrize("case", bench_kernels.CASES)
def test_the_plan_of_large_models(pools, case):
    planned = pools(1).run(planned_over_counted, timeout=1500, case=case)
    for kind, ratio in planned.items():
        assert ratio == pytest.approx(1, abs=bench_kernels.MEMORY_GOAL), kind


def planned_over_counted(case: str) -> dict[str, float]:
    dist.destroy_process_group()
    counted = {kind: count_step(job) for kind, job in bench_kernels.build_jobs(case, "bf16").items()}
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)
    return {kind: count.planned / count.peak for kind, count in counted.items()}
