"""ModernBERT: an encoder with a LayerNorm before each block, rotary positions, a gate, and windows in most layers.

The norm of the embeddings stands for the first layer's attention norm. Biases are optional, and linears and norms have
none by default. The head is BERT's. Growth is lossless at whole multiples of hidden_size, as for GPT-2; new layers
write nothing. A copy of the first layer elsewhere has an attention norm with a gain of 1.

Hugging Face stacks q, k and v, and the activated half and the other half of the gated block. A window of w tokens
there is one of w // 2 before and after each token.
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_ligo.arch.architecture import Architecture, Task
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
    DROPOUT,
    OTHER_HEADS,
    Locations,
    bias_of,
    linear_params,
    locations,
    locations_below,
    norm_params,
    optional_bias,
    weight_of,
)
from megatron_ligo.arch.families.bert import HEAD_BIAS, HEAD_GAIN, HEAD_INPUT, HEAD_OUTPUT
from megatron_ligo.arch.spec import FormatLocation, Pack, ParamSpec, Role

LAYER = locations_below("model.layers.{}.", "encoder.layers.{}.")
QKV = {
    "hf": FormatLocation("model.layers.{}.attn.Wqkv", Pack.STACKED, num_parts=3),
    "mcore": FormatLocation("encoder.layers.{}.self_attention.linear_qkv", Pack.GROUPED, num_parts=3),
}
GATE_UP = {
    "hf": FormatLocation("model.layers.{}.mlp.Wi", Pack.STACKED, num_parts=2),
    "mcore": FormatLocation("encoder.layers.{}.mlp.linear_fc1", Pack.STACKED, num_parts=2),
}


def _part(module: Locations, part: int) -> Locations:
    return {name: replace(location, part=part) for name, location in module.items()}


def _norm(key: str, role: Role, module: Locations, **fields) -> Iterator[ParamSpec]:
    return optional_bias(norm_params(key, role, module, **fields), "norm_bias")


def layer_params() -> Iterator[ParamSpec]:
    attention_norm = LAYER("attn_norm", "input_layernorm")
    yield from _norm("layers.{}.norm1", Role.ATTENTION_NORM, attention_norm, skips_first_layer=True)
    parts = {"q": (Role.QUERY, QUERY_OUTPUT), "k": (Role.KEY, KEY_OUTPUT), "v": (Role.VALUE, VALUE_OUTPUT)}
    for part, (name, (role, axis)) in enumerate(parts.items()):
        linear = linear_params(f"layers.{{}}.{name}", role, (axis, RESIDUAL_INPUT), 0, _part(QKV, part))
        yield from optional_bias(linear, "qkv_bias")
    output = LAYER("attn.Wo", "self_attention.linear_proj")
    linear = linear_params("layers.{}.o", Role.ATTENTION_OUTPUT, (RESIDUAL_OUTPUT, VALUE_INPUT), 1, output)
    yield from optional_bias(linear, "output_bias")
    yield from _norm("layers.{}.norm2", Role.FFN_NORM, LAYER("mlp_norm", "pre_mlp_layernorm"))
    for part, (name, role) in enumerate({"gate": Role.FFN_GATE, "up": Role.FFN_UP}.items()):
        linear = linear_params(f"layers.{{}}.{name}", role, (FFN_OUTPUT, RESIDUAL_INPUT), 0, _part(GATE_UP, part))
        yield from optional_bias(linear, "mlp_bias")
    down = LAYER("mlp.Wo", "mlp.linear_fc2")
    linear = linear_params("layers.{}.down", Role.FFN_DOWN, (RESIDUAL_OUTPUT, FFN_INPUT), 1, down)
    yield from optional_bias(linear, "mlp_bias")


def head_params() -> Iterator[ParamSpec]:
    part = {"requires": "has_head"}
    dense, norm = locations("head.dense", "lm_head.dense"), locations("head.norm", "lm_head.layer_norm")
    head = locations("decoder", "output_layer")
    axes = (HEAD_OUTPUT, RESIDUAL_INPUT)
    linear = linear_params("head_dense", Role.HEAD_TRANSFORM, axes, None, dense, **part)
    yield from optional_bias(linear, "has_transform_bias")
    gain_and_bias = norm_params("head_norm", Role.HEAD_NORM, norm, (HEAD_GAIN, HEAD_BIAS), feeds_head=True, **part)
    yield from optional_bias(gain_and_bias, "has_head_norm_bias")
    axes = (VOCAB_OUTPUT, HEAD_INPUT)
    yield ParamSpec("head", Role.HEAD, axes, 0, weight_of(head), tied_to="embed", **part)
    yield ParamSpec("head_bias", Role.HEAD, axes[:1], 0, bias_of(head), is_bias=True, requires="has_head_bias")


EMBEDDING = locations("model.embeddings.tok_embeddings.weight", "embedding.word_embeddings.weight")
MODEL_TYPE = "modernbert"

MODERNBERT = Architecture(
    name=MODEL_TYPE,
    norm="layer",
    task=Task.MASKED_TOKENS,
    head_activation="gelu",
    model_types={MODEL_TYPE: {"ModernBertForMaskedLM": ("has_head",), "ModernBertModel": ()}},
    params=(
        ParamSpec("embed", Role.WORD_EMBEDDING, (VOCAB_OUTPUT, RESIDUAL_OUTPUT), 0, EMBEDDING),
        *_norm("embed_norm", Role.EMBEDDING_NORM, locations("model.embeddings.norm", "embedding.layer_norm")),
        *layer_params(),
        *_norm("final_norm", Role.FINAL_NORM, locations("model.final_norm", "encoder.final_layernorm")),
        *head_params(),
    ),
    hf_fields={
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_size",
        "num_attention_heads": "num_heads",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_positions",
        "norm_eps": "norm_eps",
        "hidden_activation": "activation",
        "tie_word_embeddings": "tied",
        "attention_bias": "qkv_bias",
        "mlp_bias": "mlp_bias",
        "norm_bias": "norm_bias",
        "classifier_bias": "head_transform_bias",
        "decoder_bias": "head_bias",
        "local_attention": "sliding_window",
        "global_rope_theta": "rope_base",
        "local_rope_theta": "window_rope_base",
    },
    coupled_fields={MODEL_TYPE: {"output_bias": "qkv_bias"}},
    hf_pattern_keys={MODEL_TYPE: ("layer_types", "global_attn_every_n_layers")},
    hf_rope_by_layer_type=True,
    hf_window_both_ways=True,
    required_hf_values={"classifier_activation": "gelu"},
    choices={"activation": ACTIVATIONS},
    base_prefixes={"hf": "model."},
    hf_fixed={"is_causal": (False, None), "sliding_window": (None,)},
    hf_harmless={
        **dict.fromkeys(("attention_dropout", "embedding_dropout", "mlp_dropout"), DROPOUT),
        **dict.fromkeys(("classifier_dropout", "classifier_pooling"), OTHER_HEADS),
        **dict.fromkeys(("sparse_prediction", "sparse_pred_ignore_index"), "whether a loss skips unmasked tokens"),
        "deterministic_flash_attn": "which kernel computes the same function",
        "reference_compile": "how the network is compiled",
        "repad_logits_with_grad": "how the released code laid out its batches",
        "initializer_cutoff_factor": "how weights are drawn before training",
        "layer_norm_eps": "transformers reads norm_eps",
        "position_embedding_type": "transformers does not read it: positions are rotary",
    },
)
