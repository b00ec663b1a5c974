"""GGUF files of mixtures, written with the gguf package's names, against transformers' models."""

from __future__ import annotations

import gguf
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.common.errors import CheckpointError
from megatron_ligo.sharding.fused_tensors import interleave

COMMON = {
    "vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts_per_tok": 3,
}  # fmt: skip
SIZES = COMMON | {"num_experts": 5, "moe_intermediate_size": 32}
MODELS = {
    "llama": (
        transformers.MixtralConfig(**COMMON, num_local_experts=5, intermediate_size=32, head_dim=8),
        gguf.MODEL_ARCH.LLAMA,
    ),
    "qwen3moe": (transformers.Qwen3MoeConfig(**SIZES, head_dim=8, norm_topk_prob=True), gguf.MODEL_ARCH.QWEN3MOE),
    "qwen2moe": (
        transformers.Qwen2MoeConfig(**SIZES, shared_expert_intermediate_size=64),
        gguf.MODEL_ARCH.QWEN2MOE,
    ),
}


def write_file(path, name: str, kind: Kind, alone: bool = False, **changes):
    """Writes a random model as llama.cpp's converter does: a layer's experts in one tensor. Returns the model.

    alone: each expert in its own, as its first converter did.
    """
    config, arch = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.2)
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if name == "qwen3moe":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    counts = {"expert_count": 5, "expert_used_count": 3}
    if name != "llama":
        counts["expert_feed_forward_length"] = 32
    if name == "qwen2moe":
        counts["expert_shared_feed_forward_length"] = 64
    for key, value in (counts | changes).items():
        writer.add_uint32(f"{name}.{key}", value)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if name == "llama" and ("q_proj" in key or "k_proj" in key):
            tensor = interleave(tensor, config.head_dim)
        parts = {key: tensor}
        if key.endswith("experts.gate_up_proj"):
            stem = key.removesuffix("gate_up_proj")
            parts = dict(zip((f"{stem}gate_proj.weight", f"{stem}up_proj.weight"), tensor.chunk(2, dim=1), strict=True))
        elif key.endswith("experts.down_proj"):
            parts = {f"{key}.weight": tensor}
        for part, value in parts.items():
            stored = names.get_name(part, try_suffixes=(".weight", ".bias"))
            plain = value.ndim == 1 or "shared_expert_gate" in part or value.shape[-1] % 32
            if alone and value.ndim == 3:
                for expert, one in enumerate(value):
                    writer.add_tensor(stored.replace("_exps.", f".{expert}."), one.contiguous().numpy())
                continue
            data = value.contiguous().numpy()
            writer.add_tensor(stored, data if plain else gguf.quantize(data, kind), raw_dtype=None if plain else kind)
            if not plain and kind is not Kind.F32:
                dequantised = torch.from_numpy(gguf.dequantize(gguf.quantize(data, kind), kind))
                value.copy_(dequantised.view(value.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


CASES = [
    *((name, kind, False) for name in ("qwen3moe", "qwen2moe") for kind in (Kind.F32, Kind.Q8_0)),
    *(("llama", Kind.F32, alone) for alone in (False, True)),
]


@pytest.mark.parametrize(("name", "kind", "alone"), CASES)
def test_experts_of_a_file_are_read(tmp_path, name, kind, alone):
    model = write_file(tmp_path / "model.gguf", name, kind, alone)
    convert(formats.open(tmp_path / "model.gguf"), tmp_path / "hf", "hf")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ids = torch.arange(40).reshape(2, 20) * 7 % 37
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, model(ids).logits, rtol=0, atol=2e-6)


def test_a_false_number_of_experts_is_refused(tmp_path):
    for count, message in ((10**9, "num_experts"), (9999, "expert_count"), (4, "no such tensor"), (6, "nothing")):
        path = tmp_path / f"{count}.gguf"
        write_file(path, "qwen3moe", Kind.F32, expert_count=count)
        with pytest.raises(CheckpointError, match=message):
            formats.open(path)
