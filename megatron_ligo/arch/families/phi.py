"""Phi (1, 1.5 and 2): attention and feed-forward read one LayerNorm, rotary positions turn a part of each head, and
every linear has a bias, the head too.

Growth is lossless at whole multiples of hidden_size: only they keep a LayerNorm's mean and variance.
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
    bias_of,
    grouped_qkv,
    linear_params,
    locations,
    locations_below,
    norm_params,
    weight_of,
)
from megatron_ligo.arch.families.llama import LLAMA
from megatron_ligo.arch.gguf_network import GgufNetwork
from megatron_ligo.arch.spec import ParamSpec, Role

LAYER = locations_below("model.layers.{}.", "decoder.layers.{}.", "blk.{}.")
QUERY, KEY, VALUE = (
    grouped_qkv(LAYER(f"self_attn.{name}_proj", "self_attention.linear_qkv", f"attn_{name}"), part)
    for part, name in enumerate("qkv")
)
ATTENTION_OUTPUT = LAYER("self_attn.dense", "self_attention.linear_proj", "attn_output")
UP, DOWN = LAYER("mlp.fc1", "mlp.linear_fc1", "ffn_up"), LAYER("mlp.fc2", "mlp.linear_fc2", "ffn_down")
ATTENTION_NORM = LAYER("input_layernorm", "input_layernorm", "attn_norm")
EMBEDDING = locations("model.embed_tokens.weight", "embedding.word_embeddings.weight", "token_embd.weight")
FINAL_NORM = locations("model.final_layernorm", "decoder.final_layernorm", "output_norm")
HEAD = locations("lm_head", "output_layer", "output")

PHI = Architecture(
    name="phi",
    norm="layer",
    model_types={"phi": {"PhiForCausalLM": ()}},
    params=(
        ParamSpec("embed", Role.WORD_EMBEDDING, (VOCAB_OUTPUT, RESIDUAL_OUTPUT), 0, EMBEDDING),
        *norm_params("layers.{}.norm1", Role.ATTENTION_NORM, ATTENTION_NORM),
        *linear_params("layers.{}.q", Role.QUERY, (QUERY_OUTPUT, RESIDUAL_INPUT), 0, QUERY),
        *linear_params("layers.{}.k", Role.KEY, (KEY_OUTPUT, RESIDUAL_INPUT), 0, KEY),
        *linear_params("layers.{}.v", Role.VALUE, (VALUE_OUTPUT, RESIDUAL_INPUT), 0, VALUE),
        *linear_params("layers.{}.o", Role.ATTENTION_OUTPUT, (RESIDUAL_OUTPUT, VALUE_INPUT), 1, ATTENTION_OUTPUT),
        *linear_params("layers.{}.up", Role.FFN_UP, (FFN_OUTPUT, RESIDUAL_INPUT), 0, UP),
        *linear_params("layers.{}.down", Role.FFN_DOWN, (RESIDUAL_OUTPUT, FFN_INPUT), 1, DOWN),
        *norm_params("final_norm", Role.FINAL_NORM, FINAL_NORM, feeds_head=True),
        ParamSpec("head", Role.HEAD, (VOCAB_OUTPUT, RESIDUAL_INPUT), 0, weight_of(HEAD), tied_to="embed"),
        ParamSpec("head_bias", Role.HEAD, (VOCAB_OUTPUT,), 0, bias_of(HEAD), is_bias=True),
    ),
    hf_fields={
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_size",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": "head_dim",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_positions",
        "layer_norm_eps": "norm_eps",
        "hidden_act": "activation",
        "tie_word_embeddings": "tied",
        "partial_rotary_factor": "rotary_fraction",
        "rope_theta": "rope_base",
        "rope_scaling": "rope_scaling",
    },
    gguf_fields={
        **{key: name for key, name in LLAMA.gguf_fields.items() if name not in ("head_dim", "norm_eps")},
        "attention.layer_norm_epsilon": "norm_eps",
    },
    # llama.cpp computes GELU by tanh.
    gguf_network=GgufNetwork(names={"phi2": "phi"}, constants={"activation": "gelu_new"}),
    required_hf_values={"qk_layernorm": False},
    implied_sizes={"phi": {"parallel_residual": True}},
    choices={"activation": ACTIVATIONS},
    hf_fixed=CAUSAL | {"sliding_window": (None,)},
    hf_harmless=dict.fromkeys(("attention_dropout", "embd_pdrop", "resid_pdrop"), DROPOUT),
)
