"""DINOv2: ViT whose blocks' outputs are scaled by learned numbers, and whose classifier reads the class token and the
mean of the patches.

Growth is ViT's, at whole multiples of hidden_size. A scale follows no norm: what a block returns is E y for the small
y, so each feature's scale is copied as it is, and scale * E y is E times the small output. The classifier's halves
read the same features. The config states the feed-forward size as a multiple of hidden_size: it grows with it.
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_ligo.arch.common_axes import (
    FFN_INPUT,
    FFN_OUTPUT,
    RESIDUAL_GAIN,
    RESIDUAL_INPUT,
    RESIDUAL_OUTPUT,
    VOCAB_OUTPUT,
)
from megatron_ligo.arch.common_params import Locations, bias_of, linear_params, locations, locations_below, weight_of
from megatron_ligo.arch.families import vit
from megatron_ligo.arch.spec import Axis, FormatLocation, Pack, ParamSpec, Role, Use

REGISTER_OUTPUT = Axis("register", Use.OUTPUT)
NORM_NAMES = {"layernorm_before": "norm1", "layernorm_after": "norm2"}
QKV = (Role.QUERY, Role.KEY, Role.VALUE)
FFN = (Role.FFN_UP, Role.FFN_DOWN)

# In the functions below, `base` is the prefix of Hugging Face's names.


def embedding_params(base: str, mask_flag: str) -> Iterator[ParamSpec]:
    """Yields ViT's embeddings, the register tokens and the mask token. mask_flag: states whether the latter exists."""

    def tensor(name: str) -> Locations:
        return {
            "hf": FormatLocation(f"{base}embeddings.{name}", unit_dims=1),
            "mcore": FormatLocation(f"embedding.{name}"),
        }

    yield from (param for param in vit.embedding_params(base) if not param.requires)
    registers = tensor("register_tokens")
    register_axes = (REGISTER_OUTPUT, RESIDUAL_OUTPUT)
    yield ParamSpec("registers", Role.REGISTER_TOKENS, register_axes, None, registers, requires="num_registers")
    mask, axes = tensor("mask_token"), (RESIDUAL_OUTPUT,)
    yield ParamSpec("mask_token", Role.MASK_TOKEN, axes, None, mask, requires=mask_flag, unread=True)


def layer_params(base: str) -> Iterator[ParamSpec]:
    module = locations_below(f"{base}encoder.layer.{{}}.", "decoder.layers.{}.")
    for param in vit.layer_params(base):
        if param.role in FFN:
            continue
        name = param.locations["hf"].name
        for old, new in NORM_NAMES.items():
            name = name.replace(old, new)
        part = "qkv_bias" if param.role in QKV and param.is_bias else ""
        yield replace(
            param, locations=param.locations | {"hf": replace(param.locations["hf"], name=name)}, requires=part
        )
    for number, name in enumerate(("self_attn", "mlp"), 1):
        scale = module(f"layer_scale{number}.lambda1", f"post_{name}_scale.weight")
        role = (Role.ATTENTION_OUTPUT_SCALE, Role.FFN_OUTPUT_SCALE)[number - 1]
        yield ParamSpec(f"layers.{{}}.scale{number}", role, (RESIDUAL_GAIN,), None, scale)
    yield from _ffn_params(module)


def _ffn_params(module) -> Iterator[ParamSpec]:
    """Yields the feed-forward block without a gate, and that with a gate, whose file fuses gate and up."""
    up, down = module("mlp.fc1", "mlp.linear_fc1"), module("mlp.fc2", "mlp.linear_fc2")
    ups, downs = (FFN_OUTPUT, RESIDUAL_INPUT), (RESIDUAL_OUTPUT, FFN_INPUT)
    yield from linear_params("layers.{}.up", Role.FFN_UP, ups, 0, up, excludes="has_gate")
    yield from linear_params("layers.{}.down", Role.FFN_DOWN, downs, 1, down, excludes="has_gate")
    fused = module("mlp.weights_in", "mlp.linear_fc1")
    gate, gated_up = (
        {form: replace(place, pack=Pack.STACKED, part=part, num_parts=2) for form, place in fused.items()}
        for part in range(2)
    )
    gated_down = module("mlp.weights_out", "mlp.linear_fc2")
    yield from linear_params("layers.{}.gate", Role.FFN_GATE, ups, 0, gate, requires="has_gate")
    yield from linear_params("layers.{}.gated_up", Role.FFN_UP, ups, 0, gated_up, requires="has_gate")
    yield from linear_params("layers.{}.gated_down", Role.FFN_DOWN, downs, 1, gated_down, requires="has_gate")


def last_params(base: str) -> Iterator[ParamSpec]:
    """Yields the final norm and the two halves of the head, which the file joins along their inputs."""
    yield from (param for param in vit.last_params(base) if param.role is Role.FINAL_NORM)
    head = locations("classifier", "output_layer")
    half, other = (
        {
            "hf": replace(head["hf"], pack=Pack.JOINED, part=part, num_parts=2),
            "mcore": FormatLocation(name),
        }
        for part, name in enumerate(("output_layer", "patch_output_layer"))
    )
    axes, part = (VOCAB_OUTPUT, RESIDUAL_INPUT), {"requires": "has_head"}
    yield ParamSpec("head", Role.HEAD, axes, 0, weight_of(half), **part)
    yield ParamSpec("patch_head", Role.PATCH_HEAD, axes, 0, weight_of(other), **part)
    yield ParamSpec("head_bias", Role.HEAD, axes[:1], 0, bias_of(head), is_bias=True, **part)


def params_of(base: str, mask_flag: str = "") -> tuple[ParamSpec, ...]:
    """Returns every parameter. mask_flag: the field that states whether there is a mask token ("" = always)."""
    return (*embedding_params(base, mask_flag), *layer_params(base), *last_params(base))


HF_FIELDS = {
    **{key: name for key, name in vit.HF_FIELDS.items() if key not in ("pooler_output_size", "intermediate_size")},
    "qkv_bias": "qkv_bias",
    "use_swiglu_ffn": "has_gate",
}

DINOV2 = replace(
    vit.VIT,
    name="dinov2",
    model_types={"dinov2": {"Dinov2ForImageClassification": ("has_head",), "Dinov2Model": ()}},
    params=params_of("dinov2.", "has_mask_token"),
    hf_fields=HF_FIELDS | {"use_mask_token": "has_mask_token"},
    ffn_ratio_key="mlp_ratio",
    gate_activation="silu",
    required_hf_values={},
    refused_classes={"Dinov2Backbone": "it returns features of several layers, and no logits"},
    implied_sizes={"dinov2": {"has_distillation": False}},
    base_prefixes={"hf": "dinov2."},
    hf_harmless={
        **vit.HF_HARMLESS,
        "drop_path_rate": "it drops blocks in training only, and this program trains without it",
        "layerscale_value": "what the learned scales start from",
        **dict.fromkeys(
            (
                "apply_layernorm",
                "reshape_hidden_states",
                "out_features",
                "out_indices",
                "stage_names",
                "_out_features",
                "_out_indices",
            ),
            "only the backbone class reads it",
        ),
    },
)
