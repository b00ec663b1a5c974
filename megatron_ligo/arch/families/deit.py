"""DeiT: ViT's network with a second token that learned from a teacher, after the class's.

The class that also has a head of that token (its logits are the mean of both heads') is not described.
"""

from megatron_ligo.arch.families import vit
from megatron_ligo.arch.spec import Architecture, Task

BASE = "deit."

DEIT = Architecture(
    name="deit",
    norm="layer",
    task=Task.LABEL,
    model_types={"deit": {"DeiTForImageClassification": ("has_head",), "DeiTModel": ("has_pooler",)}},
    rows=(*vit.embedding_rows(BASE), *vit.layer_rows(BASE), *vit.end_rows(BASE)),
    hf=vit.HF,
    fixed_hf=vit.FIXED_HF,
    choices=vit.CHOICES,
    refused={
        "DeiTForImageClassificationWithTeacher": "it has two heads, whose logits are averaged",
        "DeiTForMaskedImageModeling": "it has a decoder of pixels, which the table has no row for",
    },
    implied={"deit": {"has_distillation": True}},
    base={"hf": BASE},
)
