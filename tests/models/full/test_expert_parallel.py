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


def reference(layout: dict, family: str) -> list[tuple[float, float]]:
    return pretrain_cases.reference(True, layout.get("optimizer", "adamw"), family)


@pytest.mark.parametrize("world, family, layouts", CASES)
def test_divided_experts_train_as_one_process(pools, tmp_path, world, family, layouts):
    folder = made(tmp_path, True, family)
    cases = [{"folder": folder, "tied": True, "family": family, **layout} for layout in layouts]
    results = pools(world).run(pretrain_cases.train_at_each, cases=cases, timeout=600)
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
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_groups_shows(pools, tmp_path, mistake):
    """The comparison above fails for each of these."""
    layout = {"ep": 2, "tp": 2, "sequence_parallel": True, **SGD}
    expected = reference(layout, "mixtral")
    case = {"folder": made(tmp_path, True, "mixtral"), "tied": True, "family": "mixtral", **layout}
    result = pools(4).run(pretrain_cases.train_wrongly, mistake=mistake, **case)
    losses, norms = largest_difference(result, expected)
    assert max(losses, norms) > 1e-4
