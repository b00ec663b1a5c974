"""ViT: an image classifier. A token for each patch of the image and one for its class, LayerNorm before each block.

A patch is seen through one linear map of all its pixels, kept as Hugging Face keeps it: (features, channels, height,
width). Each token has a position, the class's the first one. The head reads the class's token through the final norm;
its vocabulary are the labels. Megatron-core has no image classifier: what it has of a decoder bears its names.
"""

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
from megatron_ligo.arch.common_params import grouped_qkv, linear_params, norm_params, prefixed
from megatron_ligo.arch.families.bert import pooler_params
from megatron_ligo.arch.spec import Axis, FormatLocation, ParamSpec, Role, Use

CHANNEL = Axis("channel", Use.INPUT)
PIXEL = Axis("pixel", Use.INPUT)


def embedding_params(base: str) -> tuple[ParamSpec, ...]:
    """base: the prefix of Hugging Face's names."""

    def slots(hf: str, mcore: str, unit_dims: int = 0) -> dict:
        return {
            "hf": FormatLocation(f"{base}embeddings.{hf}", unit_dims=unit_dims),
            "mcore": FormatLocation(f"embedding.{mcore}"),
        }

    patch = ("patch_embeddings.projection", "patch_embeddings")
    weight, bias = (slots(*(f"{name}.{kind}" for name in patch)) for kind in ("weight", "bias"))
    return (
        ParamSpec("patch", Role.PATCH_EMBEDDING, (RESIDUAL_OUTPUT, CHANNEL, PIXEL, PIXEL), None, weight),
        ParamSpec("patch_bias", Role.PATCH_EMBEDDING, (RESIDUAL_OUTPUT,), None, bias, is_bias=True),
        ParamSpec("class_token", Role.CLASS_TOKEN, (RESIDUAL_OUTPUT,), None, slots("cls_token", "class_token", 2)),
        ParamSpec(
            "distillation_token",
            Role.DISTILLATION_TOKEN,
            (RESIDUAL_OUTPUT,),
            None,
            slots("distillation_token", "distillation_token", 2),
            requires="has_distillation",
        ),
        ParamSpec(
            "positions",
            Role.POSITION_EMBEDDING,
            (POSITION_OUTPUT, RESIDUAL_OUTPUT),
            None,
            slots("position_embeddings", "position_embeddings.weight", 1),
        ),
    )


def layer_params(base: str) -> tuple[ParamSpec, ...]:
    """base: the prefix of Hugging Face's names."""
    hf, mcore = prefixed(f"{base}encoder.layer.{{}}."), prefixed("decoder.layers.{}.")
    qkv, proj = mcore("self_attention.linear_qkv"), mcore("self_attention.linear_proj")
    return (
        *norm_params("layers.{}.norm1", Role.ATTENTION_NORM, hf("layernorm_before"), mcore("input_layernorm")),
        *linear_params(
            "layers.{}.q",
            Role.QUERY,
            (QUERY_OUTPUT, RESIDUAL_INPUT),
            0,
            hf("attention.attention.query"),
            grouped_qkv(qkv, 0),
        ),
        *linear_params(
            "layers.{}.k", Role.KEY, (KEY_OUTPUT, RESIDUAL_INPUT), 0, hf("attention.attention.key"), grouped_qkv(qkv, 1)
        ),
        *linear_params(
            "layers.{}.v",
            Role.VALUE,
            (VALUE_OUTPUT, RESIDUAL_INPUT),
            0,
            hf("attention.attention.value"),
            grouped_qkv(qkv, 2),
        ),
        *linear_params(
            "layers.{}.o", Role.ATTENTION_OUTPUT, (RESIDUAL_OUTPUT, VALUE_INPUT), 1, hf("attention.output.dense"), proj
        ),
        *norm_params("layers.{}.norm2", Role.FFN_NORM, hf("layernorm_after"), mcore("pre_mlp_layernorm")),
        *linear_params(
            "layers.{}.up",
            Role.FFN_UP,
            (FFN_OUTPUT, RESIDUAL_INPUT),
            0,
            hf("intermediate.dense"),
            mcore("mlp.linear_fc1"),
        ),
        *linear_params(
            "layers.{}.down",
            Role.FFN_DOWN,
            (RESIDUAL_OUTPUT, FFN_INPUT),
            1,
            hf("output.dense"),
            mcore("mlp.linear_fc2"),
        ),
    )


def end_params(base: str) -> tuple[ParamSpec, ...]:
    """The final norm, the pooler and the head. base: the prefix of Hugging Face's names."""
    head = FormatLocation("classifier"), FormatLocation("output_layer")
    return (
        *norm_params(
            "final_norm",
            Role.FINAL_NORM,
            FormatLocation(f"{base}layernorm"),
            FormatLocation("decoder.final_layernorm"),
            feeds_head=True,
        ),
        *pooler_params(base),
        *linear_params("head", Role.HEAD, (VOCAB_OUTPUT, RESIDUAL_INPUT), 0, *head, requires="has_head"),
    )


HF = {
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
FIXED_HF = {"qkv_bias": True, "pooler_act": "tanh"}
CHOICES = {"activation": ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")}

VIT = Architecture(
    name="vit",
    norm="layer",
    task=Task.LABEL,
    model_types={"vit": {"ViTForImageClassification": ("has_head",), "ViTModel": ("has_pooler",)}},
    params=(*embedding_params("vit."), *layer_params("vit."), *end_params("vit.")),
    hf_fields=HF,
    required_hf_values=FIXED_HF,
    choices=CHOICES,
    refused_classes={"ViTForMaskedImageModeling": "it has a decoder of pixels, which the table has no row for"},
    implied_sizes={"vit": {"has_distillation": False}},
    base_prefixes={"hf": "vit."},
)
