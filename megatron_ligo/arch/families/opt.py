"""OPT: GPT-2's network with separate q, k and v, ReLU, and positions that start at row 2 of their table.

Growth is lossless at whole multiples of hidden_size, as for GPT-2. eps is a constant of its class, so the large model
has the small one's: whole copies keep a LayerNorm's variance.
"""

from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.common_axes import (
    FFN_INPUT,
    FFN_OUTPUT,
    KEY_OUTPUT,
    POSITION_OUTPUT,
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
from megatron_ligo.arch.spec import ParamSpec, Role

LAYER = locations_below("model.decoder.layers.{}.", "decoder.layers.{}.")
QUERY, KEY, VALUE = (
    grouped_qkv(LAYER(f"self_attn.{name}_proj", "self_attention.linear_qkv"), part) for part, name in enumerate("qkv")
)
ATTENTION_OUTPUT = LAYER("self_attn.out_proj", "self_attention.linear_proj")
UP, DOWN = LAYER("fc1", "mlp.linear_fc1"), LAYER("fc2", "mlp.linear_fc2")
EMBEDDING = locations("model.decoder.embed_tokens.weight", "embedding.word_embeddings.weight")
POSITIONS = locations("model.decoder.embed_positions.weight", "embedding.position_embeddings.weight")
FINAL_NORM = locations("model.decoder.final_layer_norm", "decoder.final_layernorm")
HEAD = locations("lm_head.weight", "output_layer.weight")

OPT = Architecture(
    name="opt",
    norm="layer",
    model_types={"opt": {"OPTForCausalLM": ()}},
    params=(
        ParamSpec("embed", Role.WORD_EMBEDDING, (VOCAB_OUTPUT, RESIDUAL_OUTPUT), 0, EMBEDDING),
        ParamSpec("positions", Role.POSITION_EMBEDDING, (POSITION_OUTPUT, RESIDUAL_OUTPUT), None, POSITIONS),
        *norm_params("layers.{}.norm1", Role.ATTENTION_NORM, LAYER("self_attn_layer_norm", "input_layernorm")),
        *linear_params("layers.{}.q", Role.QUERY, (QUERY_OUTPUT, RESIDUAL_INPUT), 0, QUERY),
        *linear_params("layers.{}.k", Role.KEY, (KEY_OUTPUT, RESIDUAL_INPUT), 0, KEY),
        *linear_params("layers.{}.v", Role.VALUE, (VALUE_OUTPUT, RESIDUAL_INPUT), 0, VALUE),
        *linear_params("layers.{}.o", Role.ATTENTION_OUTPUT, (RESIDUAL_OUTPUT, VALUE_INPUT), 1, ATTENTION_OUTPUT),
        *norm_params("layers.{}.norm2", Role.FFN_NORM, LAYER("final_layer_norm", "pre_mlp_layernorm")),
        *linear_params("layers.{}.up", Role.FFN_UP, (FFN_OUTPUT, RESIDUAL_INPUT), 0, UP),
        *linear_params("layers.{}.down", Role.FFN_DOWN, (RESIDUAL_OUTPUT, FFN_INPUT), 1, DOWN),
        *norm_params("final_norm", Role.FINAL_NORM, FINAL_NORM, feeds_head=True),
        ParamSpec("head", Role.HEAD, (VOCAB_OUTPUT, RESIDUAL_INPUT), 0, HEAD, tied_to="embed"),
    ),
    hf_fields={
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "word_embed_proj_dim": "hidden_size",
        "ffn_dim": "ffn_size",
        "num_attention_heads": "num_heads",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_positions",
        "activation_function": "activation",
        "tie_word_embeddings": "tied",
    },
    required_hf_values={
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
    },
    implied_sizes={"opt": {"norm_eps": 1e-5, "position_offset": 2}},
    choices={"activation": ACTIVATIONS},
    hf_fixed=CAUSAL | {"sliding_window": (None,)},
    hf_harmless=dict.fromkeys(("dropout", "attention_dropout", "layerdrop", "activation_dropout"), DROPOUT),
)
