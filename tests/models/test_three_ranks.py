"""Every family of decoders at TP 3 and odd sizes: the fit and pretraining, against one process."""

from __future__ import annotations

import pytest

from megatron_ligo.arch import get
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.formats.hf.format import HfReader
from tests import decoder_models, layer_pattern_models
from tests.layer_norm_models import model_of
from tests.models.factored.test_exactness import assert_exact, differences
from tests.models.full import pretrain_cases

# Norms over all heads and of each head, whose parts meet three ranks.
DAILY = ("olmo2", "gemma3")
OWN = (*decoder_models.OWN, *layer_pattern_models.OWN, *pretrain_cases.VARIANTS)
FAMILIES = [
    pytest.param(family, marks=() if family in DAILY else pytest.mark.long)
    for family in (
        "llama",
        "gpt2",
        "gpt_neox",
        *decoder_models.OWN,
        *layer_pattern_models.OWN,
        *pretrain_cases.VARIANTS,
    )
]


def fit_changes(family: str) -> dict:
    """A tied small model and its growth, to no multiple of its width where the family's norms and head sizes allow."""
    family, variant = pretrain_cases.VARIANTS.get(family, (family, {}))
    pattern = layer_pattern_models.OWN.get(family, {})
    arch = get(pattern.get("arch", family))
    has_groups = "num_kv_heads" in arch.hf_fields.values()
    small = pretrain_cases.odd_sizes(family) | {"num_layers": 3, "num_kv_heads": 3 if has_groups else 6, "tied": True}
    if family != "llama":
        small["arch"] = family
    if family in pretrain_cases.CLASSES:
        small["class"] = pretrain_cases.CLASSES[family]
    small |= variant
    is_free = arch.uses_rms_norm and "head_dim" in arch.hf_fields.values()
    large = {"num_layers": 4, "hidden_size": 60 if is_free else 12 * small["head_dim"], "ffn_size": 51, "num_heads": 12}
    return {"small": small, "large": {**large, "num_kv_heads": 6 if has_groups else 12}, "settings": {"noise": 0.5}}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fit_is_exact_on_three_ranks(pools, family):
    assert_exact(differences(pools, 3, "sgd", fit_changes(family), tp=3, sequence_parallel=True, micro_size=4))


@pytest.mark.parametrize("family", FAMILIES)
def test_pretraining_is_exact_on_three_ranks(pools, tmp_path, family):
    model_of(pretrain_cases.sizes(True, family, odd=True)).save_pretrained(tmp_path / "hf")
    convert(HfReader(tmp_path / "hf"), tmp_path / "universal", "universal")
    expected = pretrain_cases.reference(True, "sgd", family, odd=True)
    case = {"tied": True, "family": family, "odd": True, "optimizer": "sgd", "tp": 3, "micro_size": 4}
    result = pools(3).run(pretrain_cases.train, folder=str(tmp_path / "universal"), **case)
    assert result["evaluated"] == pytest.approx(expected[0][0], rel=1e-6)
    for step, (step_result, step_expected) in enumerate(zip(result["steps"], expected, strict=True)):
        assert step_result == pytest.approx(step_expected, rel=1e-5), step
