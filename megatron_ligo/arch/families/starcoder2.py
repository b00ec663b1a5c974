"""StarCoder2: LayerNorms, rotary positions, grouped-query attention, a feed-forward block without a gate.
All linears have biases, or none.

Growth is lossless at whole multiples of hidden_size, as for GPT-2: only they keep a LayerNorm's mean and variance.
Heads, KV groups and neurons may grow at any ratio.
"""

from collections.abc import Iterator
from dataclasses import replace

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
from megatron_ligo.arch.common_params import (
    ACTIVATIONS,
    CAUSAL,
    DROPOUT,
    grouped_qkv,
    linear_params,
    locations,
    locations_below,
    norm_params,
)
from megatron_ligo.arch.families.llama import ATTENTION_BIASES, LLAMA
from megatron_ligo.arch.gguf_network import GgufNetwork
from megatron_ligo.arch.spec import ParamSpec, Role

LAYER = locations_below("model.layers.{}.", "decoder.layers.{}.", "blk.{}.")
QUERY, KEY, VALUE = (
    grouped_qkv(LAYER(f"self_attn.{name}_proj", "self_attention.linear_qkv", f"attn_{name}"), part)
    for part, name in enumerate("qkv")
)
ATTENTION_OUTPUT = LAYER("self_attn.o_proj", "self_attention.linear_proj", "attn_output")
UP, DOWN = LAYER("mlp.c_fc", "mlp.linear_fc1", "ffn_up"), LAYER("mlp.c_proj", "mlp.linear_fc2", "ffn_down")
ATTENTION_NORM = LAYER("input_layernorm", "input_layernorm", "attn_norm")
FFN_NORM = LAYER("post_attention_layernorm", "pre_mlp_layernorm", "ffn_norm")
EMBEDDING = locations("model.embed_tokens.weight", "embedding.word_embeddings.weight", "token_embd.weight")
FINAL_NORM = locations("model.norm", "decoder.final_layernorm", "output_norm")
HEAD = locations("lm_head.weight", "output_layer.weight", "output.weight")

BIAS_FLAGS = {
    **dict.fromkeys((Role.QUERY, Role.KEY, Role.VALUE), "qkv_bias"),
    Role.ATTENTION_OUTPUT: "output_bias",
    **dict.fromkeys((Role.FFN_UP, Role.FFN_DOWN), "mlp_bias"),
}
PARAMS = (
    ParamSpec("embed", Role.WORD_EMBEDDING, (VOCAB_OUTPUT, RESIDUAL_OUTPUT), 0, EMBEDDING),
    *norm_params("layers.{}.norm1", Role.ATTENTION_NORM, ATTENTION_NORM),
    *linear_params("layers.{}.q", Role.QUERY, (QUERY_OUTPUT, RESIDUAL_INPUT), 0, QUERY),
    *linear_params("layers.{}.k", Role.KEY, (KEY_OUTPUT, RESIDUAL_INPUT), 0, KEY),
    *linear_params("layers.{}.v", Role.VALUE, (VALUE_OUTPUT, RESIDUAL_INPUT), 0, VALUE),
    *linear_params("layers.{}.o", Role.ATTENTION_OUTPUT, (RESIDUAL_OUTPUT, VALUE_INPUT), 1, ATTENTION_OUTPUT),
    *norm_params("layers.{}.norm2", Role.FFN_NORM, FFN_NORM),
    *linear_params("layers.{}.up", Role.FFN_UP, (FFN_OUTPUT, RESIDUAL_INPUT), 0, UP),
    *linear_params("layers.{}.down", Role.FFN_DOWN, (RESIDUAL_OUTPUT, FFN_INPUT), 1, DOWN),
    *norm_params("final_norm", Role.FINAL_NORM, FINAL_NORM, feeds_head=True),
    ParamSpec("head", Role.HEAD, (VOCAB_OUTPUT, RESIDUAL_INPUT), 0, HEAD, tied_to="embed"),
)


def _with_optional_biases() -> Iterator[ParamSpec]:
    for param in PARAMS:
        yield replace(param, requires=BIAS_FLAGS.get(param.role, "")) if param.is_bias else param


STARCODER2 = Architecture(
    name="starcoder2",
    norm="layer",
    model_types={"starcoder2": {"Starcoder2ForCausalLM": ()}},
    params=tuple(_with_optional_biases()),
    hf_fields={
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_size",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_positions",
        "norm_epsilon": "norm_eps",
        "hidden_act": "activation",
        "tie_word_embeddings": "tied",
        "rope_theta": "rope_base",
        "rope_scaling": "rope_scaling",
        "sliding_window": "sliding_window",
        "use_bias": "mlp_bias",
    },
    gguf_fields={
        **{key: name for key, name in LLAMA.gguf_fields.items() if name not in ("head_dim", "norm_eps")},
        "attention.layer_norm_epsilon": "norm_eps",
    },
    # llama.cpp computes GELU by tanh, and knows no window: its files state none.
    gguf_network=GgufNetwork(constants={"activation": "gelu_pytorch_tanh"}),
    coupled_fields={"starcoder2": dict.fromkeys(ATTENTION_BIASES, "mlp_bias")},
    choices={"activation": ACTIVATIONS},
    hf_fixed=CAUSAL | {"mlp_type": ("default", None), "norm_type": ("layer_norm", None)},
    hf_harmless={
        **dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), DROPOUT),
        **dict.fromkeys(
            (
                "activation_function",
                "rms_norm_eps",
                "layer_norm_epsilon",
                "scale_attn_weights",
                "attention_softmax_in_fp32",
                "scale_attention_softmax_in_fp32",
            ),
            "a key of the released configs that transformers does not read",
        ),
    },
    ignored_names={"hf": ("model.layers.*.self_attn.rotary_emb.inv_freq",)},
)
