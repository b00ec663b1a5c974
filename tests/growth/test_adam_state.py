"""Moments against known answers: the real gradient of the grown model, in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from megatron_ligo.arch.spec import layer_index
from megatron_ligo.checkpoint.reader import MOMENTS
from megatron_ligo.common.errors import CheckpointError
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.export.handoff import build_moments_record
from megatron_ligo.growth.initial_operator import InitialOperator
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.sharding.fused_tensors import stored_tensors
from tests import layer_norm_models
from tests.growth.logit_gap import RAGGED
from tests.tiny_models import Memory, hf_from, hf_llama, hf_name, llama_config, memory_of, tokens


class Exact(InitialOperator):
    """The start of a fit, not rounded to fp32."""

    def tensor(self, name):
        return self.exact_tensor(name)


class Norm(nn.Module):
    """transformers' computes in fp32 whatever it is given."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * (x.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()


@dataclass
class WithMoments(Memory):
    """A checkpoint with the gradient in place of the mean of gradients, and its square in that of the squares."""

    def __init__(self, model_config, tensors, gradients, step=7):
        super().__init__(model_config, tensors)
        self.gradients, self.step = gradients, step

    @property
    def has_moments(self):
        return True

    def read(self, key, kind="weight"):
        if kind == "weight":
            return self.tensors[key]
        return self.gradients[key] if kind == "exp_avg" else self.gradients[key].square()


def gradients(model, model_config):
    """By canonical key: those of a loss that all parameters take part in."""
    result = differentiate(model, model_config)
    arch = memory_of(model, model_config).arch
    return {key: result[hf_name(arch, key)].grad for key in arch.keys(model_config)}


def differentiate(model, model_config):
    """Returns the parameters by name, with their gradients."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "variance_epsilon"):
                setattr(parent, name, Norm(child))
    ids = tokens(model_config)
    logits = model(ids[:, :-1]).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return dict(model.named_parameters())


def grown_pair(small, large, policy="grow", **keys):
    """(the grown reader with moments, the real gradients of the grown model)."""
    model = hf_llama(small).double()
    source = WithMoments(small, memory_of(model, small).tensors, gradients(model, small))
    operator = build_initial_operator(small, large, OperatorSection(**keys))
    operator = Exact(small, operator.large, operator.settings)
    grown = GrownReader(operator, source, policy)
    big = hf_from(grown)
    return grown, gradients(big, grown.model_config)


def worst(grown, real, skip=lambda key: False):
    gaps = {key: float((grown.read(key, "exp_avg") - real[key]).abs().max()) for key in real if not skip(key)}
    return max(gaps.values()), gaps


CASES = {
    "lossless": (RAGGED, {}),
    "cloned": (LargeSection(hidden_size=48, ffn_size=56, num_heads=12, num_kv_heads=6), {"method": "hypercloning"}),
    "random copies": (RAGGED, {"method": "net2net"}),
    "fresh rows": (RAGGED, {"method": "lemon"}),
    "more query heads, larger ones": (LargeSection(num_heads=12, head_dim=8), {}),
    "half as many more": (LargeSection(hidden_size=27, num_heads=9), {}),
}
# Query heads of one small group sit with different copies of it; several layers hold one small one, or parts of it.
ESTIMATES = {
    "split groups": (LargeSection(num_kv_heads=6), {}, (".k", ".v")),
    "split groups, by layer": (
        LargeSection(num_heads=12, num_kv_heads=12),
        {"share": {"default": "layer", "residual": "all"}},
        (".k", ".v"),
    ),
    "stacked": (LargeSection(num_layers=5), {"depth_init": "stack"}, ()),
    "mixed": (LargeSection(num_layers=3), {"depth_init": "stack_noisy"}, ()),
    "one row stacked": (LargeSection(num_layers=5), {"depth_init": {"default": "lossless", "o": "interlace"}}, ()),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_first_moment_is_the_grown_models_gradient(case, tied):
    large, keys = CASES[case]
    grown, real = grown_pair(llama_config(tied=tied), large, **keys)
    layers = {1, 3} if large.num_layers == 5 else set()

    def unknown(key):
        """What new layers, fresh features and new features of k (rotary ones) will write has no answer: it begins at
        zero."""
        new = layer_index(key) in layers and key.endswith((".o", ".down"))
        fresh = case == "fresh rows" and key.endswith((".o", ".down"))
        return new or fresh or (grown.operator.space_maps.head_dim_changed and key.endswith(".k"))

    gap, gaps = worst(grown, real, unknown)
    assert gap < 1e-12, gaps
    for key in filter(unknown, real):
        mine = grown.read(key, "exp_avg")
        known = mine != 0
        assert not known.all()
        assert torch.allclose(mine[known], real[key][known], atol=1e-12), key


def test_moments_of_a_corner_are_the_small_models_and_zero_around_it():
    """What new features will learn is unknown: their moments start at zero."""
    small = llama_config(tied=True)
    grown, _ = grown_pair(small, RAGGED, method="corner_quiet")
    for key in ("embed", "layers.0.q", "layers.2.o", "layers.0.down", "layers.4.up"):
        origin = {"layers.2.o": "layers.1.o", "layers.4.up": "layers.2.up"}.get(key, key)
        for kind in MOMENTS:
            before, after = grown.source.read(origin, kind), grown.read(key, kind)
            assert torch.allclose(after[: len(before), : before.shape[1]], before, atol=1e-12), (key, kind)
            assert torch.count_nonzero(after) == torch.count_nonzero(before)
    gain, before = grown.read("layers.0.norm1", "exp_avg"), grown.source.read("layers.0.norm1", "exp_avg")
    # The gains are smaller by this factor, and what they scale is larger.
    keep = (small.hidden_size / RAGGED.hidden_size) ** 0.5
    assert torch.allclose(gain[: len(before)], before / keep) and not gain[len(before) :].any()


def family_gradients(source):
    """As `gradients`, of a family with LayerNorm."""
    built, ids = layer_norm_models.built(source), layer_norm_models.tokens()
    nn.functional.cross_entropy(built(ids)[0].flatten(0, 1), ids.roll(1, dims=1).flatten()).backward()
    # A parameter that the loss does not meet has no gradient.
    result = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in built.named_parameters()}
    items = stored_tensors(source.arch, source.model_config, "hf").items()
    return {key: item.extract(result[name], key, source.model_config) for name, item in items for key in item.keys}


WIDER = {
    "more heads": LargeSection(hidden_size=48, ffn_size=70, num_heads=12),
    "larger heads": LargeSection(hidden_size=72, head_dim=12),
    "both, at a ragged head size": LargeSection(hidden_size=48, num_heads=8, head_dim=6),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", WIDER)
@pytest.mark.parametrize(("family", "name"), [("gpt2", "GPT2LMHeadModel"), ("bert", "BertForMaskedLM")])
def test_families_with_layer_norm(family, name, case, tied):
    small = layer_norm_models.config_of(family, name, tied=tied)
    source = layer_norm_models.memory_of(layer_norm_models.model(family, name, tied=tied, dtype=torch.float64), small)
    source = WithMoments(small, source.tensors, family_gradients(source))
    operator = build_initial_operator(small, WIDER[case], OperatorSection())
    grown = GrownReader(Exact(small, operator.large, operator.settings), source, "grow")
    gap, gaps = worst(grown, family_gradients(grown))
    assert gap < 1e-12, gaps


@pytest.mark.parametrize("case", ESTIMATES)
def test_estimates_are_inexact_and_reported(case):
    """And is one: it is off, where all that is not named is exact."""
    large, keys, rows = ESTIMATES[case]
    grown, real = grown_pair(llama_config(), large, **keys)
    record = build_moments_record(grown)
    gap, gaps = worst(grown, real, lambda key: not key.endswith(rows or ""))
    assert gap > 1e-3, gaps
    if rows:
        rest, gaps = worst(grown, real, lambda key: key.endswith(rows))
        assert rest < 1e-12, gaps
        assert not record["maps_with_several_entries"]
        assert all("an estimate for k, v" in record[kind] for kind in MOMENTS)
    else:
        assert "depth.q" in record["maps_with_several_entries"]
        assert "exact" not in record["exp_avg_sq"] and "an estimate" in record["exp_avg_sq"]


@pytest.mark.parametrize("case", CASES)
def test_exact_moments_are_reported_as_exact(case):
    large, keys = CASES[case]
    grown, _ = grown_pair(llama_config(), large, **keys)
    record = build_moments_record(grown)
    assert "exact" in record["exp_avg_sq"] and not record["maps_with_several_entries"]
    assert not any("estimate" in record[kind] for kind in MOMENTS)


def test_forward_maps_grow_wrong_gradients():
    """The control: gradients that grow as weights do are off."""
    grown, real = grown_pair(llama_config(), CASES["cloned"][0], method="hypercloning")
    forward = GrownReader(grown.operator, Memory(grown.operator.small, grown.source.gradients)).read("embed")
    assert torch.allclose(forward, 2 * real["embed"], atol=1e-12) and bool(real["embed"].any())


@pytest.mark.parametrize("case", CASES)
def test_the_second_moment_is_the_square_where_rows_have_one_entry(case):
    large, keys = CASES[case]
    grown, _ = grown_pair(llama_config(), large, **keys)
    for key in grown.arch.keys(grown.model_config):
        first, second = (grown.read(key, kind) for kind in MOMENTS)
        assert torch.allclose(second, first.square(), rtol=1e-12, atol=0), key


def test_new_tokens_begin_at_zero():
    grown, _ = grown_pair(llama_config(), LargeSection(vocab_size=41))
    for key in ("embed", "head"):
        moment = grown.read(key, "exp_avg")
        assert torch.equal(moment[:37], grown.source.gradients[key]) and not moment[37:].any()


def test_missing_moments_cannot_grow():
    small = llama_config()
    operator = build_initial_operator(small, RAGGED, OperatorSection())
    source = memory_of(hf_llama(small), small)
    with pytest.raises(CheckpointError) as error:
        GrownReader(operator, source, "grow")
    (problem,) = error.value.problems
    assert "handoff.moments = 'grow'" in problem.expected and problem.found == "none"
    # The files may hold moments in a form that is not read.
    source.unread = ("optimizer state (of an interleaved pipeline)",)
    with pytest.raises(CheckpointError, match=r"found none that is read: optimizer state \(of an interleaved pipeline"):
        GrownReader(operator, source, "grow")
