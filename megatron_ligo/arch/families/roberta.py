"""RoBERTa and XLM-RoBERTa: BERT's network under other tensor names. Positions start after the padding token's id."""

from megatron_ligo.arch.architecture import Architecture, Task
from megatron_ligo.arch.families import bert

BASE = "roberta."

ROBERTA = Architecture(
    name="roberta",
    norm="layer",
    pre_norm=False,
    task=Task.MASKED_TOKENS,
    head_activation="gelu",
    model_types={
        "roberta": {"RobertaForMaskedLM": ("has_head",), "RobertaModel": ("has_pooler",)},
        "xlm-roberta": {"XLMRobertaForMaskedLM": ("has_head",), "XLMRobertaModel": ("has_pooler",)},
    },
    params=(
        *bert.embedding_params(BASE),
        *bert.layer_params(BASE),
        *bert.pooler_params(BASE),
        *bert.head_params("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
    ),
    hf_fields=bert.HF_FIELDS | {"pad_token_id": "position_padding"},
    required_hf_values=bert.REQUIRED_HF_VALUES,
    choices=bert.CHOICES,
    base_prefixes={"hf": BASE},
    ignored_names=bert.IGNORED_NAMES,
    renamed_suffixes=bert.RENAMED_SUFFIXES,
    hf_fixed=bert.HF_FIXED,
    hf_harmless=bert.HF_HARMLESS,
)
