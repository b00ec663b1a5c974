"""Every pair in launch_scripts/pairs: planned at its true sizes, fitted on two ranks at reduced ones."""

from __future__ import annotations

import runpy

import pytest

from tests import pairs
from tests.model import cases, reference
from tests.model.test_exactness import worst

GROWTH = pairs.ROOT / "tools/benchmarks/growth"


def test_the_table_is_what_is_planned():
    table = (GROWTH / "pairs.md").read_text()
    lines = list(runpy.run_path(str(GROWTH / "pairs.py"))["lines"]())
    assert len(lines) == len(list((pairs.ROOT / "launch_scripts/pairs").glob("*.toml"))) == 9
    assert [line for line in lines if line not in table] == []


def test_each_is_fitted_at_a_reduced_size_as_in_one_process(pools):
    found = pools(2).run(pairs.fitted)
    for path, (losses, norms, _, grown, afterwards) in zip(pairs.PAIRS, found, strict=True):
        pair = pairs.reduced(path)
        small = cases.small_dims(pair["small"])
        operator = reference.make_operator(small, pair["large"], pair["settings"])
        batches = cases.batches(operator.large, pairs.STEPS)
        wanted = reference.run(small, pair["large"], pair["settings"], batches, "sgd", pairs.LR, 0.05)
        assert losses == pytest.approx(wanted[0], rel=1e-5), path.stem
        assert norms == pytest.approx(wanted[1], rel=1e-4), path.stem
        assert worst(grown, wanted[3]) < 5e-5, path.stem
        assert afterwards < losses[0], path.stem
