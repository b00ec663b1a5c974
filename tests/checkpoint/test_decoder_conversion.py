"""Decoders with other norms and factors than Llama's, between the formats."""

from __future__ import annotations

import gguf
import pytest
import torch
from safetensors.torch import load_file

from megatron_ligo.checkpoint import formats, verify
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.common.errors import LigoError
from megatron_ligo.sharding import fused_tensors
from tests import decoder_models, layer_norm_models
from tests.checkpoint.hf_models import assert_same, same_bits
from tests.tiny_models import tokens

CHAIN = ("mcore", "megatron", "universal", "hf")


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("family", decoder_models.OWN)
def test_there_and_back(tmp_path, family, tied):
    model_config = decoder_models.config_of(family, tied=tied)
    network = layer_norm_models.model_of(model_config)
    network.save_pretrained(tmp_path / "a")
    source = formats.open(tmp_path / "a")
    assert source.model_config == model_config
    last = tmp_path / "a"
    for name in CHAIN:
        convert(formats.open(last), tmp_path / name, name)
        last = tmp_path / name
        assert_same(source, formats.open(last))
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "a", last))
    assert before.keys() == after.keys()
    assert all(same_bits(before[key], after[key]) for key in before)
    ids = tokens(model_config)
    with torch.no_grad():
        assert torch.equal(verify.compute_logits(formats.open(tmp_path / "mcore"), ids), network(ids)[0])


def test_megatron_s_arguments_state_the_norms_of_heads(tmp_path):
    """Megatron-LM builds no norms of heads without them, and a checkpoint that denies them is refused."""
    layer_norm_models.model_of(decoder_models.config_of("qwen3")).save_pretrained(tmp_path / "a")
    convert(formats.open(tmp_path / "a"), tmp_path / "m", "mcore")
    args = formats.open(tmp_path / "m").run_arguments
    assert (args["qk_layernorm"], args["normalization"], args["swiglu"]) == (True, "RMSNorm", True)
    path = tmp_path / "m" / "release" / "common.pt"
    state = torch.load(path, weights_only=False)
    state["args"].qk_layernorm = False
    torch.save(state, path)
    with pytest.raises(LigoError, match="qk_layernorm: expected True, found False"):
        formats.open(tmp_path / "m")


@pytest.mark.parametrize("family", decoder_models.OWN)
def test_meta_s_format_is_refused_by_name(tmp_path, family):
    layer_norm_models.model_of(decoder_models.config_of(family)).save_pretrained(tmp_path / "a")
    with pytest.raises(LigoError, match=f"{family}: expected Llama's parameters only"):
        convert(formats.open(tmp_path / "a"), tmp_path / "b", "fairscale")


def write_gguf(path, source) -> None:
    """Writes a file with the keys of the family's table, and its gains as llama.cpp stores them: 1 + w."""
    arch, model_config = source.arch, source.model_config
    writer = gguf.GGUFWriter(path, model_config.model_type.removesuffix("_text"))
    prefix = writer.arch
    for key, name in arch.gguf_fields.items():
        value = getattr(model_config, name)
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        if value is not None and not isinstance(value, tuple):
            add(f"{prefix}.{key}", value)
    for name, item in fused_tensors.stored_tensors(arch, model_config, "gguf").items():
        tensor = item.assemble([source.read(key) for key in item.keys], model_config)
        is_gain = tensor.dim() == 1
        writer.add_tensor(name, (tensor + arch.gain_offset if is_gain else tensor).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", [name for name in decoder_models.OWN if decoder_models.has_gguf(name)])
def test_gguf_is_read(tmp_path, family):
    model_config = decoder_models.config_of(family, tied=True)
    layer_norm_models.model_of(model_config).save_pretrained(tmp_path / "a")
    source = formats.open(tmp_path / "a")
    write_gguf(tmp_path / "a.gguf", source)
    reader = formats.open(tmp_path / "a.gguf")
    assert reader.model_config == model_config
    for key in source.keys():  # noqa: SIM118 - no dict
        if len(source.info(key).shape) == 2 and source.param(key).locations["gguf"].interleaved:
            continue
        torch.testing.assert_close(reader.read(key), source.read(key), atol=2e-7, rtol=0)
