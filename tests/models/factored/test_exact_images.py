"""The sharded fit of image classifiers against plain torch."""

from __future__ import annotations

import pytest

from tests.models.factored.test_exactness import CORNER, assert_exact, differences

# The small image has ten tokens, the large one twenty-six.
IMAGES = {
    "small": {"arch": "vit", "hidden_size": 32, "num_kv_heads": 8, "vocab_size": 5},
    "large": {"hidden_size": 64, "num_kv_heads": 16, "image_size": 15, "vocab_size": 7},
    "settings": {"noise": 0.5},
}


# With scales, two halves of the head and (the second) tokens without positions.
DINO = {
    **IMAGES,
    "small": {**IMAGES["small"], "arch": "dinov2", "ffn_size": 64},
    "large": {**IMAGES["large"], "ffn_size": 128},
}
REGISTERS = {
    **IMAGES,
    "small": {**DINO["small"], "arch": "dinov2_with_registers", "image_size": 7},
    "large": {**DINO["large"], "image_size": 13},
}
IMAGE_LAYOUTS = [
    (IMAGES, {"pp": 2, "sequence_parallel": True}),
    (IMAGES, {"zero": 2}),
    (DINO, {"pp": 2, "sequence_parallel": True}),
    pytest.param(REGISTERS, {"zero": 3, "recompute": True}, marks=pytest.mark.long),
    pytest.param({**REGISTERS, **CORNER}, {"pp": 2, "sequence_parallel": True}, marks=pytest.mark.long),
    pytest.param({**DINO, "settings": {"method": "ligo"}}, {"pp": 2}, marks=pytest.mark.long),
]


@pytest.mark.parametrize("changes, layout", IMAGE_LAYOUTS, ids=str)
def test_classifiers_are_exact_when_sharded(pools, changes, layout):
    assert_exact(differences(pools, 4, "sgd", changes, tp=2, micro_size=4, **layout))
