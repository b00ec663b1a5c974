"""ViT: an image classifier with LayerNorm before each block, a token for each patch, and a class token.

One linear embeds all pixels of a patch. Its weight is stored as in Hugging Face: (features, channels, height, width).
Each token has a learned position; the class token's is the first. The head reads the class token after the final norm,
and its vocabulary is the set of labels. Megatron-core has no image classifier; modules that its decoder also has
use its names.
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
    Locations,
    bias_of,
    grouped_qkv,
    linear_params,
    locations,
    locations_below,
    norm_params,
    weight_of,
)
from megatron_ligo.arch.families.bert import pooler_params
from megatron_ligo.arch.spec import Axis, FormatLocation, ParamSpec, Role, Use

CHANNEL_INPUT = Axis("channel", Use.INPUT)
PIXEL_INPUT = Axis("pixel", Use.INPUT)

# In the functions below, `base` is the prefix of Hugging Face's names.


def embedding_params(base: str) -> Iterator[ParamSpec]:
    def tensor(hf: str, mcore: str, unit_dims: int) -> Locations:
        return {
            "hf": FormatLocation(f"{base}embeddings.{hf}", unit_dims=unit_dims),
            "mcore": FormatLocation(f"embedding.{mcore}"),
        }

    patch = locations(f"{base}embeddings.patch_embeddings.projection", "embedding.patch_embeddings")
    class_token = tensor("cls_token", "class_token", unit_dims=2)
    distillation = tensor("distillation_token", "distillation_token", unit_dims=2)
    positions = tensor("position_embeddings", "position_embeddings.weight", unit_dims=1)
    patch_axes = (RESIDUAL_OUTPUT, CHANNEL_INPUT, PIXEL_INPUT, PIXEL_INPUT)
    part = {"requires": "has_distillation"}
    yield ParamSpec("patch", Role.PATCH_EMBEDDING, patch_axes, None, weight_of(patch))
    yield ParamSpec("patch_bias", Role.PATCH_EMBEDDING, (RESIDUAL_OUTPUT,), None, bias_of(patch), is_bias=True)
    yield ParamSpec("class_token", Role.CLASS_TOKEN, (RESIDUAL_OUTPUT,), None, class_token)
    yield ParamSpec("distillation_token", Role.DISTILLATION_TOKEN, (RESIDUAL_OUTPUT,), None, distillation, **part)
    yield ParamSpec("positions", Role.POSITION_EMBEDDING, (POSITION_OUTPUT, RESIDUAL_OUTPUT), None, positions)


def layer_params(base: str) -> Iterator[ParamSpec]:
    module = locations_below(f"{base}encoder.layer.{{}}.", "decoder.layers.{}.")
    query, key, value = (
        grouped_qkv(module(f"attention.attention.{name}", "self_attention.linear_qkv"), part)
        for part, name in enumerate(("query", "key", "value"))
    )
    attention_output = module("attention.output.dense", "self_attention.linear_proj")
    attention_norm = module("layernorm_before", "input_layernorm")
    up, down = module("intermediate.dense", "mlp.linear_fc1"), module("output.dense", "mlp.linear_fc2")
    ffn_norm = module("layernorm_after", "pre_mlp_layernorm")
    yield from norm_params("layers.{}.norm1", Role.ATTENTION_NORM, attention_norm)
    yield from linear_params("layers.{}.q", Role.QUERY, (QUERY_OUTPUT, RESIDUAL_INPUT), 0, query)
    yield from linear_params("layers.{}.k", Role.KEY, (KEY_OUTPUT, RESIDUAL_INPUT), 0, key)
    yield from linear_params("layers.{}.v", Role.VALUE, (VALUE_OUTPUT, RESIDUAL_INPUT), 0, value)
    yield from linear_params("layers.{}.o", Role.ATTENTION_OUTPUT, (RESIDUAL_OUTPUT, VALUE_INPUT), 1, attention_output)
    yield from norm_params("layers.{}.norm2", Role.FFN_NORM, ffn_norm)
    yield from linear_params("layers.{}.up", Role.FFN_UP, (FFN_OUTPUT, RESIDUAL_INPUT), 0, up)
    yield from linear_params("layers.{}.down", Role.FFN_DOWN, (RESIDUAL_OUTPUT, FFN_INPUT), 1, down)


def last_params(base: str) -> Iterator[ParamSpec]:
    """Yields the final norm, the pooler and the head."""
    final_norm = locations(f"{base}layernorm", "decoder.final_layernorm")
    head = locations("classifier", "output_layer")
    yield from norm_params("final_norm", Role.FINAL_NORM, final_norm, feeds_head=True)
    yield from pooler_params(base)
    yield from linear_params("head", Role.HEAD, (VOCAB_OUTPUT, RESIDUAL_INPUT), 0, head, requires="has_head")


HF_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "pooler_output_size": "hidden_size",
    "intermediate_size": "ffn_size",
    "num_attention_heads": "num_heads",
    "num_labels": "vocab_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "num_channels",
    "layer_norm_eps": "norm_eps",
    "hidden_act": "activation",
}
REQUIRED_HF_VALUES = {"qkv_bias": True, "pooler_act": "tanh"}
CHOICES = {"activation": ACTIVATIONS}
HF_FIXED = {"is_causal": (False, None), "sliding_window": (None,)}
HF_HARMLESS = {
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), DROPOUT),
    "encoder_stride": OTHER_HEADS,
    **dict.fromkeys(("vocab_size", "tie_word_embeddings"), "there are no words"),
    "is_decoder": "transformers reads it in text models only",
}

VIT = Architecture(
    name="vit",
    norm="layer",
    task=Task.LABEL,
    model_types={"vit": {"ViTForImageClassification": ("has_head",), "ViTModel": ("has_pooler",)}},
    params=(*embedding_params("vit."), *layer_params("vit."), *last_params("vit.")),
    hf_fields=HF_FIELDS,
    required_hf_values=REQUIRED_HF_VALUES,
    choices=CHOICES,
    refused_classes={"ViTForMaskedImageModeling": "it has a decoder of pixels, which the table does not describe"},
    implied_sizes={"vit": {"has_distillation": False}},
    base_prefixes={"hf": "vit."},
    hf_fixed=HF_FIXED,
    hf_harmless=HF_HARMLESS,
)
