"""ViT: an image classifier. A token for each patch of the image and one for its class, LayerNorm before each block.

A patch is seen through one linear map of all its pixels, kept as Hugging Face keeps it: (features, channels, height,
width). Each token has a position, the class's the first one. The head reads the class's token through the final norm;
its vocabulary are the labels. Megatron-core has no image classifier: what it has of a decoder bears its names.
"""

from megatron_ligo.arch.common_axes import (
    FROM_FFN,
    FROM_RESIDUAL,
    FROM_V,
    POSITION,
    TO_FFN,
    TO_RESIDUAL,
    VOCAB,
    K,
    Q,
    V,
)
from megatron_ligo.arch.common_params import grouped, linear, norm, under
from megatron_ligo.arch.families.bert import pooler_rows
from megatron_ligo.arch.spec import Architecture, Axis, Row, Slot, Task, Use

CHANNEL = Axis("channel", Use.READS)
PIXEL = Axis("pixel", Use.READS)


def embedding_rows(base: str) -> tuple[Row, ...]:
    """base: the prefix of Hugging Face's names."""

    def slots(hf: str, mcore: str, unit_dims: int = 0) -> dict:
        return {"hf": Slot(f"{base}embeddings.{hf}", unit_dims=unit_dims), "mcore": Slot(f"embedding.{mcore}")}

    patch = ("patch_embeddings.projection", "patch_embeddings")
    weight, bias = (slots(*(f"{name}.{kind}" for name in patch)) for kind in ("weight", "bias"))
    return (
        Row("patch", (TO_RESIDUAL, CHANNEL, PIXEL, PIXEL), None, weight),
        Row("patch_bias", (TO_RESIDUAL,), None, bias),
        Row("class_token", (TO_RESIDUAL,), None, slots("cls_token", "class_token", 2)),
        Row(
            "distillation_token",
            (TO_RESIDUAL,),
            None,
            slots("distillation_token", "distillation_token", 2),
            needs="has_distillation",
        ),
        Row("positions", (POSITION, TO_RESIDUAL), None, slots("position_embeddings", "position_embeddings.weight", 1)),
    )


def layer_rows(base: str) -> tuple[Row, ...]:
    """base: the prefix of Hugging Face's names."""
    hf, mcore = under(f"{base}encoder.layer.{{}}."), under("decoder.layers.{}.")
    qkv, proj = mcore("self_attention.linear_qkv"), mcore("self_attention.linear_proj")
    return (
        *norm("layers.{}.norm1", hf("layernorm_before"), mcore("input_layernorm")),
        *linear("layers.{}.q", (Q, FROM_RESIDUAL), 0, hf("attention.attention.query"), grouped(qkv, 0)),
        *linear("layers.{}.k", (K, FROM_RESIDUAL), 0, hf("attention.attention.key"), grouped(qkv, 1)),
        *linear("layers.{}.v", (V, FROM_RESIDUAL), 0, hf("attention.attention.value"), grouped(qkv, 2)),
        *linear("layers.{}.o", (TO_RESIDUAL, FROM_V), 1, hf("attention.output.dense"), proj),
        *norm("layers.{}.norm2", hf("layernorm_after"), mcore("pre_mlp_layernorm")),
        *linear("layers.{}.up", (TO_FFN, FROM_RESIDUAL), 0, hf("intermediate.dense"), mcore("mlp.linear_fc1")),
        *linear("layers.{}.down", (TO_RESIDUAL, FROM_FFN), 1, hf("output.dense"), mcore("mlp.linear_fc2")),
    )


def end_rows(base: str) -> tuple[Row, ...]:
    """The final norm, the pooler and the head. base: the prefix of Hugging Face's names."""
    head = Slot("classifier"), Slot("output_layer")
    return (
        *norm("final_norm", Slot(f"{base}layernorm"), Slot("decoder.final_layernorm"), feeds_head=True),
        *pooler_rows(base),
        *linear("head", (VOCAB, FROM_RESIDUAL), 0, *head, needs="has_head"),
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
    rows=(*embedding_rows("vit."), *layer_rows("vit."), *end_rows("vit.")),
    hf=HF,
    fixed_hf=FIXED_HF,
    choices=CHOICES,
    refused={"ViTForMaskedImageModeling": "it has a decoder of pixels, which the table has no row for"},
    implied={"vit": {"has_distillation": False}},
    base={"hf": "vit."},
)
