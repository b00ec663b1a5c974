"""GPT-2: LayerNorm before each block, learned positions, biases on every linear.

Hugging Face stores its linears as (in, out), and q, k and v as one stacked matrix.
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
    CAUSAL,
    DROPOUT,
    OTHER_HEADS,
    Locations,
    bias_of,
    linear_params,
    locations,
    locations_below,
    norm_params,
    weight_of,
)
from megatron_ligo.arch.spec import FormatLocation, Pack, ParamSpec, Role

HF_LAYER, MCORE_LAYER = "transformer.h.{}.", "decoder.layers.{}."


def _linear(hf: str, mcore: str) -> Locations:
    return {
        "hf": FormatLocation(HF_LAYER + hf, transposed=True),
        "mcore": FormatLocation(MCORE_LAYER + mcore),
    }


def _qkv(part: int) -> Locations:
    return {
        "hf": FormatLocation(f"{HF_LAYER}attn.c_attn", Pack.STACKED, part, num_parts=3, transposed=True),
        "mcore": FormatLocation(f"{MCORE_LAYER}self_attention.linear_qkv", Pack.GROUPED, part, num_parts=3),
    }


EMBEDDING = locations("transformer.wte.weight", "embedding.word_embeddings.weight")
POSITIONS = locations("transformer.wpe.weight", "embedding.position_embeddings.weight")
NORM = locations_below(HF_LAYER, MCORE_LAYER)
QUERY, KEY, VALUE = (_qkv(part) for part in range(3))
ATTENTION_OUTPUT = _linear("attn.c_proj", "self_attention.linear_proj")
UP = _linear("mlp.c_fc", "mlp.linear_fc1")
DOWN = _linear("mlp.c_proj", "mlp.linear_fc2")
FINAL_NORM = locations("transformer.ln_f", "decoder.final_layernorm")
HEAD = locations("lm_head.weight", "output_layer.weight")

GPT2 = Architecture(
    name="gpt2",
    norm="layer",
    model_types={"gpt2": {"GPT2LMHeadModel": ("has_head",), "GPT2Model": ()}},
    params=(
        ParamSpec("embed", Role.WORD_EMBEDDING, (VOCAB_OUTPUT, RESIDUAL_OUTPUT), 0, EMBEDDING),
        ParamSpec("positions", Role.POSITION_EMBEDDING, (POSITION_OUTPUT, RESIDUAL_OUTPUT), None, POSITIONS),
        *norm_params("layers.{}.norm1", Role.ATTENTION_NORM, NORM("ln_1", "input_layernorm")),
        ParamSpec("layers.{}.q", Role.QUERY, (QUERY_OUTPUT, RESIDUAL_INPUT), 0, weight_of(QUERY)),
        ParamSpec("layers.{}.k", Role.KEY, (KEY_OUTPUT, RESIDUAL_INPUT), 0, weight_of(KEY)),
        ParamSpec("layers.{}.v", Role.VALUE, (VALUE_OUTPUT, RESIDUAL_INPUT), 0, weight_of(VALUE)),
        ParamSpec("layers.{}.q_bias", Role.QUERY, (QUERY_OUTPUT,), 0, bias_of(QUERY), is_bias=True),
        ParamSpec("layers.{}.k_bias", Role.KEY, (KEY_OUTPUT,), 0, bias_of(KEY), is_bias=True),
        ParamSpec("layers.{}.v_bias", Role.VALUE, (VALUE_OUTPUT,), 0, bias_of(VALUE), is_bias=True),
        *linear_params("layers.{}.o", Role.ATTENTION_OUTPUT, (RESIDUAL_OUTPUT, VALUE_INPUT), 1, ATTENTION_OUTPUT),
        *norm_params("layers.{}.norm2", Role.FFN_NORM, NORM("ln_2", "pre_mlp_layernorm")),
        *linear_params("layers.{}.up", Role.FFN_UP, (FFN_OUTPUT, RESIDUAL_INPUT), 0, UP),
        *linear_params("layers.{}.down", Role.FFN_DOWN, (RESIDUAL_OUTPUT, FFN_INPUT), 1, DOWN),
        *norm_params("final_norm", Role.FINAL_NORM, FINAL_NORM, feeds_head=True),
        ParamSpec("head", Role.HEAD, (VOCAB_OUTPUT, RESIDUAL_INPUT), 0, HEAD, requires="has_head", tied_to="embed"),
    ),
    hf_fields={
        "n_layer": "num_layers",
        "n_embd": "hidden_size",
        "n_inner": "ffn_size",
        "n_head": "num_heads",
        "vocab_size": "vocab_size",
        "n_positions": "max_positions",
        "layer_norm_epsilon": "norm_eps",
        "activation_function": "activation",
        "tie_word_embeddings": "tied",
    },
    required_hf_values={
        "add_cross_attention": False,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    },
    choices={"activation": ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu")},
    base_prefixes={"hf": "transformer."},
    ignored_names={"hf": ("*h.*.attn.bias", "*h.*.attn.masked_bias")},
    hf_aliases={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    hf_fixed=CAUSAL | {"sliding_window": (None,)},
    hf_harmless={
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), DROPOUT),
        **dict.fromkeys(("classifier_dropout", "hidden_dropout"), OTHER_HEADS),
        **dict.fromkeys(
            (
                "summary_type",
                "summary_use_proj",
                "summary_activation",
                "summary_proj_to_labels",
                "summary_first_dropout",
                "summary_last_dropout",
            ),
            OTHER_HEADS,
        ),
        "is_decoder": "the attention is causal anyway",
        "n_ctx": "an early name for the context length, which transformers does not read",
        "n_special": "an early count of added tokens, which transformers does not read",
        "predict_special_tokens": "an early setting of added tokens, which transformers does not read",
    },
)
