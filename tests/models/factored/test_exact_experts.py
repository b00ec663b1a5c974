"""The factored fit of experts against one process of plain torch and transformers' Mixtral."""

import pytest

from tests.models.factored import fit_cases
from tests.models.factored.test_exactness import OPTIMIZERS, assert_exact, compare, differences

# Of a dense Llama: experts wider than its ffn; pairs that hold it; and of a mixture of two.
GROWN = {"large": {"num_experts": 6, "top_k": 2}}
SHARDED = {"large": {"num_experts": 8, "top_k": 4, "ffn_size": 16}}
THIRDS = {"large": {"num_experts": 6, "top_k": 3, "ffn_size": 12}}
MIXED = {"small": {"arch": "mixtral", "num_experts": 2, "top_k": 1}, "large": {"num_experts": 4, "top_k": 2}}
OLMOE = {
    "small": {"arch": "olmoe", "num_experts": 2, "top_k": 1, "hidden_size": 32},
    "large": {"num_experts": 4, "top_k": 2, "hidden_size": 64},
}
SP = {"tp": 2, "sequence_parallel": True}
# (ranks, changes): layouts, which start once.
DAILY = {
    "4, grown": (4, GROWN, [{**SP, "ep": 2}, {"ep": 2, "zero": 3, "recompute": True}]),
    "2, sharded": (2, SHARDED, [{"ep": 2, "zero": 2}]),
}
SELDOM = {
    "1, grown": (1, GROWN, [{}]),
    "2, sharded, TP": (2, SHARDED, [SP]),
    "2, grown": (2, GROWN, [{"ep": 2}, {"pp": 2}, {**SP, "zero": 2}, {"zero": 1}]),
    "4, thirds": (4, THIRDS, [{**SP, "ep": 2}, {"tp": 4, "sequence_parallel": True}]),
    "2, mixed": (2, MIXED, [{"ep": 2}, {**SP}, {"ep": 2, "zero": 3}]),
    "2, olmoe": (2, OLMOE, [{"ep": 2}, SP]),
    "4, mixed": (4, MIXED, [{"ep": 2, "pp": 2}, {**SP, "ep": 2, "zero": 3}, {**SP, "pp": 2}]),
}
CASES = [
    *(pytest.param(*case, id=name) for name, case in DAILY.items()),
    *(pytest.param(*case, id=name, marks=pytest.mark.long) for name, case in SELDOM.items()),
]


@pytest.mark.parametrize("world, changes, layouts", CASES)
def test_every_layout_gives_the_numbers_of_one_process(pools, world, changes, layouts):
    lr, clip = OPTIMIZERS["sgd"]
    cases = [{"optimizer": "sgd", "lr": lr, "clip": clip, **changes, **layout} for layout in layouts]
    results = pools(world).run(fit_cases.fit_at_each, cases=cases, timeout=900)
    for layout, result in zip(layouts, results, strict=True):
        gaps = compare(result, "sgd", changes)
        print(layout, gaps)
        assert_exact(gaps)


@pytest.mark.long
@pytest.mark.parametrize("sabotage", ["routers_unreduced", "maps_unreduced", "experts_averaged"])
def test_a_mistake_in_the_groups_shows(pools, sabotage):
    """The comparison above fails: a router's or a map's gradient of one tensor-parallel rank; experts' gradients
    averaged over the expert-parallel ranks as if each had computed all of them."""
    gaps = differences(pools, 4, "sgd", GROWN, **SP, ep=2, sabotage=sabotage)
    assert gaps["operator"] > 1e-3, gaps
