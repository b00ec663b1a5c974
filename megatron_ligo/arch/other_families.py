"""What tells other families' networks from those that this program knows.

Their tensors often have the names and shapes of a known family, so a config with a changed `model_type` would give a
wrong model.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_ligo.common.errors import Problem

EXPERTS = "its feed-forward blocks are mixtures of experts"
# `model_type` in Hugging Face's config.json, or `general.architecture` in GGUF, without separators -> the difference.
DIFFERENCES = {
    "apertus": "queries and keys are normalised, and the feed-forward block has another activation (xIELU)",
    "baichuan": "query, key and value are one matrix of the file's own, and the larger model has ALiBi positions",
    "bitnet": "there are norms inside its attention and feed-forward blocks",
    "bloom": "positions are ALiBi biases",
    "chatglm": "rotary positions turn interleaved pairs on a half of each head",
    "codegen": "attention and feed-forward read one norm, and rotary positions turn interleaved pairs",
    "commandr": "attention and feed-forward read one norm, and logits are scaled",
    "dbrx": EXPERTS,
    "deberta": "attention reads relative positions",
    "debertav2": "attention reads relative positions",
    "deepseek": EXPERTS,
    "deepseek2": "keys and values are compressed, and its feed-forward blocks are mixtures of experts",
    "deepseekv2": "keys and values are compressed, and its feed-forward blocks are mixtures of experts",
    "deepseekv3": "keys and values are compressed, and its feed-forward blocks are mixtures of experts",
    "distilbert": "there are no token types, and its tensors have other names",
    "electra": "embeddings may have another width than the layers, and the head tells replaced tokens",
    "exaone": "its tensors have other names",
    "gemma3": "beside its text model, which is known as gemma3_text in Hugging Face's format, is an image encoder",
    "glm": "rotary positions turn interleaved pairs on a part of each head",
    "gptbigcode": "all query heads share one key and value head, with learned positions",
    "gptj": "attention and feed-forward read one norm, and rotary positions turn interleaved pairs",
    "gptneo": "attention is not scaled, and every other layer has a window",
    "gptoss": "its experts and their router have biases, and their activation is bounded",
    "granitemoe": "its blocks are scaled by multipliers, and its feed-forward blocks are mixtures of experts",
    "internlm2": "query, key and value are one matrix of the file's own",
    "llama4": "beside its text model, which is known as llama4_text without experts, is an image encoder",
    "minicpm": "embeddings, residual sums and logits are scaled by its config's numbers",
    "mpt": "positions are ALiBi biases",
    "olmo": "its norms have no parameters, and queries, keys and values may be clipped",
    "qwen": "query, key and value are one matrix of the file's own",
    "qwen3next": "most layers are recurrent (gated delta nets), with mixtures of experts",
    "t5": "it has an encoder and a decoder, with relative positions",
}


def explain(where: str, name: object, known: Iterable[str]) -> Problem:
    """Returns the problem of a family that this program does not know. name: as the file states it."""
    expected = f"one of the families {', '.join(sorted(known))}"
    if not isinstance(name, str) or not name:
        return Problem(
            where, expected, repr(name)[:60], "Without a family's name nothing says what a network computes."
        )
    spelling = "".join(letter for letter in name.lower() if letter.isalnum()).removesuffix("text")
    difference = DIFFERENCES.get(spelling)
    reason = f": {difference}" if difference else ", as far as this program knows"
    hint = f"Its network differs from theirs{reason}. Under another name its weights would give a wrong model."
    return Problem(where, expected, f"{name!r:.60}", hint)
