"""Encodes a long text in overlapping windows, because a tokenizer needs about 200 times the memory of its text.

Two windows are joined in the middle of their overlap, and only if they agree on all tokens around it: a token depends
on the text near it, so the result is that of the whole text. Where they disagree (a run of one character, say), the
window grows, up to the whole text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megatron_ligo.data.tokenizer import Tokenizer

WINDOW = 1 << 17  # characters
OVERLAP = 1 << 12


class EncodedWindow(NamedTuple):
    """ids (tokens,) and spans (tokens, 2): each token's first and last character in the whole text."""

    ids: np.ndarray
    spans: np.ndarray


def encode_text(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Returns the token ids (tokens,) of a text, int32."""
    if len(text) <= WINDOW:
        return np.array(tokenizer.encode(text), np.int32)
    parts: list[np.ndarray] = []
    window, start, end = _encode_window(tokenizer, text, 0, WINDOW), 0, WINDOW
    taken = 0  # tokens of the window that are already in parts
    while end < len(text):
        following_start, following_end = end - OVERLAP, end - OVERLAP + WINDOW
        following = _encode_window(tokenizer, text, following_start, following_end)
        seam = _find_seam(window, following, end - 3 * OVERLAP // 4, end - OVERLAP // 4)
        if seam is None or seam[0] < taken:
            end = min(end + (end - start), len(text))
            window = _encode_window(tokenizer, text, start, end)
            continue
        parts.append(window.ids[taken : seam[0]])
        window, start, end, taken = following, following_start, min(following_end, len(text)), seam[1]
    parts.append(window.ids[taken:])
    return np.concatenate(parts)


def _encode_window(tokenizer: Tokenizer, text: str, start: int, end: int) -> EncodedWindow:
    ids, spans = tokenizer.encode_with_offsets(text[start:end])
    return EncodedWindow(ids, spans + start)


def _find_seam(window: EncodedWindow, following: EncodedWindow, low: int, high: int) -> tuple[int, int] | None:
    """Returns the index, in each window, of one token in the middle of the characters low to high; None if the windows
    differ there."""
    places = []
    for encoded in (window, following):
        inside = np.flatnonzero((encoded.spans[:, 0] >= low) & (encoded.spans[:, 1] <= high))
        if not inside.size or inside[-1] - inside[0] + 1 != inside.size:
            return None
        places.append(slice(inside[0], inside[-1] + 1))
    left, right = places
    same = np.array_equal(window.ids[left], following.ids[right])
    if not same or not np.array_equal(window.spans[left], following.spans[right]):
        return None
    middle = (left.stop - left.start) // 2
    return int(left.start + middle), int(right.start + middle)
