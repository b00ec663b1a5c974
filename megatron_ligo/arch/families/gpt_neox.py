"""GPT-NeoX (Pythia): LayerNorm with bias, a part of each head turned by its position, biases on every linear, an output
head of its own; attention and feed-forward read the residual stream side by side, or (parallel_residual false) in turn.

Hugging Face stores q, k and v as one matrix, head by head, as Megatron-core does.
"""

from collections.abc import Iterator

from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.common_axes import (
    FFN_INPUT,
    FFN_OUTPUT,
    KEY_OUTPUT,
    QUERY_OUTPUT,
    RESIDUAL_INPUT,
    RESIDUAL_OUTPUT,
    VALUE_INPUT,
    VALUE_OUTPUT,
    VOCAB_OUTPUT,
)
from megatron_ligo.arch.common_params import grouped_qkv, linear_params, norm_params, prefixed
from megatron_ligo.arch.spec import Axis, FormatLocation, ParamSpec, Role

HF, MCORE = prefixed("gpt_neox.layers.{}."), prefixed("decoder.layers.{}.")


def _qkv(name: str, role: Role, axis: Axis, part: int) -> Iterator[ParamSpec]:
    slots = HF("attention.query_key_value"), MCORE("self_attention.linear_qkv")
    return linear_params(
        f"layers.{{}}.{name}", role, (axis, RESIDUAL_INPUT), 0, *(grouped_qkv(slot, part) for slot in slots)
    )


GPT_NEOX = Architecture(
    name="gpt_neox",
    norm="layer",
    model_types={"gpt_neox": {"GPTNeoXForCausalLM": ("has_head",), "GPTNeoXModel": ()}},
    params=(
        ParamSpec(
            "embed",
            Role.WORD_EMBEDDING,
            (VOCAB_OUTPUT, RESIDUAL_OUTPUT),
            0,
            {
                "hf": FormatLocation("gpt_neox.embed_in.weight"),
                "mcore": FormatLocation("embedding.word_embeddings.weight"),
            },
        ),
        *norm_params("layers.{}.norm1", Role.ATTENTION_NORM, HF("input_layernorm"), MCORE("input_layernorm")),
        *_qkv("q", Role.QUERY, QUERY_OUTPUT, 0),
        *_qkv("k", Role.KEY, KEY_OUTPUT, 1),
        *_qkv("v", Role.VALUE, VALUE_OUTPUT, 2),
        *linear_params(
            "layers.{}.o",
            Role.ATTENTION_OUTPUT,
            (RESIDUAL_OUTPUT, VALUE_INPUT),
            1,
            HF("attention.dense"),
            MCORE("self_attention.linear_proj"),
        ),
        *norm_params("layers.{}.norm2", Role.FFN_NORM, HF("post_attention_layernorm"), MCORE("pre_mlp_layernorm")),
        *linear_params(
            "layers.{}.up",
            Role.FFN_UP,
            (FFN_OUTPUT, RESIDUAL_INPUT),
            0,
            HF("mlp.dense_h_to_4h"),
            MCORE("mlp.linear_fc1"),
        ),
        *linear_params(
            "layers.{}.down",
            Role.FFN_DOWN,
            (RESIDUAL_OUTPUT, FFN_INPUT),
            1,
            HF("mlp.dense_4h_to_h"),
            MCORE("mlp.linear_fc2"),
        ),
        *norm_params(
            "final_norm",
            Role.FINAL_NORM,
            FormatLocation("gpt_neox.final_layer_norm"),
            FormatLocation("decoder.final_layernorm"),
            feeds_head=True,
        ),
        ParamSpec(
            "head",
            Role.HEAD,
            (VOCAB_OUTPUT, RESIDUAL_INPUT),
            0,
            {"hf": FormatLocation("embed_out.weight"), "mcore": FormatLocation("output_layer.weight")},
            requires="has_head",
            tied_to="embed",
        ),
    ),
    hf_fields={
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_size",
        "num_attention_heads": "num_heads",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_positions",
        "layer_norm_eps": "norm_eps",
        "hidden_act": "activation",
        "tie_word_embeddings": "tied",
        "use_parallel_residual": "parallel_residual",
        "rotary_emb_base": "rope_base",
        "rotary_pct": "rotary_fraction",
        "rope_scaling": "rope_scaling",
    },
    required_hf_values={"attention_bias": True},
    choices={"activation": ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")},
    base_prefixes={"hf": "gpt_neox."},
    ignored_names={
        "hf": ("*layers.*.attention.bias", "*layers.*.attention.masked_bias", "*.attention.rotary_emb.inv_freq")
    },
)
