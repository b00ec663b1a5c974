"""A longer context: sequences of the old length keep their logits, new positions begin as the config names it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.reader import MOMENTS
from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import LargeSection, OperatorSection, RunConfig
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth.adam_state import DualMaps
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.training.fit import prepare_fit
from tests import layer_norm_models
from tests.growth.test_growth_families import DOUBLE
from tests.tiny_models import hf_from, hf_llama, llama_config, memory_of, tokens

LONGER = replace(DOUBLE, max_positions=47)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("start", ["tile", "mean", "random"])
@pytest.mark.parametrize(
    ("family", "name"), [("gpt2", "GPT2LMHeadModel"), ("bert", "BertForPreTraining"), ("roberta", "RobertaForMaskedLM")]
)
def test_learned_positions(family, name, start):
    small = layer_norm_models.config_of(family, name)
    source = layer_norm_models.memory_of(layer_norm_models.model(family, name, dtype=torch.float64), small)
    grown = GrownReader(build_initial_operator(small, LONGER, OperatorSection(position_init=start)), source)
    short, long = (
        layer_norm_models.tokens(small.max_sequence_length),
        layer_norm_models.tokens(grown.model_config.max_sequence_length),
    )
    before, after = layer_norm_models.outputs(source, short), layer_norm_models.outputs(grown, short)
    assert float((before - after).abs().max()) < 1e-12
    assert layer_norm_models.outputs(grown, long).isfinite().all()

    # The first columns of the residual stream are the small model's own.
    table, old = grown.read("positions")[:, :24], source.read("positions")
    used, new = old[small.first_position :], table[20:]
    assert torch.equal(table[:20], old) and len(new) == 27
    if start == "tile":
        assert torch.equal(new, torch.cat([used, used])[:27])
    elif start == "mean":
        assert torch.allclose(new, used.mean(dim=0).expand(27, 24), rtol=1e-12)
    else:
        assert 0.8 < float((new - used.mean(dim=0)).std() / (used - used.mean(dim=0)).std()) < 1.2
    for kind in MOMENTS:
        moment = DualMaps(grown.operator, kind, "grow").grow("positions", source.read)
        assert moment.shape == (47, 48) and moment[:20].any() and not moment[20:].any()


def test_rope_scaling_is_carried(tmp_path):
    small = llama_config(rope_scaling=LLAMA3)
    source = memory_of(hf_llama(small), small)
    grown = GrownReader(
        build_initial_operator(small, LargeSection(num_layers=4, max_positions=256), OperatorSection()), source
    )
    convert(grown, tmp_path / "out", "hf")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["max_position_embeddings"] == 256
    assert (config["rope_scaling"], config["rope_theta"]) == (LLAMA3, 10000.0)
    plain = replace(llama_config(), max_positions=256)
    assert build_initial_operator(llama_config(), LargeSection(max_positions=256), OperatorSection()).large == plain
    # A shorter one is a smaller number in the config, and no more.
    assert build_initial_operator(small, LargeSection(max_positions=8), OperatorSection()).large.max_positions == 8
    ids = tokens(small)
    assert torch.allclose(hf_from(grown)(ids).logits, hf_from(source)(ids).logits, atol=1e-5)


def test_refusals(tmp_path):
    gpt2 = layer_norm_models.config_of("gpt2", "GPT2Model")
    with pytest.raises(ConfigError) as error:
        build_initial_operator(gpt2, LargeSection(max_positions=19), OperatorSection())
    (problem,) = error.value.problems
    assert (problem.where, problem.found) == ("large.max_positions", "19") and "20" in problem.expected
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(ConfigError) as error:
        build_initial_operator(llama_config(rope_scaling=scaling), LargeSection(max_positions=128), OperatorSection())
    (problem,) = error.value.problems
    assert problem.where == "large.max_positions" and str(scaling) in problem.expected
    _, folder = layer_norm_models.saved(tmp_path, "gpt2", "GPT2LMHeadModel")
    run = [f"small.path={folder}", "large.max_positions=40", "data.seq_length=30"]
    prepare_fit(RunConfig.load(None, run))
    with pytest.raises(ConfigError, match="The teacher has 20 positions"):
        prepare_fit(RunConfig.load(None, [*run, "fit.distill=0.5"]))
