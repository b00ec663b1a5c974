"""Rope scalings of GGUF files: what transformers computes from our reading is what llama.cpp computes from the file."""

from __future__ import annotations

import math
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.formats.gguf.header import read_header
from megatron_ligo.checkpoint.formats.gguf.rope_metadata import parse_rope_scaling
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.common.errors import CheckpointError, ErrorCollector

LAYERS, HIDDEN, HEADS, FFN, VOCAB = 1, 32, 2, 8, 16
HEAD_DIM = HIDDEN // HEADS
CONTEXT, BASE = 64, 10000.0
TABLE = np.linspace(1, 4, HEAD_DIM // 2).astype(np.float32)
NO_TABLES: dict[str, np.ndarray] = {}


def write(path: Path, settings: dict[str, object], tables: dict[str, np.ndarray] = NO_TABLES) -> Path:
    """Writes a tiny Llama with these settings of the family."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(BASE)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(VOCAB)
    for name, value in settings.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
        add[type(value)](f"llama.{name}", value)
    shapes = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,), "output": (VOCAB, HIDDEN)}
    layer = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN)}
    layer |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (HIDDEN, HIDDEN))
    shapes |= {f"blk.0.{name}": shape for name, shape in (layer | {"ffn_down": (HIDDEN, FFN)}).items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    for name, table in tables.items():
        writer.add_tensor(name, table)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def of_llama_cpp(settings: dict, tables: dict, length: int) -> tuple[np.ndarray, float]:
    """Returns llama.cpp's frequency of each pair, and its factor on cos and sin (llama-context.cpp, ggml's rope)."""
    kind = settings.get("rope.scaling.type", "linear")
    scale = settings.get("rope.scaling.factor", settings.get("rope.scale_linear", 0.0))
    scale = 1.0 if scale == 0 or kind == "none" else 1 / scale
    original = settings.get("rope.scaling.original_context_length", CONTEXT)
    attention = settings.get("rope.scaling.attn_factor", 1.0)
    divisors = tables.get("rope_freqs.weight", np.ones(HEAD_DIM // 2))
    if kind == "longrope":
        divisors = tables[f"rope_factors_{'long' if length > original else 'short'}.weight"]
    extrapolated = BASE ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM) / divisors
    if kind != "yarn":
        return extrapolated * scale, attention

    def corner(rotations: float) -> float:
        return HEAD_DIM * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(BASE))

    low, high = max(0, math.floor(corner(32.0))), min(HEAD_DIM - 1, math.ceil(corner(1.0)))
    ramp = 1 - np.clip((np.arange(HEAD_DIM // 2) - low) / max(0.001, high - low), 0, 1)
    # The attention's factor of 1 + 0.1 log(factor) is cancelled in the context and applied again in the kernel.
    mscale = 1 + 0.1 * math.log(1 / scale) if scale < 1 else 1.0
    return extrapolated * scale * (1 - ramp) + extrapolated * ramp, mscale * attention


def of_transformers(path: Path, length: int) -> tuple[np.ndarray, float]:
    """Returns the same of transformers' model of our reading."""
    config = config_json.to_hf_config(formats.open(path).model_config, {}, torch.float32)
    rotary = LlamaRotaryEmbedding(LlamaConfig(**config))
    rotary(torch.zeros(1), torch.arange(length)[None])
    return rotary.inv_freq.numpy(), rotary.attention_scaling


CASES = {
    "plain": ({}, {}),
    "type and factor": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {}),
    "no type": ({"rope.scaling.factor": 2.5}, {}),
    "old key": ({"rope.scale_linear": 4.0}, {}),
    "type and old key": ({"rope.scaling.type": "linear", "rope.scale_linear": 4.0}, {}),
    "both keys": ({"rope.scaling.factor": 2.0, "rope.scale_linear": 4.0}, {}),
    "a factor of 0": ({"rope.scaling.factor": 0.0, "rope.scale_linear": 4.0}, {}),
    "none with a factor": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    "yarn": ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {}),
    "yarn, original length": (
        {
            "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 1000,
            "rope.scaling.finetuned": True, "rope.scaling.yarn_beta_fast": 32.0,
        },
        {},
    ),
    "yarn, its factor": (
        {
            "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 500,
            "rope.scaling.attn_factor": 0.75,
        },
        {},
    ),
    "table": ({}, {"rope_freqs.weight": TABLE}),
    "table of ones": ({}, {"rope_freqs.weight": np.ones(HEAD_DIM // 2, np.float32)}),
    "longrope": (
        {
            "rope.scaling.type": "longrope", "rope.scaling.original_context_length": 16,
            "rope.scaling.attn_factor": 1.25,
        },
        {"rope_factors_short.weight": TABLE, "rope_factors_long.weight": 3 * TABLE},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_from_our_reading_what_llama_cpp_does(tmp_path, name):
    settings, tables = CASES[name]
    path = write(tmp_path / "model.gguf", settings, tables)
    for length in (10, 40):
        frequencies, factor = of_transformers(path, length)
        expected, expected_factor = of_llama_cpp(settings, tables, length)
        assert np.allclose(frequencies, expected, rtol=2e-6)
        assert factor == pytest.approx(expected_factor, rel=1e-6)


REFUSED = {
    "rope.scaling.type": ({"rope.scaling.type": "dynamic"}, {}),
    "rope.scaling.attn_factor": ({"rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 2.0}, {}),
    "rope.scaling.yarn_ext_factor": ({"rope.scaling.type": "linear", "rope.scaling.yarn_ext_factor": 1.0}, {}),
    "rope.scaling.yarn_beta_fast": ({"rope.scaling.type": "yarn", "rope.scaling.yarn_beta_fast": 8.0}, {}),
    "rope.scaling.yarn_beta_slow": ({"rope.scaling.type": "yarn", "rope.scaling.yarn_beta_slow": 2.0}, {}),
    "rope.scaling.yarn_log_multiplier": ({"rope.scaling.type": "yarn", "rope.scaling.yarn_log_multiplier": 0.1}, {}),
    "rope.scaling.yarn_attn_factor": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_attn_factor": 1.0},
        {},
    ),
    "rope.scaling.factor": ({"rope.scaling.factor": 2.0}, {"rope_freqs.weight": TABLE}),
    "rope_factors_short.weight": ({"rope.scaling.type": "longrope"}, {"rope_factors_long.weight": TABLE}),
    "rope_factors_long.weight": ({}, {"rope_factors_long.weight": TABLE}),
    "rope_freqs.weight": ({}, {"rope_freqs.weight": -TABLE}),
}


@pytest.mark.parametrize("where", REFUSED)
def test_what_is_no_scaling_of_ours_is_refused_by_name(tmp_path, where):
    with pytest.raises(CheckpointError) as error:
        formats.open(write(tmp_path / "model.gguf", *REFUSED[where]))
    assert [problem.where for problem in error.value.problems] == [where]


def test_tables_of_llama_3_s_rule_are_recognised(tmp_path):
    rng = random.Random(0)
    for original in (8192, 512, 3000):
        factor, base = rng.choice([8.0, 32.0]), 500000.0
        rule = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rule["original_max_position_embeddings"] = original
        config = LlamaConfig(
            hidden_size=128, num_attention_heads=2, max_position_embeddings=CONTEXT, rope_theta=base, rope_scaling=rule
        )
        scaled = LlamaRotaryEmbedding(config).inv_freq
        factors = (base ** (-torch.arange(0, 64, 2) / 64) / scaled).numpy()
        path = write(
            tmp_path / f"{original}.gguf",
            {"rope.scaling.original_context_length": original},
            {"rope_freqs.weight": factors},
        )
        errors = ErrorCollector("file")
        read = parse_rope_scaling(read_header(path), "llama", 64, base, errors)
        assert not errors.problems
        assert read == {key: value for key, value in rule.items() if key != "rope_theta"}
