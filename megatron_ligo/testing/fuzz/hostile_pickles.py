"""Pickles that run code when loaded, one for each way that a pickle can call a function."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path


def hostile_pickles(mark: Path) -> dict[str, bytes]:
    """Returns pickles that create the folder `mark` if they run, by the opcode or import they use."""
    text = str(mark).encode()
    head, argument = b"\x80\x02", b"X" + struct.pack("<I", len(text)) + text
    nested = pickle.dumps({"a": [_CallsOnLoad(str(mark))]}, protocol=4)
    return {
        "GLOBAL, REDUCE": head + b"cos\nmkdir\n" + argument + b"\x85R.",
        "posix": head + b"cposix\nmkdir\n" + argument + b"\x85R.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + argument + b"\x85R.",
        "INST": b"(S'" + text + b"'\nios\nmkdir\n.",
        "OBJ": head + b"(cos\nmkdir\n" + argument + b"o.",
        "NEWOBJ": head + b"cpathlib\nPath\n" + argument + b"\x85\x81.",
        "BUILD": head + b"ctorch.nn\nModule\n)\x81}X\x01\x00\x00\x00acos\nmkdir\nsb.",
        "eval": head + b"cbuiltins\neval\nX" + _python_code(mark) + b"\x85R.",
        "getattr": head + b"cbuiltins\ngetattr\ncos\n__dict__\nX\x05\x00\x00\x00mkdir\x86R" + argument + b"\x85R.",
        "torch": head + b"ctorch.serialization\nload\n" + argument + b"\x85R.",
        "numpy": head + b"cnumpy.testing._private.utils\nrunstring\nX" + _python_code(mark) + b"}\x86R.",
        "deepspeed": head + b"cdeepspeed.runtime.utils\nos\n.",
        "EXT": head + b"\x82\x01.",
        "PERSID": b"P" + text + b"\n.",
        "nested": nested,
        "memo": head + b"cos\nmkdir\nq\x00" + argument + b"\x85h\x00" + argument + b"\x85R.",
        "many": head + b"(" + b"N" * 10 + b"l" + b"(" * 5000 + b".",
        "long": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
        "huge": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
    }


def _python_code(mark: Path) -> bytes:
    text = f"__import__('os').mkdir({str(mark)!r})".encode()
    return struct.pack("<I", len(text)) + text


class _CallsOnLoad:
    def __init__(self, mark: str):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)
