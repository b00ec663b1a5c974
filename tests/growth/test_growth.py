"""The mathematics of growth against real Hugging Face models, in one process."""

from __future__ import annotations

import pytest
import torch

from megatron_ligo.arch import get
from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.growth.width_maps import SpaceMaps, apply_map, left_inverse
from tests.growth.logit_gap import RAGGED, logits_gap
from tests.tiny_models import hf_from, hf_llama, llama_config, memory_of, tokens

DOUBLE = LargeSection(num_layers=6, hidden_size=48, ffn_size=56, num_heads=12, num_kv_heads=6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("large", [RAGGED, DOUBLE, LargeSection(), LargeSection(num_layers=7)])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_lossless_start_keeps_the_logits(tied, large, noise):
    settings = OperatorSection(noise=noise)
    assert logits_gap(llama_config(tied=tied), large, settings) < 5e-6  # fp32 norms, at logits of size 5


def test_an_uncorrected_eps_is_detected():
    """Negative control: without the correction of eps the ragged lossless start is off."""
    small = llama_config()
    operator = build_initial_operator(small, RAGGED, OperatorSection())
    assert operator.large.norm_eps == pytest.approx(small.norm_eps * 24 / 32)
    model = hf_llama(small).double()
    grown = GrownReader(operator, memory_of(model, small))
    broken = hf_from(grown)
    for module in broken.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = small.norm_eps
    ids = tokens(small)
    with torch.no_grad():
        assert float((model(ids).logits - broken(ids).logits).abs().max()) > 1e-3


@pytest.mark.parametrize("depth", ["stack", "interlace", "copy"])
def test_named_depths_place_layers(depth):
    small = llama_config()
    source = memory_of(hf_llama(small), small)
    operator = build_initial_operator(small, LargeSection(num_layers=5), OperatorSection(depth_init=depth))
    grown = GrownReader(operator, source)
    expected = {"stack": [0, 1, 2, 0, 1], "interlace": [0, 0, 1, 1, 2], "copy": [0, 1, 2, 2, 2]}[depth]
    for layer, origin in enumerate(expected):
        for row in ("q", "down", "norm1"):
            assert torch.equal(grown.read(f"layers.{layer}.{row}"), source.read(f"layers.{origin}.{row}"))


def test_query_heads_stay_with_their_group():
    """New KV group 3 copies group 0 with both its query heads, rotary pairs whole."""
    small = llama_config()
    source = memory_of(hf_llama(small), small)
    section = LargeSection(num_heads=8, num_kv_heads=4)
    grown = GrownReader(build_initial_operator(small, section, OperatorSection()), source)
    assert torch.equal(grown.read("layers.0.q")[24:], source.read("layers.0.q")[:8])
    assert torch.equal(grown.read("layers.0.k")[12:], source.read("layers.0.k")[:4])


def test_the_pseudo_inverse_is_one():
    generator = torch.Generator().manual_seed(0)
    for expand in (torch.randn(9, 5, generator=generator, dtype=torch.float64), torch.eye(5).repeat(2, 1)[:8]):
        assert torch.allclose(left_inverse(expand) @ expand, torch.eye(5, dtype=expand.dtype), atol=1e-12)


@pytest.mark.parametrize("structure", ["heads", "dense"])
def test_lifted_maps_are_kronecker_products(structure):
    small, large = llama_config(), llama_config(num_heads=8, num_kv_heads=4)
    axis = get("llama").param("layers.0.o").axes[1]
    lift = SpaceMaps(small, large, structure).lift(axis)
    groups, r, d = small.num_kv_heads, small.heads_per_group, small.head_dim
    x = torch.randn(groups * r * d, 2)
    if structure == "heads":
        matrix = torch.randn(4, 3)
        expected = torch.kron(matrix, torch.eye(r * d)) @ x
    else:
        matrix = torch.randn(4 * d, 3 * d)
        block = torch.einsum("gahb,rs->grahsb", matrix.view(4, d, 3, d), torch.eye(r))
        expected = block.reshape(4 * r * d, 3 * r * d) @ x
    assert torch.allclose(apply_map(x, 0, matrix, lift), expected, atol=1e-5)


def test_every_refusal_is_in_one_error():
    section = LargeSection(num_layers=2, hidden_size=16, ffn_size=20, num_heads=2, num_kv_heads=1)
    with pytest.raises(ConfigError) as error:
        build_initial_operator(llama_config(), section, OperatorSection())
    refused = {problem.where for problem in error.value.problems}
    assert refused >= {f"large.{name}" for name in vars(section) if getattr(section, name) is not None}


def test_unknown_initialisations_suggest_the_nearest():
    with pytest.raises(ConfigError) as error:
        build_initial_operator(llama_config(), RAGGED, OperatorSection(width_init="losless", depth_init="stak"))
    hints = {problem.found: problem.hint for problem in error.value.problems}
    assert "'lossless'" in hints["'losless'"] and "'stack'" in hints["'stak'"]
