"""ViT: an image classifier. A token for each patch of the image and one for its class, LayerNorm before each block.

A patch is seen through one linear map of all its pixels, kept as Hugging Face keeps it: (features, channels, height,
width). Each token has a position, the class's the first one. The head reads the class's token through the final norm;
its vocabulary are the labels. Megatron-core has no image classifier: what it has of a decoder bears its names.
"""

from megatron_ligo.arch.axes import (
    FROM_FFN,
    FROM_RESIDUAL,
    FROM_V,
    GAIN,
    POSITION,
    SHIFT,
    TO_FFN,
    TO_RESIDUAL,
    VOCAB,
    K,
    Q,
    V,
)
from megatron_ligo.arch.bert import pooler_rows
from megatron_ligo.arch.rows import Architecture, Axis, Pack, Row, Slot, Task, Use

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

    def slots(hf: str, mcore: str, part: int | None = None) -> dict:
        packing = () if part is None else (Pack.GROUPED, part, 3)
        return {
            "hf": Slot(f"{base}encoder.layer.{{}}.{hf}"),
            "mcore": Slot(f"decoder.layers.{{}}.{mcore}", *packing),
        }

    def two(key: str, axes: tuple[Axis, Axis], split: int, hf: str, mcore: str, part: int | None = None):
        """A linear's weight and its bias, which tensor parallelism cuts where it cuts the outputs."""
        weight, bias = (slots(f"{hf}.{kind}", f"{mcore}.{kind}", part) for kind in ("weight", "bias"))
        yield Row(f"layers.{{}}.{key}", axes, split, weight)
        yield Row(f"layers.{{}}.{key}_bias", axes[:1], 0 if split == 0 else None, bias)

    def norm(key: str, hf: str, mcore: str):
        yield Row(f"layers.{{}}.{key}", (GAIN,), None, slots(f"{hf}.weight", f"{mcore}.weight"))
        yield Row(f"layers.{{}}.{key}_bias", (SHIFT,), None, slots(f"{hf}.bias", f"{mcore}.bias"))

    qkv = "self_attention.linear_qkv"
    return (
        *norm("norm1", "layernorm_before", "input_layernorm"),
        *two("q", (Q, FROM_RESIDUAL), 0, "attention.attention.query", qkv, 0),
        *two("k", (K, FROM_RESIDUAL), 0, "attention.attention.key", qkv, 1),
        *two("v", (V, FROM_RESIDUAL), 0, "attention.attention.value", qkv, 2),
        *two("o", (TO_RESIDUAL, FROM_V), 1, "attention.output.dense", "self_attention.linear_proj"),
        *norm("norm2", "layernorm_after", "pre_mlp_layernorm"),
        *two("up", (TO_FFN, FROM_RESIDUAL), 0, "intermediate.dense", "mlp.linear_fc1"),
        *two("down", (TO_RESIDUAL, FROM_FFN), 1, "output.dense", "mlp.linear_fc2"),
    )


def end_rows(base: str) -> tuple[Row, ...]:
    """The final norm, the pooler and the head. base: the prefix of Hugging Face's names."""

    def slots(hf: str, mcore: str) -> dict:
        return {"hf": Slot(hf), "mcore": Slot(mcore)}

    norm = (f"{base}layernorm", "decoder.final_layernorm")
    head = ("classifier", "output_layer")
    (gain, shift), (weight, bias) = (
        [slots(*(f"{name}.{kind}" for name in names)) for kind in ("weight", "bias")] for names in (norm, head)
    )
    return (
        Row("final_norm", (GAIN,), None, gain, feeds_head=True),
        Row("final_norm_bias", (SHIFT,), None, shift, feeds_head=True),
        *pooler_rows(base),
        Row("head", (VOCAB, FROM_RESIDUAL), 0, weight, needs="has_head"),
        Row("head_bias", (VOCAB,), 0, bias, needs="has_head"),
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
