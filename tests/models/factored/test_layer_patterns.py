"""The sharded fit of models whose layers, files or positions differ from Llama's, against plain torch."""

from __future__ import annotations

import pytest

from tests import layer_pattern_models
from tests.models.factored.test_exactness import assert_exact, differences

PATTERN_GROWTH = {
    "starcoder2": {"hidden_size": 64},
    "stablelm": {"hidden_size": 64},
    "cohere": {"hidden_size": 64},
    "cohere with biases": {"hidden_size": 64},
    "cohere2": {"hidden_size": 64},
    "nemotron": {"hidden_size": 64},
    "phi": {"hidden_size": 64},
    "falcon": {"hidden_size": 64, "num_heads": 16, "num_kv_heads": 8},
    "falcon with two norms": {"hidden_size": 64, "num_heads": 16, "num_kv_heads": 8},
    "phi3": {"hidden_size": 64},
    "modernbert": {"hidden_size": 64, "num_heads": 16, "num_kv_heads": 16},
    "modernbert with biases": {"hidden_size": 64, "num_heads": 16, "num_kv_heads": 16},
    "opt": {"hidden_size": 64, "num_heads": 16, "num_kv_heads": 16, "max_positions": 80},
}
PATTERN_LAYOUTS = [
    (4, {"tp": 2, "pp": 2, "sequence_parallel": True, "micro_size": 2}),
    (4, {"tp": 2, "zero": 3, "micro_size": 2, "recompute": True}),
]
OFTEN = ("smollm3 with windows", "opt", "modernbert")
PATTERN_CASES = [
    pytest.param(
        case,
        *layout,
        marks=() if case in ("smollm3 with windows", "opt", "modernbert") and not at else pytest.mark.long,
    )
    for case in layer_pattern_models.OWN
    for at, layout in enumerate(PATTERN_LAYOUTS)
]


def pattern_changes(case: str) -> dict:
    """A tied model whose layers differ, and its growth."""
    small = {"arch": case, "tied": True, "hidden_size": 32, "num_layers": 3}
    return {"small": small, "large": PATTERN_GROWTH.get(case, {"hidden_size": 48}), "settings": {"noise": 0.5}}


@pytest.mark.parametrize("case, world, layout", PATTERN_CASES, ids=str)
def test_layers_that_differ_are_exact_when_sharded(pools, case, world, layout):
    """No layer learns from one of another kind: the reference masks its depth maps."""
    assert_exact(differences(pools, world, "sgd", pattern_changes(case), **layout))
