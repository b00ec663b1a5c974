"""Builds the sentencepiece tokenizer ("llama") that a GGUF file states, as byte-pair merges.

Sentencepiece joins the two neighbours whose joint piece has the highest score, leftmost first: a piece's score is the
rank of all pairs that form it.
"""

from __future__ import annotations

from itertools import pairwise

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_ligo.checkpoint.formats.gguf.tokenizer_keys import TokenTable, TokenType
from megatron_ligo.checkpoint.source_keys import describe_value
from megatron_ligo.common.errors import ErrorCollector

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
BYTES = {f"<0x{value:02X}>" for value in range(256)}
# llama.cpp's converter gives it to tokens that were added to a sentencepiece model.
ADDED_SCORE = -1000.0
TOKENS, TYPES, SCORES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"


def build_sentence_pieces(table: TokenTable, errors: ErrorCollector) -> Tokenizer | None:
    """Returns the tokenizer, or None, with errors, if its pieces cannot be expressed as merges."""
    if not table.scores:
        errors.add(SCORES, f"{len(table.tokens)} numbers, one for each token", "none")
        return None
    unknown = table.of_type(TokenType.UNKNOWN)
    spelled = {table.tokens[index] for index in table.of_type(TokenType.BYTE)}
    if spelled and spelled != BYTES:
        errors.add(TYPES, "all 256 bytes as tokens <0x00> to <0xFF>, or none", f"{len(spelled)} of type 6")
    if len(unknown) > 1 or not (unknown or spelled):
        errors.add(TYPES, "one unknown token", len(unknown))
    elif unknown and table.roles.get("unk_token", unknown[0]) != unknown[0]:
        errors.add("tokenizer.ggml.unknown_token_id", f"{unknown[0]}, of type 2", table.roles["unk_token"])
    scores = {table.tokens[index]: table.scores[index] for index in table.of_type(TokenType.NORMAL)}
    merges = _rank_merges(scores, errors)
    _check_unused({table.tokens[index] for index in table.of_type(TokenType.UNUSED)}, scores, errors)
    if errors.problems:
        return None
    user_defined = table.of_type(TokenType.USER_DEFINED)
    built_in = [table.tokens[index] for index in user_defined if table.scores[index] != ADDED_SCORE]
    model = models.BPE(
        vocab={token: index for index, token in enumerate(table.tokens)},
        merges=merges,
        unk_token=table.tokens[unknown[0]] if unknown else None,
        fuse_unk=True,
        byte_fallback=bool(spelled),
    )
    tokenizer = Tokenizer(model)
    if built_in:
        _split_at_pieces(tokenizer, built_in, scores, errors)
        if errors.problems:
            return None
    _add_spaces(tokenizer, table.prefix is not False)
    for index in table.of_type(TokenType.CONTROL, TokenType.UNKNOWN):
        tokenizer.add_tokens([AddedToken(table.tokens[index], normalized=False, special=True)])
    for index in user_defined:
        if table.scores[index] == ADDED_SCORE:
            tokenizer.add_tokens([AddedToken(table.tokens[index], normalized=False, special=False)])
    return tokenizer


def _add_spaces(tokenizer: Tokenizer, prefix: bool) -> None:
    """Spells spaces as sentencepiece does. prefix: a text begins with one more."""
    before = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )


def _rank_merges(scores: dict[str, float], errors: ErrorCollector) -> list[tuple[str, str]]:
    """Returns the pairs of pieces that form a piece, by its score. Adds an error if two pieces have one score.

    Of several pairs that form one piece, the one with the longest left part comes first.
    """
    pairs: dict[str, list[tuple[str, str]]] = {}
    for piece in scores:
        splits = [(piece[:at], piece[at:]) for at in range(len(piece) - 1, 0, -1)]
        possible = [(left, right) for left, right in splits if left in scores and right in scores]
        if possible:
            pairs[piece] = possible
    ranked = sorted(pairs, key=lambda piece: -scores[piece])
    for one, other in pairwise(ranked):
        if scores[one] == scores[other]:
            found = f"{scores[one]} for {describe_value(one)} and {describe_value(other)}"
            errors.add(SCORES, "different scores, which order the merges", found)
            return []
    return [pair for piece in ranked for pair in pairs[piece]]


def _check_unused(unused: set[str], scores: dict[str, float], errors: ErrorCollector) -> None:
    """Adds an error for an unused piece that texts contain: sentencepiece splits it again, which merges cannot."""
    pieces = unused | set(scores)
    for piece in unused:
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        if len(piece) == 1 or any(left in pieces and right in pieces for left, right in splits):
            errors.add(TYPES, "unused tokens that no text contains", describe_value(piece))
            return


def _split_at_pieces(
    tokenizer: Tokenizer, built_in: list[str], scores: dict[str, float], errors: ErrorCollector
) -> None:
    """Cuts user-defined pieces out of a text before merges apply, the longest first.

    Each is then a word that is a token; that rule must not apply to a piece that merges do not form.
    """
    for piece in scores:
        if tokenizer.model.tokenize(piece)[0].value != piece:
            errors.add(TYPES, "no user-defined tokens beside pieces that merges do not form", describe_value(piece))
            return
        if "<0" in piece:
            errors.add(TYPES, "no piece with '<0' beside user-defined tokens", describe_value(piece))
            return
    tokenizer.model.ignore_merges = True
    longest_first = sorted(built_in, key=len, reverse=True)
    pattern = "|".join(map(_escape, longest_first))
    # A text that spells a byte's token is no byte. No piece goes across the cut.
    spelled_bytes = pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), spelled_bytes])


def _escape(piece: str) -> str:
    """Returns a pattern of the tokenizers' library that matches a piece as it is."""
    return "".join(char if char.isalnum() or not char.isascii() else f"\\x{ord(char):02x}" for char in piece)
