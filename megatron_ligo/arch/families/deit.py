"""DeiT: ViT's network with a second token that learned from a teacher, after the class's.

The class that also has a head of that token (its logits are the mean of both heads') is not described.
"""

from megatron_ligo.arch.architecture import Architecture, Task
from megatron_ligo.arch.families import vit

BASE = "deit."

DEIT = Architecture(
    name="deit",
    norm="layer",
    task=Task.LABEL,
    model_types={"deit": {"DeiTForImageClassification": ("has_head",), "DeiTModel": ("has_pooler",)}},
    params=(*vit.embedding_params(BASE), *vit.layer_params(BASE), *vit.end_params(BASE)),
    hf_fields=vit.HF,
    required_hf_values=vit.FIXED_HF,
    choices=vit.CHOICES,
    refused_classes={
        "DeiTForImageClassificationWithTeacher": "it has two heads, whose logits are averaged",
        "DeiTForMaskedImageModeling": "it has a decoder of pixels, which the table has no row for",
    },
    implied_sizes={"deit": {"has_distillation": True}},
    base_prefixes={"hf": BASE},
)
