"""The count from shapes against PyTorch's own counter on a real model, and on a real fit step."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ligo.arch.flops import forward_flops, train_flops
from megatron_ligo.distributed import mesh as meshes
from megatron_ligo.export.mixture_reader import as_mixture_reader
from megatron_ligo.models.factored.context import FactoredContext
from megatron_ligo.models.factored.factored_model import FactoredModel
from megatron_ligo.models.factored.fit_flops import fit_step_flops
from megatron_ligo.models.factored.small_weights import SmallWeights
from megatron_ligo.planning.parameter_count import count_active, count_model
from tests import decoder_models, image_models
from tests.layer_norm_models import model_of
from tests.models.factored.fit_reference import lag_of, make_operator
from tests.tiny_models import hf_llama, llama_config, memory_of, tokens

CASES = [
    {},
    {"tied": True, "num_layers": 5, "num_kv_heads": 6},
    {"hidden_size": 96, "num_heads": 8, "num_kv_heads": 2, "head_dim": 16, "ffn_size": 200, "vocab_size": 501},
]


@pytest.mark.parametrize("changes", CASES)
def test_count_equals_torch(changes):
    model_config = llama_config(**changes)
    model = hf_llama(model_config)
    ids = tokens(model_config, batch=3, length=32)
    # PyTorch does not count the products inside its fused kernel on a CPU.
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as forward:
        loss = model(ids).logits.square().mean()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward_flops(model_config, ids.numel(), 32) == pytest.approx(forward.get_total_flops(), rel=0.02)
    total = forward.get_total_flops() + backward.get_total_flops()
    assert train_flops(model_config, ids.numel(), 32) == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("family", decoder_models.OWN)
def test_count_of_other_decoders_equals_torch(family):
    model_config = decoder_models.config_of(family)
    model = model_of(model_config)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(tokens(model_config, batch=3, length=32))
    assert forward_flops(model_config, 96, 32) == pytest.approx(forward.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("sizes", [{"num_experts": 5, "top_k": 2}, {"num_experts": 9, "top_k": 3, "ffn_size": 12}])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_count_of_experts_equals_torch(family, sizes):
    """A token passes top_k of the experts, the shared one and the router; the others hold parameters only."""
    shared = {"shared_expert_ffn_size": 20, "qkv_bias": True} if family == "qwen2_moe" else {}
    model_config = llama_config(arch=family, model_type=family, renormalises_routing=True, **sizes, **shared)
    model = model_of(model_config)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(tokens(model_config, batch=3, length=32))
    assert forward_flops(model_config, 96, 32) == pytest.approx(forward.get_total_flops(), rel=0.02)
    assert count_model(model_config) == sum(parameter.numel() for parameter in model.parameters())
    idle = (sizes["num_experts"] - sizes["top_k"]) * 3 * model_config.hidden_size * model_config.ffn_size
    assert count_model(model_config) - count_active(model_config) == model_config.num_layers * idle


@pytest.mark.parametrize("family", ["deit", "dinov2 with a gate", "dinov2_with_registers"])
def test_count_of_a_classifier_equals_torch(family):
    """Its embedding is a product for each patch, its head one for each image."""
    model_config = image_models.image_config(family, image_size=18)
    model = model_of(model_config)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as forward:
        model(image_models.pictures(model_config, batch=3))
    tokens_seen = 3 * model_config.tokens_per_image
    assert forward_flops(model_config, tokens_seen, model_config.tokens_per_image) == forward.get_total_flops()


def test_scales_with_tokens_and_sequence():
    model_config = llama_config()
    assert train_flops(model_config, 2048, 64) == 2 * train_flops(model_config, 1024, 64)
    assert train_flops(model_config, 1024, 128) > train_flops(model_config, 1024, 64)


SMALL = {"hidden_size": 48, "num_heads": 8, "num_kv_heads": 4, "head_dim": 8, "ffn_size": 80, "num_layers": 2}
LARGE = {"hidden_size": 96, "num_heads": 16, "num_kv_heads": 8, "ffn_size": 240, "num_layers": 3}


def fit_flops(settings: dict, samples: int, lagged: bool = False, more: dict | None = None) -> dict[str, int]:
    """A fit step's FLOPs by our count and by torch's, which leaves out the fused attention."""
    small, length = llama_config(**SMALL), 32
    operator = make_operator(small, {**LARGE, **(more or {})}, settings)
    mesh = meshes.build_mesh(1, 1)
    reader = memory_of(hf_llama(small), small)
    reader = as_mixture_reader(reader) if operator.large.num_experts else reader
    lag = lag_of(operator).__getitem__ if lagged else None
    source, at_once = SmallWeights(operator, reader, mesh, 1), samples * length
    model = FactoredModel(FactoredContext(operator, source, mesh, torch.float32, tokens_per_step=at_once, lag=lag))
    ids = tokens(small, batch=samples, length=length)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids, torch.ones(ids.shape)).backward()
    large = operator.large
    attention = 3 * 2 * 2 * ids.numel() * length * large.num_heads * large.head_dim * large.num_layers
    counted = fit_step_flops(operator, ids.numel(), length, lagged=lagged)
    return {"by_torch": counter.get_total_flops() + attention, "counted": counted}


OPERATORS = {
    "default": ({}, 64),
    "products built": ({}, 1),
    "official": ({"method": "ligo"}, 64),
    "low rank": ({"rank": 5}, 64),
    "low rank from a dense start": ({"rank": 5, "width_init": "random"}, 64),
    # Fused weights are built, however few the tokens.
    "dense heads, few tokens": ({"method": "ligo"}, 1),
    "corner": ({"method": "corner"}, 64),
    "corner, products built": ({"method": "corner"}, 1),
    "larger heads": ({}, 8, {"head_dim": 12}),
    "experts": ({}, 64, {"num_experts": 4, "top_k": 2}),
    "experts in halves": ({}, 64, {"num_experts": 6, "top_k": 2, "ffn_size": 40}),
    "larger heads, low rank": ({"rank": 4}, 8, {"head_dim": 12}),
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_count_of_a_fit_step_equals_torch(pools, kind):
    settings, samples, *more = OPERATORS[kind]
    result = pools(1).run(fit_flops, settings=settings, samples=samples, more=more[0] if more else {})
    assert result["counted"] == pytest.approx(result["by_torch"], rel=0.02)


def test_count_of_a_lag_equals_torch(pools):
    more = pools(1).run(fit_flops, settings={}, samples=8, lagged=True)
    less = pools(1).run(fit_flops, settings={}, samples=8)
    assert more["counted"] - less["counted"] == pytest.approx(more["by_torch"] - less["by_torch"], rel=0.02)
    assert more["counted"] > 1.3 * less["counted"]
