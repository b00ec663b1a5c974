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
# The shared expert holds the dense block beside new experts; is new beside copies; is one of a mixture.
QWEN2 = {"arch": "llama", "model_type": "qwen2", "qkv_bias": True}
HOLDS_BLOCK = {
    "small": QWEN2,
    "large": {"num_experts": 6, "top_k": 2, "ffn_size": 20, "renormalises_routing": False},
    "settings": {"expert_start": "shared"},
}
BESIDE = {"small": QWEN2, "large": {"num_experts": 4, "top_k": 2, "shared_expert_ffn_size": 20}}
QWEN2_MOE = {
    "small": {"arch": "qwen2_moe", "num_experts": 2, "top_k": 1, "shared_expert_ffn_size": 20},
    "large": {"num_experts": 4, "top_k": 2, "shared_expert_ffn_size": 36},
}
# Half of each expert's neurons start anew.
DROPPED = {**SHARDED, "settings": {"expert_drop": 0.5}}
DROPPED_MIXED = {**MIXED, "settings": {"expert_drop": 0.25}}
# On three expert-parallel ranks: granularity 3, as many experts as ranks, and a mixture of three that becomes nine.
THREES = {"batch": 6, "settings": {}}
OF_THREE = {
    "thirds": {**THREES, "large": {"num_experts": 9, "top_k": 6, "ffn_size": 12}},
    "lone": {**THREES, "large": {"num_experts": 3, "top_k": 2}},
    "mixture": {
        **THREES,
        "small": {"arch": "mixtral", "num_experts": 3, "top_k": 1},
        "large": {"num_experts": 9, "top_k": 3},
    },
    "Qwen2-MoE": {
        **THREES,
        "small": {"arch": "qwen2_moe", "num_experts": 3, "top_k": 1, "shared_expert_ffn_size": 20},
        "large": {"num_experts": 9, "top_k": 3, "shared_expert_ffn_size": 36},
    },
}
SP = {"tp": 2, "sequence_parallel": True}
# (ranks, changes): layouts, which start once.
DAILY = {
    "4, grown": (4, GROWN, [{**SP, "ep": 2}, {"ep": 2, "zero": 3, "recompute": True}]),
    "2, sharded": (2, SHARDED, [{"ep": 2, "zero": 2}]),
    "4, Qwen2-MoE": (4, QWEN2_MOE, [{**SP, "ep": 2}]),
    "3, thirds": (3, OF_THREE["thirds"], [{"ep": 3, "micro_size": 1}]),
    "4, dropped": (4, DROPPED, [{**SP, "ep": 2}]),
}
SELDOM = {
    "1, grown": (1, GROWN, [{}]),
    "2, sharded, TP": (2, SHARDED, [SP]),
    "2, grown": (2, GROWN, [{"ep": 2}, {"pp": 2}, {**SP, "zero": 2}, {"zero": 1}]),
    "4, thirds": (4, THIRDS, [{**SP, "ep": 2}, {"tp": 4, "sequence_parallel": True}]),
    "2, mixed": (2, MIXED, [{"ep": 2}, {**SP}, {"ep": 2, "zero": 3}]),
    "1, the shared expert holds the block": (1, HOLDS_BLOCK, [{}]),
    "2, the shared expert holds the block": (2, HOLDS_BLOCK, [{"ep": 2}, SP, {"zero": 3}, {"pp": 2}]),
    "4, the shared expert holds the block": (4, HOLDS_BLOCK, [{**SP, "ep": 2}, {"ep": 2, "zero": 2}]),
    "2, beside": (2, BESIDE, [{"ep": 2}, SP, {"zero": 3}]),
    "4, beside": (4, BESIDE, [{**SP, "ep": 2}]),
    "2, Qwen2-MoE": (2, QWEN2_MOE, [{"ep": 2}, SP, {"ep": 2, "zero": 3, "recompute": True}, {"pp": 2}]),
    "2, dropped": (2, DROPPED, [{"ep": 2}, {**SP, "zero": 2}, {"zero": 3, "recompute": True}, {"pp": 2}]),
    "2, dropped mixture": (2, DROPPED_MIXED, [{"ep": 2}, SP]),
    "3, lone": (3, OF_THREE["lone"], [{"ep": 3, "micro_size": 1, "zero": 2}]),
    "3, mixture": (3, OF_THREE["mixture"], [{"ep": 3, "micro_size": 1, "zero": 3}]),
    "3, Qwen2-MoE": (3, OF_THREE["Qwen2-MoE"], [{"ep": 3, "micro_size": 1}]),
    "6, thirds": (6, OF_THREE["thirds"], [{**SP, "ep": 3, "micro_size": 1}, {"ep": 3, "pp": 2, "micro_size": 1}]),
    "2, olmoe": (2, OLMOE, [{"ep": 2}, SP]),
    "4, mixed": (4, MIXED, [{"ep": 2, "pp": 2}, {**SP, "ep": 2, "zero": 3}, {**SP, "pp": 2}]),
}
CASES = [
    *(pytest.param(*case, id=name) for name, case in DAILY.items()),
    *(pytest.param(*case, id=name, marks=pytest.mark.long) for name, case in SELDOM.items()),
]


@pytest.mark.parametrize("world, changes, layouts", CASES)
def test_every_layout_gives_the_numbers_of_one_process(pools, world, changes, layouts):
    check_layouts(pools(world), changes, layouts)


@pytest.mark.long
@pytest.mark.parametrize(
    "world, changes, layout",
    [
        (2, GROWN, {"ep": 2}),
        (4, DROPPED, {**SP, "ep": 2}),
        (3, OF_THREE["Qwen2-MoE"], {"ep": 3, "micro_size": 1}),
    ],
)
def test_tokens_sent_to_their_experts_alone_give_the_same(pools, world, changes, layout):
    """The all-to-all of GPUs, over gloo."""
    check_layouts(pools(world), changes, [layout], "alltoall")


def check_layouts(ranks, changes: dict, layouts: list[dict], dispatcher: str = "") -> None:
    lr, clip = OPTIMIZERS["sgd"]
    cases = [{"optimizer": "sgd", "lr": lr, "clip": clip, **changes, **layout} for layout in layouts]
    results = ranks.run(fit_cases.fit_at_each, cases=cases, dispatcher=dispatcher, timeout=900)
    for layout, result in zip(layouts, results, strict=True):
        gaps = compare(result, "sgd", changes)
        print(layout, gaps)
        assert_exact(gaps)


@pytest.mark.long
@pytest.mark.parametrize(
    "sabotage, world, changes, layout",
    [
        *((sabotage, 4, GROWN, {**SP, "ep": 2}) for sabotage in ("routers_unreduced", "maps_unreduced")),
        ("experts_averaged", 4, GROWN, {**SP, "ep": 2}),
        ("experts_averaged", 3, OF_THREE["thirds"], {"ep": 3, "micro_size": 1}),
        ("experts_averaged", 4, DROPPED, {**SP, "ep": 2}),
        ("maps_unreduced", 4, QWEN2_MOE, {**SP, "ep": 2}),
    ],
)
def test_a_mistake_in_the_groups_shows(pools, sabotage, world, changes, layout):
    """The comparison above fails: a router's or a map's gradient of one tensor-parallel rank; experts' gradients
    averaged over the expert-parallel ranks as if each had computed all of them."""
    gaps = differences(pools, world, "sgd", changes, **layout, sabotage=sabotage)
    assert gaps["operator"] > 1e-3, gaps
