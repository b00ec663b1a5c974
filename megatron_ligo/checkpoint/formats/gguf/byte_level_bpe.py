"""Builds the byte-level BPE tokenizer ("gpt2") that a GGUF file states.

The file names its pre-tokenizer, which splits a text before merges apply; llama.cpp knows the names. Only those of
this table are understood: with another's rule every id after a number or a contraction may be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_ligo.checkpoint.formats.gguf.tokenizer_keys import TokenTable, TokenType
from megatron_ligo.checkpoint.source_keys import describe_value
from megatron_ligo.common.errors import ErrorCollector


@dataclass(frozen=True)
class PreTokenizer:
    """patterns: applied one after another, each splits the pieces that the earlier ones left.

    whole_words: a word that is a token is not built by merges. begins: sequences begin with bos unless the file says
    otherwise. composes: texts are normalised to NFC.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False
    composes: bool = False


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = PreTokenizer((ENGLISH + r"\p{N}{1,3}" + REST,), whole_words=True, begins=True)
DIGITS = PreTokenizer((DIGIT, GPT2))
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer((GPT2,)),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "refact": DIGITS,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": PreTokenizer((ENGLISH + DIGIT + REST,), composes=True),
    "deepseek-r1-qwen": PreTokenizer((ENGLISH + DIGIT + REST,)),
    "tekken": PreTokenizer((TEKKEN,), whole_words=True, begins=True),
}
KEY, MERGES = "tokenizer.ggml.pre", "tokenizer.ggml.merges"


def build_byte_level_bpe(
    metadata: Mapping[str, object], table: TokenTable, errors: ErrorCollector
) -> tuple[Tokenizer, bool] | None:
    """Returns the tokenizer, and whether sequences begin with bos by default; None, with errors, if it has faults."""
    name = metadata.get(KEY)
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        found = "none" if name is None else describe_value(name)
        errors.add(KEY, f"a pre-tokenizer that this program knows ({', '.join(PRE_TOKENIZERS)})", found)
    for index in table.of_type(TokenType.BYTE)[:1]:
        errors.add("tokenizer.ggml.token_type", "no tokens of bytes in a byte-level tokenizer", table.tokens[index])
    vocab = {token: index for index, token in enumerate(table.tokens)}
    merges = _read_merges(metadata, vocab, errors)
    if errors.problems:
        return None
    rule = PRE_TOKENIZERS[name]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.whole_words))
    if rule.composes:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for index in table.of_type(TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
        special = table.types[index] is not TokenType.USER_DEFINED
        tokenizer.add_tokens([AddedToken(table.tokens[index], normalized=False, special=special)])
    return tokenizer, rule.begins


def _read_merges(metadata: Mapping[str, object], vocab: dict[str, int], errors: ErrorCollector) -> list:
    """Returns the pairs of tokens to merge, most urgent first. Adds an error for the first that names no tokens."""
    merges = metadata.get(MERGES)
    if not isinstance(merges, list) or not merges or not all(isinstance(merge, str) for merge in merges):
        errors.add(MERGES, "a list of pairs of tokens", "none" if merges is None else describe_value(merges))
        return []
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or not all(part in vocab for part in (*pair, "".join(pair))):
            errors.add(MERGES, "two tokens that form a third, apart by a space", describe_value(" ".join(pair)))
            return []
    if len(set(pairs)) != len(pairs):
        errors.add(MERGES, "different pairs", "one twice")
    return pairs
