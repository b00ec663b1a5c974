"""DeiT: ViT with a distillation token after the class token.

The class with a second head on that token, which averages the logits of both heads, is not supported.
"""

from megatron_ligo.arch.architecture import Architecture, Task
from megatron_ligo.arch.families import vit

BASE = "deit."

DEIT = Architecture(
    name="deit",
    norm="layer",
    task=Task.LABEL,
    model_types={"deit": {"DeiTForImageClassification": ("has_head",), "DeiTModel": ("has_pooler",)}},
    params=(*vit.embedding_params(BASE), *vit.layer_params(BASE), *vit.last_params(BASE)),
    hf_fields=vit.HF_FIELDS,
    required_hf_values=vit.REQUIRED_HF_VALUES,
    choices=vit.CHOICES,
    refused_classes={
        "DeiTForImageClassificationWithTeacher": "it has two heads, whose logits are averaged",
        "DeiTForMaskedImageModeling": "it has a decoder of pixels, which the table does not describe",
    },
    implied_sizes={"deit": {"has_distillation": True}},
    base_prefixes={"hf": BASE},
    hf_fixed=vit.HF_FIXED,
    hf_harmless=vit.HF_HARMLESS,
)
