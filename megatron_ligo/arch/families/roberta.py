"""RoBERTa (and XLM-RoBERTa): BERT's network under other names; positions begin after the padding token's id."""

from megatron_ligo.arch.families import bert
from megatron_ligo.arch.spec import Architecture, Task

BASE = "roberta."

ROBERTA = Architecture(
    name="roberta",
    norm="layer",
    norm_first=False,
    task=Task.MASKED_TOKENS,
    head_activation="gelu",
    model_types={
        "roberta": {"RobertaForMaskedLM": ("has_head",), "RobertaModel": ("has_pooler",)},
        "xlm-roberta": {"XLMRobertaForMaskedLM": ("has_head",), "XLMRobertaModel": ("has_pooler",)},
    },
    rows=(
        *bert.embedding_rows(BASE),
        *bert.layer_rows(BASE),
        *bert.pooler_rows(BASE),
        *bert.head_rows("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
    ),
    hf=bert.HF | {"pad_token_id": "position_padding"},
    fixed_hf=bert.FIXED_HF,
    choices=bert.CHOICES,
    base={"hf": BASE},
    ignored=bert.IGNORED,
    renamed=bert.RENAMED,
)
