"""DINOv2 with registers: learned tokens without positions between the class token and the patches, which attention
reads and the classifier does not. They grow as the other tokens do; their number stays."""

from dataclasses import replace

from megatron_ligo.arch.families.dinov2 import DINOV2, HF_FIELDS, params_of

MODEL_TYPE = "dinov2_with_registers"

DINOV2_WITH_REGISTERS = replace(
    DINOV2,
    name=MODEL_TYPE,
    model_types={
        MODEL_TYPE: {"Dinov2WithRegistersForImageClassification": ("has_head",), "Dinov2WithRegistersModel": ()}
    },
    params=params_of(f"{MODEL_TYPE}."),
    hf_fields=HF_FIELDS | {"num_register_tokens": "num_registers"},
    antialiases_positions=True,
    refused_classes={"Dinov2WithRegistersBackbone": DINOV2.refused_classes["Dinov2Backbone"]},
    implied_sizes={MODEL_TYPE: {"has_distillation": False}},
    base_prefixes={"hf": f"{MODEL_TYPE}."},
)
