"""Context-parallel ranks share each sequence: fits and pretraining give the numbers of one plain process."""

from __future__ import annotations

import pytest

from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import ParallelSection
from megatron_ligo.models import loss as losses
from megatron_ligo.sharding.tensor_parallel import exchanged_kv_heads
from megatron_ligo.training.initial_weights import check_layout
from tests import image_models
from tests.models.factored import fit_cases
from tests.models.factored.test_exactness import BERT, GPT2, assert_exact, differences
from tests.models.factored.test_layer_patterns import pattern_changes
from tests.models.full import pretrain_cases
from tests.models.full.test_pretrained import made
from tests.tiny_models import llama_config

# Twelve tokens and heads for three ranks, six key-value heads for four.
ODD = {"large": {"num_heads": 12, "num_kv_heads": 6, "hidden_size": 48}}
SP = {"tp": 2, "sequence_parallel": True}
FITS = {
    "TP 2, ZeRO 3": ({}, 4, {**SP, "cp": 2, "zero": 3}),
    "PP 2": ({}, 4, {"pp": 2, "cp": 2}),
    "three ranks": (ODD, 3, {"cp": 3, "zero": 2, "micro_size": 4}),
    "learned positions": (GPT2, 4, {**SP, "cp": 2, "micro_size": 4}),
    "alone, recomputed": ({}, 2, {"cp": 2, "recompute": True}),
    "repeated key-value heads": (ODD, 4, {"cp": 4, "micro_size": 4}),
    "DP 2, ZeRO 3": ({}, 4, {"cp": 2, "zero": 3}),
    "encoder": (BERT, 4, {**SP, "cp": 2, "micro_size": 4}),
    "lag": ({"lagged": True}, 2, {"cp": 2}),
    "windows": (pattern_changes("smollm3 with windows"), 4, {"tp": 2, "cp": 2}),
    "scaled queries": (pattern_changes("ministral3"), 2, {"cp": 2}),
    "sinks": (pattern_changes("granite_swa"), 2, {"cp": 2}),
    "softcap": (pattern_changes("gemma2"), 2, {"cp": 2}),
    "chunks": (pattern_changes("llama4_text"), 4, {"tp": 2, "cp": 2}),
}
FITS_OFTEN = ("TP 2, ZeRO 3", "PP 2", "three ranks")


def mark(name: str, often: tuple[str, ...]):
    return pytest.param(name, marks=() if name in often else pytest.mark.long)


@pytest.mark.parametrize("name", [mark(name, FITS_OFTEN) for name in FITS])
def test_fits_are_exact(pools, name):
    changes, world, layout = FITS[name]
    assert_exact(differences(pools, world, "sgd", changes, **layout))


@pytest.mark.long
def test_fits_are_exact_under_adamw(pools):
    assert_exact(differences(pools, 4, "adamw", tp=2, cp=2))


RUNS = {
    "DP 2, ZeRO 3": ("llama", 4, {"cp": 2, "zero": 3, "recompute": True}),
    "PP 2, windows": ("smollm3 with windows", 4, {"cp": 2, "pp": 2, "optimizer": "sgd"}),
    "TP 2, encoder": ("bert", 4, {**SP, "cp": 2, "micro_size": 4, "optimizer": "sgd"}),
    "sinks": ("granite_swa", 4, {**SP, "cp": 2, "optimizer": "sgd"}),
    "chunks": ("llama4_text", 4, {**SP, "cp": 2, "optimizer": "sgd"}),
    "alone": ("llama", 2, {"cp": 2, "zero": 1}),
    "four ranks, repeated key-value heads": ("llama", 4, {"cp": 4, "zero": 2, "tp": 1}),
    "learned positions": ("gpt2", 4, {**SP, "cp": 2, "zero": 3}),
    "heads that are normalised": ("olmo2", 4, {**SP, "cp": 2, "optimizer": "sgd"}),
}
RUNS_OFTEN = ("PP 2, windows", "TP 2, encoder")


@pytest.mark.parametrize("name", [mark(name, RUNS_OFTEN) for name in RUNS])
def test_pretraining_is_exact(pools, tmp_path, name):
    family, world, layout = RUNS[name]
    expected = pretrain_cases.reference(True, layout.get("optimizer", "adamw"), family)
    folder = made(tmp_path, True, family)
    result = pools(world).run(pretrain_cases.train, folder=folder, tied=True, family=family, **layout)
    assert result["evaluated"] == pytest.approx(expected[0][0], rel=1e-6)
    for step, wanted in zip(result["steps"], expected, strict=True):
        assert step == pytest.approx(wanted, rel=2e-5)


def fit_with_averaged_parts(**arguments):
    losses._SumParts.backward = staticmethod(lambda ctx, grad: (grad, None))
    return fit_cases.fit(**arguments)


def test_parts_that_are_averaged_are_seen(pools):
    """Clipped, a gradient of another scale would look right."""
    layout = {"optimizer": "sgd", "lr": 0.5, "clip": 0.0, "steps": 2}
    (right, wrong) = (pools(2).run(case, cp=2, **layout) for case in (fit_cases.fit, fit_with_averaged_parts))
    assert right[0][0] == pytest.approx(wrong[0][0], rel=1e-6)
    assert right[1][0] == pytest.approx(2 * wrong[1][0], rel=1e-5)
    assert abs(right[0][1] - wrong[0][1]) > 1e-4


@pytest.mark.parametrize(
    "heads, groups, ranks, exchanged",
    [(8, 4, 2, 4), (8, 2, 4, 4), (12, 6, 4, 12), (6, 2, 3, 6), (24, 2, 8, 8), (12, 4, 6, 12), (5, 1, 5, 5)],
)
def test_key_value_heads_are_repeated_no_more_than_needed(heads, groups, ranks, exchanged):
    assert exchanged_kv_heads(heads, groups, ranks) == exchanged


EIGHT_HEADS = llama_config(num_heads=8, num_kv_heads=4)
REFUSED = {
    "heads": (llama_config(num_heads=6, num_kv_heads=2), {"tp": 2, "cp": 2}, 12, "num_heads: expected a multiple of"),
    "tokens": (
        llama_config(num_heads=8, num_kv_heads=4),
        {"cp": 4},
        14,
        "data.seq_length: expected a multiple of cp = 4",
    ),
    "tokens of shards": (EIGHT_HEADS, {**SP, "cp": 2}, 14, "a multiple of tp x cp = 4"),
    "images": (image_models.image_config("vit"), {"cp": 2}, 10, "cp: expected 1 for a model of images"),
    "experts": (llama_config(arch="mixtral", model_type="mixtral", num_experts=4, top_k=2), {"cp": 2}, 12, "4 experts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_ranks_cannot_share_is_refused(name):
    model_config, layout, length, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        check_layout(model_config, ParallelSection(**layout), length)
