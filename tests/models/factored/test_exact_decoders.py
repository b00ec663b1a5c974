"""The sharded, factored fit of the decoders with other norms and factors than Llama's, against one process."""

from __future__ import annotations

import pytest

from tests.models.factored.test_exactness import assert_exact, differences

DECODERS = [
    pytest.param("qwen3", 4, {"tp": 2, "pp": 2, "sequence_parallel": True, "micro_size": 2}),
    pytest.param("qwen3", 2, {"tp": 2}, marks=pytest.mark.long),
    pytest.param("qwen3", 4, {"tp": 2, "zero": 3, "micro_size": 2, "recompute": True}, marks=pytest.mark.long),
    pytest.param("granite", 4, {"tp": 2, "pp": 2, "sequence_parallel": True, "micro_size": 2}),
    pytest.param("granite", 4, {"tp": 2, "zero": 3, "micro_size": 2}, marks=pytest.mark.long),
    pytest.param("olmo2", 4, {"tp": 2, "pp": 2, "sequence_parallel": True, "micro_size": 2}),
    pytest.param("gemma2", 4, {"tp": 2, "pp": 2, "sequence_parallel": True, "micro_size": 2}),
    pytest.param("gemma2", 4, {"tp": 2, "zero": 3, "micro_size": 2}, marks=pytest.mark.long),
    pytest.param("olmo2", 2, {"tp": 2}, marks=pytest.mark.long),
    pytest.param("olmo2", 4, {"tp": 2, "zero": 3, "micro_size": 2, "recompute": True}, marks=pytest.mark.long),
]


@pytest.mark.parametrize("family, world, layout", DECODERS, ids=str)
def test_other_decoders_are_exact_when_sharded(pools, family, world, layout):
    changes = {"small": {"arch": family, "tied": layout.get("zero") != 3}, "settings": {"noise": 0.5}}
    assert_exact(differences(pools, world, "sgd", changes, **layout))


@pytest.mark.long
@pytest.mark.parametrize("family", sorted({case.values[0] for case in DECODERS}))
def test_other_decoders_are_exact_with_the_official_operator(pools, family):
    changes = {"small": {"arch": family, "tied": True}, "settings": {"method": "ligo", "depth_init": "stack"}}
    assert_exact(differences(pools, 4, "sgd", changes, tp=2, pp=2, micro_size=2))


@pytest.mark.long
@pytest.mark.parametrize("family", sorted({case.values[0] for case in DECODERS}))
def test_other_decoders_are_exact_after_a_lag(pools, family):
    changes = {"small": {"arch": family, "tied": True}, "lagged": True}
    assert_exact(differences(pools, 2, "sgd", changes, tp=2, sequence_parallel=True, micro_size=4))


@pytest.mark.parametrize("family", ["qwen3", pytest.param("olmo2", marks=pytest.mark.long)])
def test_normalised_heads_of_another_size_are_exact_when_sharded(pools, family):
    changes = {"small": {"arch": family, "tied": True}, "large": {"head_dim": 6}, "settings": {"noise": 0.5}}
    assert_exact(differences(pools, 4, "sgd", changes, tp=2, pp=2, sequence_parallel=True, micro_size=2))
