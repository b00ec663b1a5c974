"""Names from files reach a terminal as text; output may lose its reader."""

from __future__ import annotations

import io
import os

import pytest

from megatron_ligo.common.errors import ConfigError, ErrorCollector, Problem
from megatron_ligo.common.terminal_stream import TerminalStream
from megatron_ligo.common.terminal_text import MAX_CHARACTERS, one_line, printable

HOSTILE = {
    "\x1b[2J": r"\x1b[2J",
    "\x9b2J": r"\x9b2J",
    "a\rb": r"a\rb",
    "\x07\x08": r"\x07\x08",
    "\u202egnp": r"\u202egnp",
    "\u2028": r"\u2028",
    "\u200b": r"\u200b",
    "\udcff": r"\udcff",
    "\x7f": r"\x7f",
}


@pytest.mark.parametrize("text, shown", HOSTILE.items())
def test_unsafe_characters_are_escaped(text, shown):
    assert printable(text) == shown
    raw = io.StringIO()
    TerminalStream(raw).write(f"a name: {text}\n")
    assert raw.getvalue() == f"a name: {shown}\n"


def test_plain_text_passes():
    for text in ("layers.0.weight", "Größe\t模型\n", "a ≥ b"):
        assert printable(text) == text


def test_a_name_forges_no_line_of_a_message():
    name = "model\nSuccess: everything was verified\x1b[1A"
    errors = ErrorCollector(f"{name} is damaged", ConfigError)
    errors.add(name, "a tensor", name, "Look at it.")
    with pytest.raises(ConfigError) as raised:
        errors.raise_if_any()
    assert str(raised.value).count("\n") == 1 and "\x1b" not in str(raised.value)
    assert "\n" not in Problem(name, name, name) and Problem("a", "b", "c").where == "a"


def test_a_very_long_value_is_shortened():
    text = one_line("x" * 10**6)
    assert len(text) < MAX_CHARACTERS and "1000000 characters" in text


def test_a_stream_outlives_its_reader():
    reader, writer = os.pipe()
    stream = TerminalStream(os.fdopen(writer, "w"))
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        print("lost", file=stream, flush=True)
    stream.outlives_reader = True
    for _ in range(3):
        print("lost", file=stream, flush=True)
    stream.close()
