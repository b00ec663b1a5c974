"""Mutations of a GGUF file's metadata: one key takes a value of any type, or goes."""

from __future__ import annotations

import random
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFValueType as Type

from megatron_ligo.checkpoint.formats.gguf.header import GgufHeader, read_header

# By type: values that readers tend to mishandle. The package writes no empty lists.
SCALARS = {
    Type.UINT32: (0, 1, 2, 7, 2**31, 2**32 - 1),
    Type.UINT64: (2**63, 2**64 - 1),
    Type.INT32: (-1, -(2**31), 5),
    Type.FLOAT32: (0.0, -1.0, 0.5, 1e30, float("nan"), float("inf")),
    Type.BOOL: (True, False),
    Type.STRING: ("", "x", "\0", "linear", "yarn", "llama", "gpt2", "../..", "\x1b[31m", "9" * 5000),
}
LISTS = {
    Type.UINT32: ([1], [2, 2], [2, 3], [0] * 50),
    Type.INT32: ([1] * 50, [3] * 50, [99] * 50, [-1] * 50),
    Type.FLOAT32: ([0.5], [float("nan")] * 50, [0.0] * 50),
    Type.STRING: (["x"], ["a b"], ["x"] * 50, [""] * 50, [f"<0x{value:02X}>" for value in range(50)]),
}
NEW_KEYS = (
    "llama.expert_count", "llama.attention.causal", "llama.rope.scaling.type", "llama.rope.scaling.factor",
    "llama.attention.key_length", "llama.new", "general.type", "general.alignment", "split.count", "split.no",
    "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.merges", "tokenizer.ggml.pre", "tokenizer.ggml.precompiled_charsmap", "tokenizer.chat_template",
    "tokenizer.ggml.padding_token_id", "name\x1b[31m",
)  # fmt: skip


def edit_gguf_metadata(draw: random.Random, path: Path) -> str:
    """Rewrites a file with one key changed, added or removed; sometimes two."""
    header, stories = read_header(path), []
    metadata = {key: (value, *_type_of(value)) for key, value in header.metadata.items()}
    for _ in range(draw.choice((1, 1, 2))):
        key = draw.choice((*sorted(metadata), *NEW_KEYS))
        if key in metadata and draw.random() < 0.15:
            del metadata[key]
            stories.append(f"{key!r} is gone")
            continue
        if draw.random() < 0.5:
            kind = draw.choice(list(SCALARS))
            metadata[key] = (draw.choice(SCALARS[kind]), kind)
        else:
            kind = draw.choice(list(LISTS))
            metadata[key] = (draw.choice(LISTS[kind]), Type.ARRAY, kind)
        stories.append(f"{key!r} is {metadata[key]!r:.60}")
    _write(path, header, metadata)
    return "; ".join(stories)


def _type_of(value: object) -> tuple[Type, ...]:
    if isinstance(value, list):
        return Type.ARRAY, _type_of(value[0])[0]
    return (Type.get_type(value),) if not isinstance(value, int) or isinstance(value, bool) else (Type.UINT32,)


def _write(path: Path, header: GgufHeader, metadata: dict[str, tuple]) -> None:
    content = path.read_bytes()
    writer = gguf.GGUFWriter(path, "llama")
    writer.kv_data[0].clear()
    for key, value in metadata.items():
        writer.add_key_value(key, *value)
    for name, block in header.tensors.items():
        tensor = np.frombuffer(content, np.float32, block.nbytes // 4, block.offset).reshape(block.shape)
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
