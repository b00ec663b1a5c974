"""GGUF files against what transformers makes of them: a real one, and small ones of each type of tensor."""

from __future__ import annotations

import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.common.errors import CheckpointError, LigoError
from megatron_ligo.sharding import fused_tensors
from megatron_ligo.sharding.fused_tensors import stored_tensors
from tests.checkpoint import hf_models

TEXTS = [
    "Hello world",
    "  two  spaces\n\n\ttab 12345 67",
    "<|im_start|>user\nhi<|im_end|>",
    "Grüße 世界 🎉 don't stop\r\n",
    "def f(x):\n    return x ** 2  # squared",
]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> tuple[Path, Path]:
    """The real file, and the Hugging Face folder converted from it."""
    file = hf_models.smollm2()
    folder = tmp_path_factory.mktemp("real") / "hf"
    convert(formats.open(file), folder, "hf")
    return file, folder


def test_real_tensors_and_logits_equal_transformers(real):
    file, folder = real
    theirs = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected, converted = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == converted.keys()
    for name in expected:
        assert hf_models.same_bits(expected[name], converted[name]), name
    ids = hf_models.tokens(49152)
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


def test_real_sizes(real):
    model_config = formats.open(real[0]).model_config
    assert (model_config.num_layers, model_config.hidden_size, model_config.num_heads, model_config.num_kv_heads) == (
        30,
        576,
        9,
        3,
    )
    assert (model_config.vocab_size, model_config.tied, model_config.rope_base, model_config.norm_eps) == (
        49152,
        True,
        100000.0,
        1e-5,
    )


def test_real_tokenizer_gives_the_same_ids(real):
    file, folder = real
    theirs = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    ours = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours(text).input_ids == ids
        assert ours.decode(ids) == text
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (theirs.bos_token, theirs.eos_token, theirs.pad_token)
    assert ours.chat_template == theirs.chat_template


def write_gguf(path: Path, model, kind: Kind, family: str = "llama", factors=None, value_length=0, **changes) -> None:
    """Writes a model as llama.cpp stores it: rotary pairs interleaved (llama only), norms in fp32."""
    config = model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(value_length or config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    scaling = (source := formats.open(model.name_or_path)).model_config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, value in changes.items():
        writer.add_uint32(f"{family}.{name}", value)
    state = model.state_dict()
    names = {item.keys[0]: name for name, item in stored_tensors(source.arch, source.model_config, "gguf").items()}
    for hf, item in stored_tensors(source.arch, source.model_config, "hf").items():
        tensor, slot = state[hf], item.params[0].locations["gguf"]
        if slot.interleaved and family == "llama":
            tensor = fused_tensors.interleave(tensor, config.head_dim)
        plain = Kind.F32 if tensor.dim() == 1 else kind
        writer.add_tensor(names[item.keys[0]], gguf.quantize(tensor.float().numpy(), plain), raw_dtype=plain)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantisable(folder: Path, model_type: str = "llama", **changes):
    """Saves a model whose rows are complete quantisation blocks of 32."""
    sizes = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32, "num_attention_heads": 3}
    model, _ = hf_models.saved(folder, model_type, **{**sizes, "num_key_value_heads": 1, **changes})
    model.name_or_path = str(folder)
    return model


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
@pytest.mark.parametrize("tied", [False, True])
def test_each_type_of_tensor(tmp_path, kind, tied):
    model = quantisable(tmp_path / "hf", tied=tied)
    write_gguf(tmp_path / "model.gguf", model, kind)
    reader = formats.open(tmp_path)
    dtypes = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
    assert reader.info("layers.0.q").dtype == dtypes.get(kind, torch.float32)
    assert reader.model_config == formats.open(tmp_path / "hf").model_config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    expected = theirs.state_dict()
    for name, item in stored_tensors(reader.arch, reader.model_config, "hf").items():
        tensor = reader.read(item.keys[0])
        assert tensor.dtype == reader.info(item.keys[0]).dtype
        assert torch.equal(tensor.float(), expected[name]), name
        if kind is Kind.F32:
            assert torch.equal(tensor, model.state_dict()[name]), name


def test_qwen2_keeps_the_rotary_order(tmp_path):
    model = quantisable(tmp_path / "hf", "qwen2")
    write_gguf(tmp_path / "model.gguf", model, Kind.F32, "qwen2")
    hf_models.assert_same(formats.open(tmp_path / "model.gguf"), formats.open(tmp_path / "hf"))


def test_linear_rope_scaling(tmp_path):
    model = quantisable(tmp_path / "hf", rope_scaling={"rope_type": "linear", "factor": 2.5})
    write_gguf(tmp_path / "model.gguf", model, Kind.F32)
    hf_models.assert_same(formats.open(tmp_path / "model.gguf"), formats.open(tmp_path / "hf"))


def test_llama3_scaling_is_recognised_by_its_table(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    model = quantisable(tmp_path / "hf", rope_scaling=rope, rope_theta=500000.0, max_position_embeddings=16384)
    plain = 500000.0 ** (-torch.arange(0, 32, 2) / 32)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert len(set(factors.round(3))) > 2
    write_gguf(tmp_path / "model.gguf", model, Kind.F32, factors=factors)
    hf_models.assert_same(formats.open(tmp_path / "model.gguf"), formats.open(tmp_path / "hf"))
    # No rule's table: read as what it is, a divisor for each pair.
    factors[-3] *= 1.01
    write_gguf(tmp_path / "model.gguf", model, Kind.F32, factors=factors)
    scaling = formats.open(tmp_path / "model.gguf").model_config.rope_scaling
    assert scaling["rope_type"] == "longrope"
    assert np.array_equal(np.float32(scaling["short_factor"]), factors)


@pytest.mark.parametrize("name", ["expert_count", "attention.sliding_window", "attention.value_length"])
def test_unsupported_features_are_refused(tmp_path, name):
    model = quantisable(tmp_path / "hf")
    value = {} if name.endswith("value_length") else {name: 8}
    write_gguf(tmp_path / "model.gguf", model, Kind.F32, value_length=16 if not value else 32, **value)
    with pytest.raises(CheckpointError) as error:
        formats.open(tmp_path / "model.gguf")
    # With experts it is Mixtral's network, which must say how many a token has.
    where = "llama.expert_used_count" if name == "expert_count" else f"llama.{name}"
    assert [problem.where for problem in error.value.problems] == [where]


def test_truncated_files_are_refused(tmp_path):
    model = quantisable(tmp_path / "hf")
    path = tmp_path / "model.gguf"
    write_gguf(path, model, Kind.Q8_0)
    complete = path.read_bytes()
    # At any length that cuts more than the padding after the last tensor: one error, at once.
    for size in np.linspace(0, len(complete) - 33, 60, dtype=int):
        path.write_bytes(complete[:size])
        with pytest.raises(CheckpointError):
            formats.open(path, "gguf")


def test_a_damaged_header_is_refused_or_harmless(tmp_path):
    model = quantisable(tmp_path / "hf")
    path = tmp_path / "model.gguf"
    write_gguf(path, model, Kind.Q8_0)
    complete = bytearray(path.read_bytes())
    generator = np.random.default_rng(0)
    for offset, value in zip(generator.integers(0, 2500, 400), generator.integers(0, 256, 400), strict=True):
        damaged = bytearray(complete)
        damaged[offset : offset + 4] = bytes([value] * 4)
        path.write_bytes(damaged)
        try:
            reader = formats.open(path, "gguf")
        except LigoError:
            continue
        assert reader.read("layers.1.q").shape == (96, 96)
