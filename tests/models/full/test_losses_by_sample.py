"""Losses on each sample of a micro-batch: those of evaluations of one sample each, at any layout without a pipeline."""

from __future__ import annotations

import pytest

from tests.models.full import engine_cases, pretrain_cases


@pytest.mark.parametrize(
    "world, layout", [(1, {}), (2, {"tp": 2}), (2, {"zero": 3}), (2, {"cp": 2})], ids=["one", "tp2", "zero3", "cp2"]
)
def test_each_sample_has_its_own_loss(pools, world, layout):
    together, alone = pools(world).run(
        engine_cases.losses_by_sample, model_config=pretrain_cases.sizes(False), layout=layout
    )
    assert together == pytest.approx(alone, rel=1e-5)
    assert len(set(together)) == 3
