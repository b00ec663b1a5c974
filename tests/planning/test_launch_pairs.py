"""Plans every pair of launch_scripts/pairs at its true sizes, and fits it on two ranks at reduced sizes."""

from __future__ import annotations

import runpy

import pytest

from tests.models.factored import fit_cases, fit_reference
from tests.models.factored.test_exactness import worst
from tests.planning import pair_models

GROWTH = pair_models.ROOT / "tools/benchmarks/growth"


def test_the_table_holds_the_planned_costs():
    table = (GROWTH / "pairs.md").read_text()
    lines = list(runpy.run_path(str(GROWTH / "pairs.py"))["format_rows"]())
    assert len(lines) == len(list((pair_models.ROOT / "launch_scripts/pairs").glob("*.toml"))) == 9
    assert [line for line in lines if line not in table] == []


def test_each_pair_fits_on_two_ranks_as_in_one_process(pools):
    results = pools(2).run(pair_models.fit_pairs)
    for path, (losses, norms, _, grown, afterwards) in zip(pair_models.PAIRS, results, strict=True):
        pair = pair_models.reduce_pair(path)
        small = fit_cases.small_dims(pair["small"])
        operator = fit_reference.make_operator(small, pair["large"], pair["settings"])
        batches = fit_cases.batches(operator.large, pair_models.STEPS)
        expected = fit_reference.run(small, pair["large"], pair["settings"], batches, "sgd", pair_models.LR, 0.05)
        assert losses == pytest.approx(expected[0], rel=1e-5), path.stem
        assert norms == pytest.approx(expected[1], rel=1e-4), path.stem
        assert worst(grown, expected[3]) < 5e-5, path.stem
        assert afterwards < losses[0], path.stem
