"""Experts over tensor-, pipeline- and expert-parallel ranks: transformers' numbers at every layout."""

import pytest

from tests.models.full import pretrain_cases
from tests.models.full.test_pretrained import made

SGD = {"optimizer": "sgd"}
SP = {"tp": 2, "sequence_parallel": True}
# By the number of ranks; each number starts once.
DAILY = {
    4: [
        {"ep": 2, "tp": 2, "sequence_parallel": True, "zero": 2},
        {"ep": 2, "pp": 2, **SGD},
    ]
}
SELDOM = {
    2: [
        {"ep": 2},
        {"ep": 2, "zero": 2, "micro_size": 4, "recompute": True},
        {"ep": 2, "zero": 3},
        {"pp": 2},
        {"tp": 2, "sequence_parallel": True},
        {"tp": 2, "sequence_parallel": True, "zero": 3, **SGD},
    ],
    4: [
        {"ep": 2, "zero": 3, "recompute": True},
        {"ep": 2, **SGD},
        {"ep": 2, "zero": 2, **SGD},
        {"ep": 2, "tp": 2, "sequence_parallel": True, "zero": 3},
        {"tp": 2, "pp": 2, "sequence_parallel": True},
    ],
    8: [{"ep": 2, "tp": 2, "pp": 2, "sequence_parallel": True, **SGD}],
}
# Three expert-parallel ranks, by the number of experts.
THREES = {"batch": 6, "micro_size": 1, "ep": 3}
ODD_EXPERTS = {
    3: {3: [THREES], 6: [THREES | {"zero": 2, "recompute": True}], 9: [THREES | {"zero": 3}, THREES | SGD]},
    6: {9: [THREES | SP | SGD, THREES | {"pp": 2, **SGD}], 3: [THREES | {"zero": 2}]},
}
OTHERS = [{**SP, **SGD, "ep": 2}, {**SGD, "ep": 2, "zero": 3}]
FAMILIES = ("mixtral", "qwen3_moe")
CASES = [
    *(pytest.param(world, "mixtral", layouts, id=f"{world}") for world, layouts in DAILY.items()),
    *(
        pytest.param(world, family, layouts, id=f"{world}-{family}", marks=pytest.mark.long)
        for family in FAMILIES
        for world, layouts in SELDOM.items()
    ),
    *(pytest.param(4, family, OTHERS, id=family, marks=pytest.mark.long) for family in ("qwen2_moe", "olmoe")),
]


ODD_CASES = [
    pytest.param(
        world, experts, layouts, id=f"{world}-{experts}", marks=[pytest.mark.long] * ((world, experts) != (3, 9))
    )
    for world, by_experts in ODD_EXPERTS.items()
    for experts, layouts in by_experts.items()
]


def reference(layout: dict, family: str) -> list[tuple[float, float]]:
    sizes = {name: layout[name] for name in ("batch", "experts") if name in layout}
    return pretrain_cases.reference(True, layout.get("optimizer", "adamw"), family, **sizes)


@pytest.mark.parametrize("world, family, layouts", CASES)
def test_divided_experts_train_as_one_process(pools, tmp_path, world, family, layouts):
    check_layouts(pools(world), made(tmp_path, True, family), family, layouts)


@pytest.mark.parametrize("world, experts, layouts", ODD_CASES)
@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen2_moe", marks=pytest.mark.long)])
def test_three_ranks_divide_odd_numbers_of_experts(pools, tmp_path, family, world, experts, layouts):
    folder = made(tmp_path, True, family, experts)
    check_layouts(pools(world), folder, family, [layout | {"experts": experts} for layout in layouts])


@pytest.mark.parametrize(
    "world, layouts",
    [
        (2, [{"ep": 2, **SGD}]),
        pytest.param(4, [{"ep": 2, **SP, "zero": 2}, {"ep": 2, "pp": 2, **SGD}], marks=pytest.mark.long),
        pytest.param(3, [THREES | SGD], marks=pytest.mark.long),
    ],
)
def test_tokens_sent_to_their_experts_alone_train_as_one_process(pools, tmp_path, world, layouts):
    """The all-to-all of GPUs, over gloo."""
    check_layouts(pools(world), made(tmp_path, True, "mixtral"), "mixtral", layouts, "alltoall")


def check_layouts(ranks, folder: str, family: str, layouts: list[dict], dispatcher: str = "") -> None:
    cases = [{"folder": folder, "tied": True, "family": family, **layout} for layout in layouts]
    results = ranks.run(pretrain_cases.train_at_each, cases=cases, dispatcher=dispatcher, timeout=600)
    for layout, result in zip(layouts, results, strict=True):
        expected = reference(layout, family)
        print(layout, *(largest_difference(result, expected)))
        assert result["evaluated"] == pytest.approx(expected[0][0], rel=1e-6), layout
        for step, (step_found, step_expected) in enumerate(zip(result["steps"], expected, strict=True)):
            assert step_found == pytest.approx(step_expected, rel=1e-5), (layout, step)


def largest_difference(result: dict, expected: list[tuple[float, float]]) -> tuple[float, float]:
    """The largest relative differences of losses and of gradient norms."""
    pairs = list(zip(result["steps"], expected, strict=True))
    return tuple(max(abs(found[i] / right[i] - 1) for found, right in pairs) for i in (0, 1))


MISTAKES = [
    "experts are averaged as replicas",
    "experts are summed",
    "routers are reduced over the tensor-parallel ranks",
    "the norm counts shards on every rank",
]


@pytest.mark.long
@pytest.mark.parametrize(
    "mistake, world, layout",
    [
        *((mistake, 4, {"ep": 2, **SP, **SGD}) for mistake in MISTAKES),
        *((mistake, 3, THREES | SGD | {"experts": 9}) for mistake in MISTAKES[:2]),
    ],
)
def test_a_mistake_in_the_groups_shows(pools, tmp_path, mistake, world, layout):
    """The comparison above fails for each of these."""
    expected = reference(layout, "mixtral")
    folder = made(tmp_path, True, "mixtral", layout.get("experts", 6))
    case = {"folder": folder, "tied": True, "family": "mixtral", **layout}
    result = pools(world).run(pretrain_cases.train_wrongly, mistake=mistake, **case)
    losses, norms = largest_difference(result, expected)
    assert max(losses, norms) > 1e-4
