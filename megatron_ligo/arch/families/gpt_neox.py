"""GPT-NeoX (Pythia): LayerNorm, rotary positions on a part of each head, biases on every linear, an untied head.

Attention and feed-forward both read the layer's input (parallel_residual), or run in sequence if the config says so.
Hugging Face fuses q, k and v head by head, as Megatron-core does.
"""

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
    OTHER_HEADS,
    grouped_qkv,
    linear_params,
    locations,
    locations_below,
    norm_params,
)
from megatron_ligo.arch.spec import ParamSpec, Role

LAYER = locations_below("gpt_neox.layers.{}.", "decoder.layers.{}.")
QKV = LAYER("attention.query_key_value", "self_attention.linear_qkv")
QUERY, KEY, VALUE = (grouped_qkv(QKV, part, formats=("hf", "mcore")) for part in range(3))
ATTENTION_OUTPUT = LAYER("attention.dense", "self_attention.linear_proj")
UP = LAYER("mlp.dense_h_to_4h", "mlp.linear_fc1")
DOWN = LAYER("mlp.dense_4h_to_h", "mlp.linear_fc2")
EMBEDDING = locations("gpt_neox.embed_in.weight", "embedding.word_embeddings.weight")
FINAL_NORM = locations("gpt_neox.final_layer_norm", "decoder.final_layernorm")
HEAD = locations("embed_out.weight", "output_layer.weight")

GPT_NEOX = Architecture(
    name="gpt_neox",
    norm="layer",
    model_types={"gpt_neox": {"GPTNeoXForCausalLM": ("has_head",), "GPTNeoXModel": ()}},
    params=(
        ParamSpec("embed", Role.WORD_EMBEDDING, (VOCAB_OUTPUT, RESIDUAL_OUTPUT), 0, EMBEDDING),
        *norm_params("layers.{}.norm1", Role.ATTENTION_NORM, LAYER("input_layernorm", "input_layernorm")),
        *linear_params("layers.{}.q", Role.QUERY, (QUERY_OUTPUT, RESIDUAL_INPUT), 0, QUERY),
        *linear_params("layers.{}.k", Role.KEY, (KEY_OUTPUT, RESIDUAL_INPUT), 0, KEY),
        *linear_params("layers.{}.v", Role.VALUE, (VALUE_OUTPUT, RESIDUAL_INPUT), 0, VALUE),
        *linear_params("layers.{}.o", Role.ATTENTION_OUTPUT, (RESIDUAL_OUTPUT, VALUE_INPUT), 1, ATTENTION_OUTPUT),
        *norm_params("layers.{}.norm2", Role.FFN_NORM, LAYER("post_attention_layernorm", "pre_mlp_layernorm")),
        *linear_params("layers.{}.up", Role.FFN_UP, (FFN_OUTPUT, RESIDUAL_INPUT), 0, UP),
        *linear_params("layers.{}.down", Role.FFN_DOWN, (RESIDUAL_OUTPUT, FFN_INPUT), 1, DOWN),
        *norm_params("final_norm", Role.FINAL_NORM, FINAL_NORM, feeds_head=True),
        ParamSpec("head", Role.HEAD, (VOCAB_OUTPUT, RESIDUAL_INPUT), 0, HEAD, requires="has_head", tied_to="embed"),
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
    choices={"activation": ACTIVATIONS},
    base_prefixes={"hf": "gpt_neox."},
    hf_fixed=CAUSAL | {"sliding_window": (None,)},
    hf_harmless={
        **dict.fromkeys(("attention_dropout", "hidden_dropout"), DROPOUT),
        "classifier_dropout": OTHER_HEADS,
        "is_decoder": "the attention is causal anyway",
    },
    ignored_names={
        "hf": ("*layers.*.attention.bias", "*layers.*.attention.masked_bias", "*.attention.rotary_emb.inv_freq")
    },
)
