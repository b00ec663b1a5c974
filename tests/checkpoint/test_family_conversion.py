"""GPT-2, GPT-NeoX, BERT and RoBERTa between the formats, as transformers writes them today and as old files do."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_ligo.arch import get
from megatron_ligo.checkpoint import formats, inspect, verify
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.common.errors import CheckpointError, ConfigError
from megatron_ligo.sharding.fused_tensors import stored_tensors
from tests import layer_norm_models
from tests.checkpoint.hf_models import assert_same, same_bits


def edit(folder, change, **config):
    """Rewrites a folder's tensors and config."""
    path = folder / "model.safetensors"
    state = load_file(path)
    save_file(change(state), path, {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "name"), layer_norm_models.CLASSES)
def test_there_and_back(tmp_path, family, name, tied):
    model, folder = layer_norm_models.saved(tmp_path / "a", family, name, tied=tied)
    source = formats.open(folder)
    assert source.model_config == layer_norm_models.config_of(family, name, tied=tied)
    convert(source, tmp_path / "b", "universal")
    convert(formats.open(tmp_path / "b"), tmp_path / "c", "hf")
    assert_same(source, formats.open(tmp_path / "c"))
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "c"))
    assert before.keys() == after.keys()
    assert all(same_bits(before[key], after[key]) for key in before)
    again = getattr(transformers, name).from_pretrained(tmp_path / "c").eval()
    ids = layer_norm_models.tokens()
    with torch.no_grad():
        expected = model(ids)[0]
        assert torch.equal(again(ids)[0], expected)
        assert torch.equal(verify.compute_logits(formats.open(tmp_path / "b"), ids), expected)


def test_narrow_weights_stay_narrow(tmp_path):
    _, folder = layer_norm_models.saved(tmp_path / "a", "gpt2", "GPT2LMHeadModel", dtype=torch.bfloat16)
    convert(formats.open(folder), tmp_path / "b", "hf")
    assert_same(formats.open(folder), formats.open(tmp_path / "b"))
    assert formats.open(tmp_path / "b").info("layers.1.q").dtype == torch.bfloat16


def test_gpt2_as_it_was_first_published(tmp_path):
    """Without the base's prefix, with the masks of its attention, under a class that has a head; n_inner is null."""
    model, folder = layer_norm_models.saved(tmp_path / "a", "gpt2", "GPT2LMHeadModel", n_inner=None)

    def old(state):
        bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 20, 20).tril() for layer in range(3)}
        return bare | masks | {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(3)}

    source = formats.open(edit(folder, old, n_ctx=20))
    assert (source.model_config.has_head, source.model_config.ffn_size) == (True, 96)
    convert(source, tmp_path / "b", "hf")
    assert "n_ctx" not in json.loads((tmp_path / "b" / "config.json").read_text())
    ids = layer_norm_models.tokens()
    with torch.no_grad():
        again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "b").eval()
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_bert_as_it_was_first_published(tmp_path):
    """gamma and beta, positions as a buffer, a stored tied decoder, and a head that the named class lacks."""
    model, folder = layer_norm_models.saved(tmp_path / "a", "bert", "BertForPreTraining")

    def old(state):
        state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()
        state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"].clone()
        state["bert.embeddings.position_ids"] = torch.arange(20)[None]
        gamma = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in state.items()}
        return {name.replace("LayerNorm.bias", "LayerNorm.beta"): tensor for name, tensor in gamma.items()}

    source = formats.open(edit(folder, old, architectures=["BertForMaskedLM"]))
    assert (source.model_config.has_head, source.model_config.has_pooler, source.model_config.has_order_head) == (
        True,
        True,
        True,
    )
    convert(source, tmp_path / "b", "hf")
    ids = layer_norm_models.tokens()
    with torch.no_grad():
        again = transformers.BertForPreTraining.from_pretrained(tmp_path / "b").eval()
        result, expected = again(ids), model(ids)
        assert torch.equal(result.prediction_logits, expected.prediction_logits)
        assert torch.equal(result.seq_relationship_logits, expected.seq_relationship_logits)
    damaged = edit(folder, lambda state: state | {"cls.predictions.decoder.bias": torch.zeros(37)})
    with pytest.raises(CheckpointError) as error:
        formats.open(damaged).read("head_bias")
    assert error.value.problems[0].where == f"{damaged}: cls.predictions.decoder.bias"


@pytest.mark.parametrize(("family", "name"), [("bert", "BertModel"), ("roberta", "RobertaForMaskedLM")])
def test_parts_that_differ_from_the_named_class(tmp_path, family, name):
    """An encoder without its pooler, and a masked-LM model that still has one."""
    model, folder = layer_norm_models.saved(tmp_path / "a", family, name)
    pooler = {f"{family}.pooler.dense.weight": torch.randn(24, 24), f"{family}.pooler.dense.bias": torch.randn(24)}

    def change(state):
        return state | pooler if name != "BertModel" else {n: t for n, t in state.items() if "pooler" not in n}

    source = formats.open(edit(folder, change))
    assert source.model_config.has_pooler == (name != "BertModel")
    convert(source, tmp_path / "b", "universal")
    convert(formats.open(tmp_path / "b"), tmp_path / "c", "hf")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "c"))
    assert before.keys() == after.keys()
    ids = layer_norm_models.tokens()
    with torch.no_grad():
        assert torch.equal(verify.compute_logits(formats.open(tmp_path / "c"), ids), model(ids)[0])


def test_roberta_s_padding_has_no_position(tmp_path):
    """Tokens of the padding's id are not counted: that is a size of the model, and it goes along."""
    model, folder = layer_norm_models.saved(tmp_path / "a", "roberta", "RobertaForMaskedLM", pad_token_id=4)
    source = formats.open(folder)
    assert (source.model_config.position_padding, source.model_config.max_sequence_length) == (4, 15)
    ids = layer_norm_models.tokens(15)
    ids[:, 3:5] = 4
    with torch.no_grad():
        assert torch.equal(verify.compute_logits(source, ids), model(ids).logits)


def test_unsupported_configs_are_refused(tmp_path):
    _, folder = layer_norm_models.saved(tmp_path / "a", "bert", "BertModel")
    edit(folder, lambda state: state, hidden_act="mish", is_decoder=True, position_embedding_type="relative_key")
    with pytest.raises(CheckpointError) as error:
        formats.open(folder)
    assert {problem.where for problem in error.value.problems} >= {
        "activation",
        "is_decoder",
        "position_embedding_type",
    }
    model_config = layer_norm_models.config_of("gpt2", "GPT2Model", num_heads=3, num_kv_heads=3)
    with pytest.raises(CheckpointError) as error:
        config_json.to_hf_config(model_config, {}, torch.float32)
    assert error.value.problems[0].where.startswith("head_dim")
    with pytest.raises(ConfigError) as error:
        stored_tensors(get("gpt2"), layer_norm_models.config_of("gpt2", "GPT2Model"), "fairscale")
    assert error.value.problems[0].where == "fairscale"


def test_minilm(tmp_path):
    """The real encoder there and back: every bit, the tokenizer's files, and transformers' outputs."""
    source = formats.open(layer_norm_models.minilm())
    summary = inspect.describe(source)
    assert (summary["parameters"], summary["dims"]["arch"]) == (22_713_216, "bert")
    assert "pooler" in inspect.to_text(summary)
    convert(source, tmp_path / "a", "universal")
    convert(formats.open(tmp_path / "a"), tmp_path / "b", "hf")
    assert_same(source, formats.open(tmp_path / "b"))
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "b" / file).read_bytes() == (layer_norm_models.minilm() / file).read_bytes()
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")("A growing model.", return_tensors="pt")
    hidden = []
    for folder in (layer_norm_models.minilm(), tmp_path / "b"):
        model = transformers.BertModel.from_pretrained(folder).eval()
        with torch.no_grad():
            hidden.append(model(**text).last_hidden_state)
    assert torch.equal(*hidden)
