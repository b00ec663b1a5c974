"""What a rank's tensors take at most, as the plan says it and as it is measured, for many layouts and sizes."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_ligo.bench import bench_plan
from megatron_ligo.bench.steps.memory_peak import PeakMemoryProbe


def peaks(kind: str, job: dict) -> list[dict]:
    """Of every rank."""
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, PeakMemoryProbe(kind, job).found())
    return ranks


# Those that only join what others have apart wait for --long.
LONG = ("pretraining", "pretraining, bf16", "fit, micro-batches", "fit, recomputed", "fit, rank 32")
EACH = [pytest.param(case, marks=[pytest.mark.long] * (case in LONG)) for case in bench_plan.CASES]


@pytest.mark.parametrize("case", EACH)
def test_memory_is_as_planned_within_15_percent(pools, case):
    kind, world, sizes, more = bench_plan.CASES[case]
    ranks = pools(world).run(peaks, kind=kind, job={**sizes, **more})
    for stage in bench_plan.compare_by_stage(ranks):
        assert stage["ratio"] == pytest.approx(1.0, abs=bench_plan.GOAL), stage
    assert all(rank["parameters"] == rank["counted"] for rank in ranks)
