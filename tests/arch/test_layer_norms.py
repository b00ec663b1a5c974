"""GPT-2, GPT-NeoX, BERT and RoBERTa: the tables against the real models, every class and every optional part."""

import pytest
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ligo.arch import get
from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import PretrainSection, RunConfig, SmallSection
from megatron_ligo.distributed import mesh
from megatron_ligo.sharding.fused_tensors import stored_tensors
from megatron_ligo.training.fit import prepare_fit
from megatron_ligo.training.initial_weights import find_initial_weights
from tests import layer_norm_models


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("family", "name"), layer_norm_models.CLASSES)
def test_hugging_face(family, name, tied):
    model_config = layer_norm_models.config_of(family, name, tied=tied)
    arch = get(model_config.arch)
    assert arch.hf_class(model_config) == name
    model = layer_norm_models.model(family, name, tied=tied)
    items = stored_tensors(arch, model_config, "hf").items()
    expected = {layer_norm_models.IN_MEMORY.get(name, name): item.shape(model_config) for name, item in items}
    result = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # transformers lists shared tensors under both names; a file holds them once.
    shared = {other for other in set(result) - set(expected) if tied and other in model._tied_weights_keys}
    assert {name: shape for name, shape in result.items() if name not in shared} == expected
    assert bool(shared) == (tied and model_config.has_head)


@pytest.mark.parametrize("tied", [False, True])
def test_megatron_core(tied):
    """GPT-2 in Megatron-core's own words."""
    model_config = layer_norm_models.config_of("gpt2", "GPT2LMHeadModel", tied=tied)
    mesh.init_distributed()
    mesh.build_mesh(1, 1)
    config = TransformerConfig(
        num_layers=model_config.num_layers,
        hidden_size=model_config.hidden_size,
        ffn_hidden_size=model_config.ffn_size,
        num_attention_heads=model_config.num_heads,
        normalization="LayerNorm",
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        model_config.vocab_size,
        model_config.max_positions,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="learned_absolute",
    )
    result = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert result == {
        name: item.shape(model_config) for name, item in stored_tensors(get("gpt2"), model_config, "mcore").items()
    }


def test_bert_has_megatron_core_names_for_shared_modules():
    """Its BertModel is pre-LN: the norms of a layer, the embeddings' and the last one differ, and nothing else."""
    model_config = layer_norm_models.config_of("bert", "BertForPreTraining")
    mesh.init_distributed()
    mesh.build_mesh(1, 1)
    config = TransformerConfig(
        num_layers=model_config.num_layers,
        hidden_size=model_config.hidden_size,
        ffn_hidden_size=model_config.ffn_size,
        num_attention_heads=model_config.num_heads,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    model = BertModel(
        config,
        model_config.num_token_types,
        bert_layer_local_spec,
        model_config.vocab_size,
        model_config.max_positions,
        share_embeddings_and_output_weights=True,
    )
    result = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected = {
        name: item.shape(model_config) for name, item in stored_tensors(get("bert"), model_config, "mcore").items()
    }
    ours, theirs = set(expected.items()) - set(result.items()), set(result.items()) - set(expected.items())
    assert {name for name, _ in ours if "layer_norm" not in name and "post_" not in name} == set()
    assert {name for name, _ in theirs if "layernorm" not in name} == set()


@pytest.mark.parametrize(
    ("family", "name", "wanted"), [("bert", "BertModel", "fresh_head = true"), ("gpt2", "GPT2Model", "output head")]
)
def test_fit_and_pretraining_refuse_what_they_do_not_build(tmp_path, family, name, wanted):
    _, folder = layer_norm_models.saved(tmp_path, family, name)
    with pytest.raises(ConfigError, match=wanted):
        prepare_fit(RunConfig(small=SmallSection(path=str(folder))))
    with pytest.raises(ConfigError, match=wanted):
        find_initial_weights(RunConfig(pretrain=PretrainSection(start=str(folder))))
