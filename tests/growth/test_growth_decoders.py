"""Growth of the decoders with other norms and factors than Llama's, against transformers' own models."""

from __future__ import annotations

import pytest

from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth.methods import METHODS
from megatron_ligo.growth.validation import build_initial_operator
from tests import decoder_models, layer_norm_models
from tests.tiny_models import tokens

RAGGED = LargeSection(**decoder_models.RAGGED)
LOSSLESS = sorted(name for name, method in METHODS.items() if method.is_lossless)


def gap(family: str, large: LargeSection, settings: OperatorSection, **changes) -> float:
    """Largest difference of the logits, relative to their scale, in fp64 but for the norms."""
    small = decoder_models.config_of(family, **{"norm_eps": 1e-6, **changes})
    source = layer_norm_models.memory_of(layer_norm_models.model_of(small).double(), small)
    grown = GrownReader(build_initial_operator(small, large, settings), source)
    ids = tokens(small)
    before, after = layer_norm_models.outputs(source, ids), layer_norm_models.outputs(grown, ids)
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("method", LOSSLESS)
@pytest.mark.parametrize("family", decoder_models.OWN)
def test_methods_called_lossless_are_at_ragged_sizes(family, method, tied):
    assert gap(family, RAGGED, OperatorSection(method=method), tied=tied) < 1e-5


@pytest.mark.parametrize("family", decoder_models.OWN)
def test_noise_is_invisible(family):
    assert gap(family, RAGGED, OperatorSection(noise=0.5)) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("method", sorted(set(METHODS) - set(LOSSLESS)))
@pytest.mark.parametrize("family", decoder_models.OWN)
def test_every_method_grows_every_parameter(family, method):
    small = decoder_models.config_of(family)
    source = layer_norm_models.memory_of(layer_norm_models.model_of(small), small)
    # Its dense depth maps would mix layers of different kinds, which is refused.
    depth = {"depth_init": "stack"} if method == "ligo" and small.window_layers else {}
    grown = GrownReader(build_initial_operator(small, RAGGED, OperatorSection(method=method, **depth)), source)
    assert all(grown.read(key).isfinite().all() for key in grown.keys())  # noqa: SIM118
    assert layer_norm_models.outputs(grown, tokens(small)).isfinite().all()
