"""The allow-list of a GGUF file's tokenizer keys, and the tokens that they state, checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from math import isfinite

from megatron_ligo.checkpoint.source_keys import NO_KEYS, KeyTable, describe_value
from megatron_ligo.common.errors import ErrorCollector

PREFIX = "tokenizer."
SPECIAL = "it names a token for chats or for filling gaps, which encoding does not use"
OTHER_KIND = "of another kind of tokenizer"
KEYS = KeyTable(
    fields={
        "tokenizer.ggml.model": "kind",
        "tokenizer.ggml.pre": "pre-tokenizer",
        "tokenizer.ggml.tokens": "tokens",
        "tokenizer.ggml.token_type": "types",
        "tokenizer.ggml.scores": "scores",
        "tokenizer.ggml.merges": "merges",
        "tokenizer.ggml.bos_token_id": "bos_token",
        "tokenizer.ggml.eos_token_id": "eos_token",
        "tokenizer.ggml.unknown_token_id": "unk_token",
        "tokenizer.ggml.padding_token_id": "pad_token",
        "tokenizer.ggml.add_bos_token": "begins with bos",
        "tokenizer.ggml.add_eos_token": "ends with eos",
        "tokenizer.ggml.add_space_prefix": "prefix",
        "tokenizer.chat_template": "chat template",
    },
    harmless={
        "tokenizer.ggml.eot_token_id": SPECIAL,
        "tokenizer.ggml.eom_token_id": SPECIAL,
        "tokenizer.ggml.seperator_token_id": SPECIAL,
        "tokenizer.ggml.cls_token_id": SPECIAL,
        "tokenizer.ggml.mask_token_id": SPECIAL,
        "tokenizer.ggml.fim_pre_token_id": SPECIAL,
        "tokenizer.ggml.fim_suf_token_id": SPECIAL,
        "tokenizer.ggml.fim_mid_token_id": SPECIAL,
        "tokenizer.ggml.fim_pad_token_id": SPECIAL,
        "tokenizer.ggml.fim_rep_token_id": SPECIAL,
        "tokenizer.ggml.fim_sep_token_id": SPECIAL,
        "tokenizer.ggml.prefix_token_id": SPECIAL,
        "tokenizer.ggml.suffix_token_id": SPECIAL,
        "tokenizer.ggml.middle_token_id": SPECIAL,
        "tokenizer.ggml.suppress_tokens": "generation does not choose them; encoding does",
        "tokenizer.ggml.add_sep_token": OTHER_KIND,
        "tokenizer.ggml.token_type_count": OTHER_KIND,
        "tokenizer.rwkv.world": OTHER_KIND,
        "tokenizer.huggingface.json": "the same tokenizer in another form",
        "tokenizer.chat_templates": "the names of other templates, which are listed as left behind",
    },
    fixed={
        "tokenizer.ggml.remove_extra_whitespaces": (False,),
        "tokenizer.ggml.precompiled_charsmap": ("", ()),
        "tokenizer.ggml.normalizer.lowercase": (False,),
        "tokenizer.ggml.normalizer.strip_accents": (False,),
    },
)
NAMED_TEMPLATE = "tokenizer.chat_template."
# Roles of tokens in tokenizer_config.json, and the keys with their ids.
ROLES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


class TokenType(IntEnum):
    """llama.cpp's types of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class TokenTable:
    """The tokens of a file by id. scores: empty if the file states none. roles: role -> id, of those that are stated.

    begins, ends: whether sequences begin with bos and end with eos; None if the file leaves it to the kind's default.
    """

    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...]
    roles: Mapping[str, int]
    begins: bool | None
    ends: bool | None
    prefix: bool | None

    def of_type(self, *types: TokenType) -> list[int]:
        """Returns the ids of the tokens of some types, ascending."""
        return [index for index, kind in enumerate(self.types) if kind in types]


def read_token_table(metadata: Mapping[str, object], vocab_size: int, errors: ErrorCollector) -> TokenTable | None:
    """Returns a file's tokens, or None, with an error for everything that is not understood."""
    stated = {
        key: value for key, value in metadata.items() if key.startswith(PREFIX) and not key.startswith(NAMED_TEMPLATE)
    }
    KEYS.check(stated, NO_KEYS, errors)
    tokens = _read_tokens(metadata, vocab_size, errors)
    types = _read_types(metadata, len(tokens), errors)
    scores = metadata.get("tokenizer.ggml.scores", [])
    if not isinstance(scores, list) or not all(type(score) is float and isfinite(score) for score in scores):
        errors.add("tokenizer.ggml.scores", "a list of finite numbers", describe_value(scores))
    elif scores and len(scores) != len(tokens):
        errors.add("tokenizer.ggml.scores", f"{len(tokens)} numbers, one for each token", len(scores))
    flags = {
        name: _read_flag(metadata, f"tokenizer.ggml.{name}", errors)
        for name in ("add_bos_token", "add_eos_token", "add_space_prefix")
    }
    roles = {
        role: metadata[key]
        for role, key in ROLES.items()
        if key in metadata and is_token_id(metadata[key], len(tokens))
    }
    if errors.problems:
        return None
    return TokenTable(tokens, types, tuple(scores), roles, *flags.values())


def is_token_id(value: object, count: int) -> bool:
    """Returns whether a value is the id of one of `count` tokens."""
    return type(value) is int and 0 <= value < count


def _read_tokens(metadata: Mapping[str, object], vocab_size: int, errors: ErrorCollector) -> tuple[str, ...]:
    key = "tokenizer.ggml.tokens"
    tokens = metadata.get(key)
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        errors.add(key, "a list of texts", describe_value(tokens))
        return ()
    if len(tokens) > vocab_size:
        errors.add(key, f"at most {vocab_size} tokens, the rows of the embedding", len(tokens))
    counts = Counter(tokens)
    if len(counts) != len(tokens):
        ((twice, _),) = counts.most_common(1)
        errors.add(key, "different tokens", f"{describe_value(twice)} twice")
    broken = next((token for token in tokens if not token or not is_text(token)), None)
    if broken is not None:
        errors.add(key, "texts in UTF-8, none empty", describe_value(broken))
    return tuple(tokens)


def is_text(token: str) -> bool:
    """Returns whether a value's bytes were UTF-8."""
    return not any("\ud800" <= char <= "\udfff" for char in token)


def _read_types(metadata: Mapping[str, object], count: int, errors: ErrorCollector) -> tuple[TokenType, ...]:
    key = "tokenizer.ggml.token_type"
    types = metadata.get(key)
    known = {int(kind) for kind in TokenType}
    if not isinstance(types, list) or not all(type(kind) is int and kind in known for kind in types):
        expected = f"a list of types {min(known)} to {max(known)}, one for each token"
        errors.add(key, expected, "none" if types is None else describe_value(types))
        return ()
    if len(types) != count:
        errors.add(key, f"{count} types, one for each token", len(types))
    return tuple(map(TokenType, types))


def _read_flag(metadata: Mapping[str, object], key: str, errors: ErrorCollector) -> bool | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, bool):
        errors.add(key, "true or false", describe_value(value))
    return value
