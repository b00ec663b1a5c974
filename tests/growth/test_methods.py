"""The named methods: those that promise the small model's logits keep them, the others do what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_ligo.common.errors import ConfigError, ErrorCollector
from megatron_ligo.config.run_config import LargeSection, OperatorSection, RunConfig
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth import initializers
from megatron_ligo.growth.methods import METHODS, describe_method, resolve_settings
from megatron_ligo.growth.validation import build_initial_operator, check_factored
from megatron_ligo.growth.width_maps import left_inverse, remove_visible
from tests.growth.logit_gap import RAGGED, logits_gap
from tests.tiny_models import hf_llama, llama_config, memory_of

LOSSLESS = [name for name, method in METHODS.items() if method.is_lossless]


def grown(method: str, large: LargeSection = RAGGED, **keys) -> GrownReader:
    small = llama_config()
    settings = OperatorSection(method=method, **keys)
    return GrownReader(build_initial_operator(small, large, settings), memory_of(hf_llama(small), small))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("large", [RAGGED, replace(RAGGED, hidden_size=48, num_heads=12, num_kv_heads=6)])
@pytest.mark.parametrize("method", LOSSLESS)
def test_methods_called_lossless_are(method, large, tied):
    assert logits_gap(llama_config(tied=tied), large, OperatorSection(method=method)) < 5e-6


@pytest.mark.parametrize("method", sorted(set(METHODS) - {*LOSSLESS, "corner_quiet"}))
def test_other_methods_are_not_lossless(method):
    """The control: a gap is seen where none is promised."""
    assert logits_gap(llama_config(), RAGGED, OperatorSection(method=method)) > 1e-3


def test_noisy_stack_is_exact_but_for_its_layers():
    deeper = OperatorSection(method="noisy_stack")
    wider = replace(RAGGED, num_layers=None)
    assert logits_gap(llama_config(tied=True), wider, deeper) < 5e-6
    # ... and its copies are no copies to training: they are read differently.
    down = grown("noisy_stack").read("layers.0.down")
    assert float((down[:, 28:] - down[:, :16]).abs().mean()) > 0.3 * float(down.abs().mean())


def test_noise_is_drawn_for_each_map_or_for_each_weight():
    """Structure and strength apart: 0.5 of the maps is 0.2 to 0.5 of the weights, of the weights it is half."""
    wider = replace(RAGGED, hidden_size=48, num_heads=12, num_kv_heads=6, num_layers=None)
    clean = grown("stack", wider)
    for draw, low, high in (("map", 0.2, 0.5), ("weight", 0.499, 0.501)):
        settings = {"noise": 0.5, "noise_draw": draw}
        assert logits_gap(llama_config(tied=True), wider, OperatorSection(method="stack", **settings)) < 2e-5
        noisy = grown("stack", wider, **settings)
        for key in ("layers.0.up", "layers.2.q", "layers.1.o"):
            noise = noisy.read(key) - clean.read(key)
            share = float(noise.square().mean().sqrt() / clean.read(key).square().mean().sqrt())
            assert low < share < high, (draw, key, share)
        noise = noisy.read("layers.0.up") - clean.read("layers.0.up")
        # Copies of a neuron get one noise from the map, and each its own from the weight.
        assert torch.allclose(noise[:16], noise[28:], atol=1e-6) == (draw == "map")
    again = grown("stack", wider, noise=0.5, noise_draw="weight").read("layers.0.up")
    assert torch.equal(again, grown("stack", wider, noise=0.5, noise_draw="weight").read("layers.0.up"))


def test_hypercloning_equals_the_publication_at_whole_multiples():
    double = LargeSection(hidden_size=48, ffn_size=56, num_heads=12, num_kv_heads=6)
    big, small = grown("hypercloning", double), memory_of(hf_llama(llama_config()), llama_config())
    for key in ("layers.0.up", "layers.2.k", "layers.1.o", "layers.1.down", "layers.0.q"):
        assert torch.allclose(big.read(key), small.read(key).repeat(2, 2) / 2), key
    assert torch.equal(big.read("embed"), small.read("embed").repeat(1, 2))
    assert torch.equal(big.read("layers.1.norm1"), small.read("layers.1.norm1").repeat(2))
    noisy = grown("hypercloning_noisy", double).read("layers.0.up") - big.read("layers.0.up")
    assert torch.allclose(noisy[:, :24], -noisy[:, 24:], atol=1e-6)
    share = float(noisy.std() / big.read("layers.0.up").std())
    assert 0.15 < share < 0.4  # 10 dB below, less what the projection takes


def test_aki_takes_new_rows_from_the_next_layer():
    large = LargeSection(ffn_size=40)
    fpi, aki = grown("fpi", large), grown("aki", large)
    for layer, following in ((0, 1), (1, 2), (2, 2)):
        up = aki.read(f"layers.{layer}.up")
        assert torch.equal(up[:28], fpi.read(f"layers.{layer}.up")[:28])
        assert torch.equal(up[28:], fpi.read(f"layers.{following}.up")[28:])
    assert torch.equal(aki.read("layers.0.norm1"), fpi.read("layers.0.norm1"))


def test_random_rows_are_unread():
    big, small = grown("lemon"), memory_of(hf_llama(llama_config()), llama_config())
    origins = [0, 0, 1, 1, 2]
    for layer, origin in enumerate(origins):
        new_layer = layer in (1, 3)
        up, down, o = (big.read(f"layers.{layer}.{row}") for row in ("up", "down", "o"))
        assert not down[:, 28:].any() and not o[:, 24:].any()
        assert bool(down.any()) != new_layer and bool(o.any()) != new_layer
        before = small.read(f"layers.{origin}.up")
        assert (float((up[:28, 8:24] - before[:, 8:]).abs().max()) < 1e-6) != new_layer
        assert float(up[28:].std()) == pytest.approx(float(up[:28].std()), rel=0.3)
        assert torch.linalg.matrix_rank(up[28:]) == 16


def test_direct_copy_holds_the_small_model_as_a_block():
    big, small = grown("direct_copy"), memory_of(hf_llama(llama_config()), llama_config())
    for key, origin in (("layers.4.down", "layers.1.down"), ("layers.0.k", "layers.0.k"), ("embed", "embed")):
        before, after = small.read(origin), big.read(key)
        assert torch.equal(after[: before.shape[0], : before.shape[1]], before)
        assert float(after[:, before.shape[1] :].std()) == pytest.approx(float(before.std()), rel=0.2)
    assert torch.equal(big.read("layers.0.down"), grown("direct_copy").read("layers.0.down"))
    assert not torch.equal(big.read("layers.0.down"), grown("direct_copy", seed=1).read("layers.0.down"))


def test_the_published_operator_sets_every_key():
    operator = grown("ligo").operator
    assert (operator.space_maps.structure, operator.copied_gains, operator.has_contract("ffn")) == (
        "dense",
        False,
        False,
    )
    depth = operator.tensor("depth.q")
    assert torch.allclose(depth.sum(dim=1), torch.ones(5)) and float(depth.min()) > 0
    assert not torch.equal(depth, operator.tensor("depth.k"))
    assert "width.ffn.4.expand" in operator.shapes()


def test_user_keys_take_precedence_over_the_method():
    settings = resolve_settings(
        RunConfig.load(None, ["operator.method=noisy_stack", "operator.noise=0.25"]).operator, llama_config()
    )
    assert (settings.depth_init, settings.noise, settings.width_init) == ("stack", 0.25, "lossless")
    assert resolve_settings(settings, llama_config()) == settings
    text = describe_method(settings, llama_config(), llama_config())
    assert "noise=0.25 (your own)" in text and "depth_init='stack'," in text
    with pytest.raises(ConfigError) as error:
        resolve_settings(OperatorSection(method="noisystack"), llama_config())
    assert "'noisy_stack'" in str(error.value)


OWN_KEYS = {
    "none": ({}, True),
    "restated": ({"depth_init": "lossless"}, True),
    "harmless ones": ({"noise": 0.5, "share": {"default": "layer", "residual": "all"}, "rank": 2}, True),
    "depth": ({"depth_init": "stack"}, False),
    "readers": ({"method": "hypercloning", "contract": "tied"}, False),
    "merged heads": ({"width_init": {"default": "lossless", "groups": "mean"}}, False),
}


@pytest.mark.parametrize("case", OWN_KEYS)
def test_only_lossless_starts_are_called_lossless(case):
    keys, is_lossless = OWN_KEYS[case]
    large = replace(RAGGED, hidden_size=36, num_heads=12, num_kv_heads=1 if case == "merged heads" else 6)
    settings = OperatorSection(**keys)
    operator = build_initial_operator(llama_config(), large, settings)
    text = describe_method(operator.settings, operator.small, operator.large)
    assert ("starts with the small model's logits" in text) == is_lossless
    assert ("not guaranteed to be lossless" in text) != is_lossless
    gap = logits_gap(llama_config(), large, settings)
    assert gap < 5e-6 if is_lossless else gap > 1e-3


def test_contradicting_settings_are_refused():
    for keys, where in (
        ({"method": "lossless", "width_init": "pad"}, "operator.width_init (ffn) = 'pad'"),
        ({"method": "lemon", "width_init": "pad"}, "operator.width_init (residual) = 'pad'"),
        ({"method": "lemon", "noise": 0.5}, "operator.noise (ffn)"),
        ({"method": "net2net", "identity": "frozen"}, "operator.identity (residual)"),
    ):
        with pytest.raises(ConfigError) as error:
            build_initial_operator(llama_config(), RAGGED, OperatorSection(**keys))
        assert where in [problem.where for problem in error.value.problems]
    for method in METHODS:
        errors = ErrorCollector("fit", ConfigError)
        check_factored(resolve_settings(OperatorSection(method=method), llama_config()), errors)
        assert bool(errors.problems) == (method in ("direct_copy", "random", "aki"))


def test_copying_starts_have_left_inverses():
    for method in ("lossless", "net2net", "fpi", "hypercloning", "lemon"):
        operator = grown(method).operator
        for name in operator.maps:
            expand = operator.initial_expand(name)
            identity = torch.eye(expand.shape[1], dtype=expand.dtype)
            assert torch.allclose(left_inverse(expand) @ expand, identity, atol=1e-12)


@pytest.mark.parametrize("start", ["lossless", "select", "pad", "random"])
def test_noise_that_copies_cancel_is_the_projection(start):
    """By index, for maps without sums, as by products."""
    generator = torch.Generator().manual_seed(3)
    expand = initializers.WIDTH_INITS[start](600, 1300, "rms", generator)
    contract, drawn = left_inverse(expand), torch.randn(600, 1300, generator=generator, dtype=torch.float64)
    expected = drawn - (drawn @ expand) @ contract
    invisible = remove_visible(drawn.clone(), expand, contract)
    assert torch.allclose(invisible, expected, rtol=0, atol=1e-12)
    assert float((invisible @ expand).abs().max()) < 1e-9 < float(drawn.abs().max())
