"""Text for a terminal: names from files cannot move the cursor, clear the screen or forge a line."""

from __future__ import annotations

import re

# Control characters, line and paragraph separators, marks that reorder or hide text, and lone surrogates.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
# Longer parts of a message say nothing more.
MAX_CHARACTERS = 2000


def printable(text: str, kept: str = "\n\t") -> str:
    """Returns the text with unsafe characters as escapes such as \\x1b, except those in `kept`."""
    return _UNSAFE.sub(lambda match: match[0] if match[0] in kept else _escape(match[0]), text)


def one_line(value: object) -> str:
    """Returns a value as a part of a message: printable, on one line, and shortened if it is very long."""
    text = printable(str(value), kept="")
    if len(text) > MAX_CHARACTERS:
        return f"{text[: MAX_CHARACTERS // 2]} ... {text[-MAX_CHARACTERS // 4 :]} ({len(text)} characters)"
    return text


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
