"""The fit in bf16: weights and activations are rounded, so runs at different layouts agree to that rounding only."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.models.factored import fit_cases
from tests.models.factored.test_exact_images import IMAGES
from tests.models.factored.test_exactness import expected, plain_loss, rates, worst

LAYOUTS = {
    "DP2 ZeRO 1": (2, {"zero": 1}),
    "DP2 ZeRO 3": (2, {"zero": 3}),
    "TP2": (2, {"tp": 2}),
    "TP2 x PP2": (4, {"tp": 2, "pp": 2}),
    "TP2 x PP2 + SP": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
}


@pytest.fixture(scope="module")
def alone(pools):
    """One process in bf16: its losses are those of fp32 but for the rounding, which shows."""
    result = pools(1).run(fit_cases.fit, precision="bf16", micro_size=2)
    assert relative(result[0], expected("adamw")[0]) < 1e-2
    assert relative(result[0], expected("adamw")[0]) > 1e-6, "computed in fp32"
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_one_process_to_the_rounding(pools, alone, layout):
    world, arguments = LAYOUTS[layout]
    losses, norms, operator, weights, afterwards = pools(world).run(
        fit_cases.fit, precision="bf16", micro_size=2, **arguments
    )
    assert all(map(math.isfinite, losses + norms))
    assert all(tensor.dtype is torch.float32 for name, tensor in operator.items() if name != "gain.source")
    assert relative(losses, alone[0]) < 2e-3
    assert relative(norms, alone[1]) < 5e-2
    assert worst(weights, alone[3]) < 2e-2
    # The evaluation is in fp32 and knows no layout: it is the grown weights' own loss.
    assert afterwards == pytest.approx(plain_loss(weights, {}), rel=1e-5)


def test_images_agree_with_fp32_to_the_rounding(pools):
    lr, clip = rates("sgd", IMAGES)
    layout = {"tp": 2, "zero": 2, "micro_size": 4}
    losses, _, _, weights, afterwards = pools(4).run(
        fit_cases.fit, precision="bf16", optimizer="sgd", lr=lr, clip=clip, **IMAGES, **layout
    )
    wanted = expected("sgd", json.dumps(IMAGES))
    assert 1e-6 < relative(losses, wanted[0]) < 1e-2
    assert worst(weights, wanted[3]) < 2e-2
    assert afterwards == pytest.approx(plain_loss(weights, IMAGES), rel=1e-5)


def relative(mine: list[float], theirs: list[float]) -> float:
    return max(abs(f - w) / abs(w) for f, w in zip(mine, theirs, strict=True))
