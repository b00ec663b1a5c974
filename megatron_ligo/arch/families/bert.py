"""BERT: a post-LN encoder with learned positions, token types, and an optional pooler and heads.

Megatron-core's BertModel is pre-LN: its layers have a norm before each block, and the encoder has one at the end. Here
a norm follows each residual sum, and one follows the embeddings. These three have no counterpart in Megatron-core.
Their names are in its style (`post_self_attn_layernorm`, `post_mlp_layernorm`, `embedding.layer_norm`); all other
modules use its names.

The masked-LM head's transform maps the residual space to a separate space (`head`), which the decoder reads. A tied
decoder multiplies it by the embedding, which merges the two spaces. If the decoder is not tied, transformers stores a
second head bias that the forward pass does not use (`head_spare_bias`).
"""

from collections.abc import Iterator

from megatron_ligo.arch.architecture import Architecture, Task
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
    DROPOUT,
    OTHER_HEADS,
    grouped_qkv,
    linear_params,
    locations,
    locations_below,
    norm_params,
    weight_of,
)
from megatron_ligo.arch.spec import Axis, FormatLocation, ParamSpec, Role, Use

TOKEN_TYPE_OUTPUT = Axis("token_type", Use.OUTPUT)
POOLED_OUTPUT = Axis("pooled", Use.OUTPUT)
POOLED_INPUT = Axis("pooled", Use.INPUT)
ORDER_OUTPUT = Axis("order", Use.OUTPUT)
HEAD_OUTPUT = Axis("head", Use.OUTPUT)
HEAD_INPUT = Axis("head", Use.INPUT)
HEAD_GAIN = Axis("head", Use.GAIN)
HEAD_BIAS = Axis("head", Use.BIAS)

# In the functions below, `base` is the prefix of Hugging Face's names.


def embedding_params(base: str) -> Iterator[ParamSpec]:
    module = locations_below(f"{base}embeddings.", "embedding.")
    words = weight_of(module("word_embeddings", "word_embeddings"))
    positions = weight_of(module("position_embeddings", "position_embeddings"))
    types = weight_of(module("token_type_embeddings", "tokentype_embeddings"))
    type_axes = (TOKEN_TYPE_OUTPUT, RESIDUAL_OUTPUT)
    yield ParamSpec("embed", Role.WORD_EMBEDDING, (VOCAB_OUTPUT, RESIDUAL_OUTPUT), 0, words)
    yield ParamSpec("positions", Role.POSITION_EMBEDDING, (POSITION_OUTPUT, RESIDUAL_OUTPUT), None, positions)
    yield ParamSpec("token_types", Role.TOKEN_TYPE_EMBEDDING, type_axes, None, types, requires="num_token_types")
    yield from norm_params("embed_norm", Role.EMBEDDING_NORM, module("LayerNorm", "layer_norm"))


def layer_params(base: str) -> Iterator[ParamSpec]:
    module = locations_below(f"{base}encoder.layer.{{}}.", "encoder.layers.{}.")
    query, key, value = (
        grouped_qkv(module(f"attention.self.{name}", "self_attention.linear_qkv"), part)
        for part, name in enumerate(("query", "key", "value"))
    )
    attention_output = module("attention.output.dense", "self_attention.linear_proj")
    attention_norm = module("attention.output.LayerNorm", "post_self_attn_layernorm")
    up, down = module("intermediate.dense", "mlp.linear_fc1"), module("output.dense", "mlp.linear_fc2")
    ffn_norm = module("output.LayerNorm", "post_mlp_layernorm")
    yield from linear_params("layers.{}.q", Role.QUERY, (QUERY_OUTPUT, RESIDUAL_INPUT), 0, query)
    yield from linear_params("layers.{}.k", Role.KEY, (KEY_OUTPUT, RESIDUAL_INPUT), 0, key)
    yield from linear_params("layers.{}.v", Role.VALUE, (VALUE_OUTPUT, RESIDUAL_INPUT), 0, value)
    yield from linear_params("layers.{}.o", Role.ATTENTION_OUTPUT, (RESIDUAL_OUTPUT, VALUE_INPUT), 1, attention_output)
    yield from norm_params("layers.{}.norm1", Role.ATTENTION_NORM, attention_norm)
    yield from linear_params("layers.{}.up", Role.FFN_UP, (FFN_OUTPUT, RESIDUAL_INPUT), 0, up)
    yield from linear_params("layers.{}.down", Role.FFN_DOWN, (RESIDUAL_OUTPUT, FFN_INPUT), 1, down)
    yield from norm_params("layers.{}.norm2", Role.FFN_NORM, ffn_norm)


def pooler_params(base: str) -> Iterator[ParamSpec]:
    module = locations(f"{base}pooler.dense", "pooler.dense")
    return linear_params("pooler", Role.POOLER, (POOLED_OUTPUT, RESIDUAL_INPUT), None, module, requires="has_pooler")


def head_params(dense: str, norm: str, decoder: str, bias: str) -> Iterator[ParamSpec]:
    """Yields the masked-LM head. The arguments are Hugging Face's names: the transform's linear and norm, the decoder,
    and the bias (the decoder's if embeddings are tied)."""
    transform, transform_norm = locations(dense, "lm_head.dense"), locations(norm, "lm_head.layer_norm")
    weight = locations(f"{decoder}.weight", "output_layer.weight")
    head_bias = {
        "hf": FormatLocation(f"{decoder}.bias", tied_name=bias),
        "mcore": FormatLocation("output_layer.bias"),
    }
    spare_bias = locations(bias, "lm_head.bias")
    part = {"requires": "has_head"}
    yield from linear_params("head_dense", Role.HEAD_TRANSFORM, (HEAD_OUTPUT, RESIDUAL_INPUT), None, transform, **part)
    yield from norm_params("head_norm", Role.HEAD_NORM, transform_norm, (HEAD_GAIN, HEAD_BIAS), feeds_head=True, **part)
    yield ParamSpec("head", Role.HEAD, (VOCAB_OUTPUT, HEAD_INPUT), 0, weight, tied_to="embed", **part)
    yield ParamSpec("head_bias", Role.HEAD, (VOCAB_OUTPUT,), 0, head_bias, is_bias=True, **part)
    yield ParamSpec(
        "head_spare_bias",
        Role.HEAD,
        (VOCAB_OUTPUT,),
        0,
        spare_bias,
        tied_to="head_bias",
        is_bias=True,
        unread=True,
        **part,
    )


def order_head_params() -> Iterator[ParamSpec]:
    """Yields the next-sentence head."""
    module = locations("cls.seq_relationship", "binary_head")
    axes = (ORDER_OUTPUT, POOLED_INPUT)
    return linear_params("order_head", Role.ORDER_HEAD, axes, None, module, requires="has_order_head")


HF_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_size",
    "num_attention_heads": "num_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "num_token_types",
    "layer_norm_eps": "norm_eps",
    "hidden_act": "activation",
    "tie_word_embeddings": "tied",
}
REQUIRED_HF_VALUES = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
CHOICES = {"activation": ACTIVATIONS}
ORIGINAL_RELEASE = "the original TensorFlow code reads it, transformers does not"
HF_FIXED = {"is_causal": (False, None), "sliding_window": (None,)}
HF_HARMLESS = {
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), DROPOUT),
    "classifier_dropout": OTHER_HEADS,
    **dict.fromkeys(
        (
            "directionality", "pooler_type", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
            "pooler_size_per_head",
        ),
        ORIGINAL_RELEASE,
    ),
}  # fmt: skip
IGNORED_NAMES = {"hf": ("*embeddings.position_ids", "*embeddings.token_type_ids")}
RENAMED_SUFFIXES = {"hf": {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}}

BERT = Architecture(
    name="bert",
    norm="layer",
    pre_norm=False,
    task=Task.MASKED_TOKENS,
    model_types={
        "bert": {
            "BertForPreTraining": ("has_head", "has_pooler", "has_order_head"),
            "BertForMaskedLM": ("has_head",),
            "BertModel": ("has_pooler",),
        }
    },
    params=(
        *embedding_params("bert."),
        *layer_params("bert."),
        *pooler_params("bert."),
        *head_params(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
            "cls.predictions.bias",
        ),
        *order_head_params(),
    ),
    hf_fields=HF_FIELDS,
    required_hf_values=REQUIRED_HF_VALUES,
    choices=CHOICES,
    base_prefixes={"hf": "bert."},
    ignored_names=IGNORED_NAMES,
    renamed_suffixes=RENAMED_SUFFIXES,
    hf_fixed=HF_FIXED,
    hf_harmless=HF_HARMLESS,
)
