"""Holds the planned peak of a rank's tensors against real ranks, for many layouts and sizes."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_ligo.bench import bench_plan
from megatron_ligo.bench.steps.memory_peak import PeakMemoryProbe


def measure_ranks(kind: str, job: dict) -> list[dict]:
    """Returns the measurement of every rank."""
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, PeakMemoryProbe(kind, job).measure())
    return ranks


# These only combine what other cases cover separately; they run with --long.
LONG = ("pretraining", "pretraining, bf16", "pretraining, ZeRO 2", "pretraining, offloaded")
LONG += ("fit, micro-batches", "fit, recomputed", "fit, rank 32", "fit, distilled")
CASES = [pytest.param(case, marks=[pytest.mark.long] * (case in LONG)) for case in bench_plan.CASES]


@pytest.mark.parametrize("case", CASES)
def test_memory_is_as_planned_within_15_percent(pools, case, tmp_path):
    kind, world_size, sizes, options = bench_plan.CASES[case]
    job = bench_plan.with_small_buckets({**sizes, **options}, tmp_path)
    ranks = pools(world_size).run(measure_ranks, kind=kind, job=job)
    for stage in bench_plan.compare_by_stage(ranks):
        assert stage["ratio"] == pytest.approx(1.0, abs=bench_plan.GOAL), str(stage)
    assert all(rank["parameters"] == rank["counted"] for rank in ranks)
