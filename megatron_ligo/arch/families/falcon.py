"""Falcon with rotary positions: attention and feed-forward in parallel, behind one LayerNorm or behind two.

Hugging Face fuses q, k and v group by group, as Megatron-core does. Its keys for one key and value head (7B) are read,
and written as the newer ones, which compute the same. Growth is lossless at whole multiples of hidden_size: only they
keep a LayerNorm's mean and variance.
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
    grouped_qkv,
    linear_params,
    locations,
    locations_below,
    norm_params,
    optional_bias,
)
from megatron_ligo.arch.families.llama import LLAMA
from megatron_ligo.arch.gguf_network import GgufNetwork
from megatron_ligo.arch.spec import Axis, FormatLocation, Pack, ParamSpec, Role

LAYER = locations_below("transformer.h.{}.", "decoder.layers.{}.", "blk.{}.")
QKV = LAYER("self_attention.query_key_value", "self_attention.linear_qkv")
# llama.cpp's converter takes the groups apart.
QUERY, KEY, VALUE = (
    grouped_qkv(QKV, part, formats=("hf", "mcore"))
    | {"gguf": FormatLocation("blk.{}.attn_qkv", Pack.STACKED, part, num_parts=3)}
    for part in range(3)
)
ATTENTION_OUTPUT = LAYER("self_attention.dense", "self_attention.linear_proj", "attn_output")
UP = LAYER("mlp.dense_h_to_4h", "mlp.linear_fc1", "ffn_up")
DOWN = LAYER("mlp.dense_4h_to_h", "mlp.linear_fc2", "ffn_down")
EMBEDDING = locations("transformer.word_embeddings.weight", "embedding.word_embeddings.weight", "token_embd.weight")
FINAL_NORM = locations("transformer.ln_f", "decoder.final_layernorm", "output_norm")
HEAD = locations("lm_head.weight", "output_layer.weight", "output.weight")
SHARED_NORM = LAYER("input_layernorm", "input_layernorm", "attn_norm")
ATTENTION_NORM = LAYER("ln_attn", "input_layernorm", "attn_norm_2")
FFN_NORM = LAYER("ln_mlp", "pre_mlp_layernorm", "attn_norm")
TWO_NORMS = "has_two_norms"


def _linear(key: str, role: Role, axes: tuple[Axis, Axis], tp_dim: int, module) -> tuple[ParamSpec, ...]:
    biases = {Role.ATTENTION_OUTPUT: "output_bias", Role.FFN_UP: "mlp_bias", Role.FFN_DOWN: "mlp_bias"}
    return tuple(optional_bias(linear_params(key, role, axes, tp_dim, module), biases.get(role, "qkv_bias")))


# The released models name their own code of the same network.
KINDS = ("", "ForCausalLM", "ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification")
OWN_CODE = {f"AutoModel{kind}": f"modeling_falcon.Falcon{kind or 'Model'}" for kind in KINDS}
OWN_CODE["AutoConfig"] = "configuration_falcon.FalconConfig"

FALCON = Architecture(
    name="falcon",
    norm="layer",
    model_types={"falcon": {"FalconForCausalLM": ()}},
    params=(
        ParamSpec("embed", Role.WORD_EMBEDDING, (VOCAB_OUTPUT, RESIDUAL_OUTPUT), 0, EMBEDDING),
        *norm_params("layers.{}.shared_norm", Role.ATTENTION_NORM, SHARED_NORM, excludes=TWO_NORMS),
        *norm_params("layers.{}.norm1", Role.ATTENTION_NORM, ATTENTION_NORM, requires=TWO_NORMS),
        *_linear("layers.{}.q", Role.QUERY, (QUERY_OUTPUT, RESIDUAL_INPUT), 0, QUERY),
        *_linear("layers.{}.k", Role.KEY, (KEY_OUTPUT, RESIDUAL_INPUT), 0, KEY),
        *_linear("layers.{}.v", Role.VALUE, (VALUE_OUTPUT, RESIDUAL_INPUT), 0, VALUE),
        *_linear("layers.{}.o", Role.ATTENTION_OUTPUT, (RESIDUAL_OUTPUT, VALUE_INPUT), 1, ATTENTION_OUTPUT),
        *norm_params("layers.{}.norm2", Role.FFN_NORM, FFN_NORM, requires=TWO_NORMS),
        *_linear("layers.{}.up", Role.FFN_UP, (FFN_OUTPUT, RESIDUAL_INPUT), 0, UP),
        *_linear("layers.{}.down", Role.FFN_DOWN, (RESIDUAL_OUTPUT, FFN_INPUT), 1, DOWN),
        *norm_params("final_norm", Role.FINAL_NORM, FINAL_NORM, feeds_head=True),
        ParamSpec("head", Role.HEAD, (VOCAB_OUTPUT, RESIDUAL_INPUT), 0, HEAD, tied_to="embed"),
    ),
    hf_fields={
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "ffn_size",
        "num_attention_heads": "num_heads",
        "num_kv_heads": "num_kv_heads",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_positions",
        "layer_norm_epsilon": "norm_eps",
        "activation": "activation",
        "tie_word_embeddings": "tied",
        "bias": "qkv_bias",
        "num_ln_in_parallel_attn": "num_parallel_norms",
        "rope_theta": "rope_base",
        "rope_scaling": "rope_scaling",
    },
    gguf_fields={
        **{key: name for key, name in LLAMA.gguf_fields.items() if name not in ("head_dim", "norm_eps")},
        "attention.layer_norm_epsilon": "norm_eps",
    },
    # llama.cpp computes GELU by tanh.
    gguf_network=GgufNetwork(constants={"activation": "gelu_pytorch_tanh"}),
    hf_older_forms=(
        (
            {"new_decoder_architecture": False, "multi_query": True},
            {"new_decoder_architecture": True, "num_kv_heads": 1, "num_ln_in_parallel_attn": 1},
        ),
        ({"new_decoder_architecture": False}, {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
        ({"num_ln_in_parallel_attn": None}, {"num_ln_in_parallel_attn": 2}),
    ),
    required_hf_values={"new_decoder_architecture": True, "parallel_attn": True, "alibi": False},
    coupled_fields={"falcon": {"output_bias": "qkv_bias", "mlp_bias": "qkv_bias"}},
    implied_sizes={"falcon": {"parallel_residual": True}},
    choices={"activation": ACTIVATIONS, "num_parallel_norms": (1, 2)},
    hf_aliases={"n_embed": "hidden_size"},
    hf_fixed=CAUSAL
    | {
        "sliding_window": (None,), "apply_residual_connection_post_layernorm": (False, None),
        "auto_map": (None, OWN_CODE),
    },
    hf_harmless={
        **dict.fromkeys(("attention_dropout", "hidden_dropout"), DROPOUT),
        "ff_factor": "a key of the released configs that transformers does not read",
        "multi_query": "the class ignores it beside new_decoder_architecture",
    },
)  # fmt: skip
