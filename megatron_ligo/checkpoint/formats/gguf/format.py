"""GGUF files (llama.cpp): plain and quantised tensors and the tokenizer. Read only.

Quantised tensors are read as fp32, dequantised by the gguf package; F16 and BF16 keep their dtype.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from megatron_ligo.arch.spec import Use
from megatron_ligo.checkpoint.format import Format
from megatron_ligo.checkpoint.formats.gguf.expert_blocks import split_experts
from megatron_ligo.checkpoint.formats.gguf.gguf_sizes import FAMILY, NAME, parse_model_config
from megatron_ligo.checkpoint.formats.gguf.header import MAGIC
from megatron_ligo.checkpoint.formats.gguf.rope_metadata import TABLES
from megatron_ligo.checkpoint.formats.gguf.split_files import find_model_file, read_model_header
from megatron_ligo.checkpoint.formats.gguf.tokenizer_files import describe_left_out, write_tokenizer
from megatron_ligo.checkpoint.formats.gguf.tokenizer_keys import ROLES, is_token_id
from megatron_ligo.checkpoint.io import tensor_check
from megatron_ligo.checkpoint.reader import WEIGHT, Reader, TensorInfo
from megatron_ligo.checkpoint.source_keys import NO_KEYS, AcceptedKeys
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.sharding import fused_tensors

log = logging.getLogger(__name__)

PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
# llama.cpp interleaves rotary pairs for these architectures only.
INTERLEAVED = ("llama", "granite", "smollm3", "mistral3", "ernie4_5", "command-r", "cohere2", "glm4")
CARRIED_ROLES = ("bos_token", "eos_token", "pad_token")


class GgufReader(Reader):
    """Reads canonical tensors, dequantised one at a time."""

    format = NAME

    def __init__(self, path: Path, accepted: AcceptedKeys = NO_KEYS):
        self.path = path
        self._header = split_experts(read_model_header(path))
        metadata = self._header.metadata
        self.model_config = parse_model_config(self._header, path, accepted)
        self._parts = sorted({path, *(block.path for block in self._header.tensors.values())})
        self._data = {part: np.memmap(part, mode="c") for part in self._parts}
        self._items = self._check()
        self.carried = {
            f"{role}_id": metadata[key]
            for role, key in ROLES.items()
            if role in CARRIED_ROLES and is_token_id(metadata.get(key), self.model_config.vocab_size)
        }

    @property
    def files(self) -> tuple[Path, ...]:
        """The tokenizer as Hugging Face files, in a temporary folder that lives as long as the reader."""
        return self._tokenizer[0]

    @property
    def unread(self) -> tuple[str, ...]:
        """The tokenizer, if it is not understood, and what the tokenizer's files do not hold."""
        return self._tokenizer[1]

    @cached_property
    def _tokenizer(self) -> tuple[tuple[Path, ...], tuple[str, ...]]:
        metadata, size = self._header.metadata, self.model_config.vocab_size
        self._folder = tempfile.TemporaryDirectory()
        left_out = describe_left_out(metadata, size)
        try:
            files = write_tokenizer(metadata, size, Path(self._folder.name))
        except CheckpointError as error:
            files, left_out = (), (f"tokenizer ({' '.join(error.problems)})", *left_out)
        for item in left_out:
            log.warning("%s: left out: %s", self.path, item)
        return files, left_out

    def info(self, key: str) -> TensorInfo:
        block = self._header.tensors[self._items[key].name]
        dtype = torch.float32 if self._has_offset(key) else PLAIN.get(block.type, torch.float32)
        return TensorInfo(self.param(key).shape(self.model_config), dtype)

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        assert kind == WEIGHT, "this format holds no optimizer state"
        item = self._items[key]
        tensor = item.extract(self._tensor(item.name), key, self.model_config)
        return tensor.float() - self.arch.gain_offset if self._has_offset(key) else tensor

    def _has_offset(self, key: str) -> bool:
        """True for a gain of a norm that multiplies by 1 + w: llama.cpp stores the sum."""
        return bool(self.arch.gain_offset) and self.param(key).axes[0].use is Use.GAIN

    def _tensor(self, name: str) -> Tensor:
        block = self._header.tensors[name]
        data = self._data[block.path][block.offset : block.offset + block.nbytes]
        if block.type in PLAIN:
            return tensor_check.check_tensor(name, torch.from_numpy(data).view(PLAIN[block.type]).reshape(block.shape))
        rows = data.reshape(*block.shape[:-1], -1)
        return tensor_check.check_tensor(name, torch.from_numpy(gguf.dequantize(rows, block.type)))

    def fingerprint(self) -> object:
        stats = [(part.name, part.stat()) for part in self._parts]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def _readable_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, block in self._header.tensors.items():
            if block.type in PLAIN or _can_dequantise(block.type):
                yield name, self._tensor(name)

    def _check(self) -> dict[str, fused_tensors.StoredTensor]:
        """Checks that every expected tensor has its shape and a readable type, and that there are no others."""
        errors = ErrorCollector(f"{self.path} does not hold the model of its header", CheckpointError)
        blocks = self._header.tensors
        if self.model_config.num_layers > len(blocks):
            errors.add("block_count", f"no more than the {len(blocks)} tensors found", self.model_config.num_layers)
            errors.raise_if_any()
        if self.model_config.num_experts > len(blocks):
            errors.add("expert_count", f"no more than the {len(blocks)} tensors found", self.model_config.num_experts)
            errors.raise_if_any()
        stored = fused_tensors.stored_tensors(self.arch, self.model_config, NAME)
        for name, item in stored.items():
            if name not in blocks:
                errors.add(name, f"a tensor of shape {item.shape(self.model_config)}", "nothing")
            elif blocks[name].shape != item.shape(self.model_config):
                errors.add(name, f"shape {item.shape(self.model_config)}", blocks[name].shape)
        for name in sorted(set(blocks) - set(stored) - set(TABLES)):
            errors.add(name, "no such tensor", "one")
        for kind in sorted({block.type for block in blocks.values()} - set(PLAIN)):
            if not _can_dequantise(kind):
                errors.add(kind.name, "a type that the gguf package dequantises", "another", "Requantise the file.")
        errors.raise_if_any(self._readable_tensors)
        if self._header.metadata[FAMILY] not in INTERLEAVED:
            stored = {name: _without_interleaving(item) for name, item in stored.items()}
        return {key: item for item in stored.values() for key in item.keys}


def _without_interleaving(item: fused_tensors.StoredTensor) -> fused_tensors.StoredTensor:
    return replace(item, locations=tuple(replace(slot, interleaved=False) for slot in item.locations))


def _can_dequantise(kind: GGMLQuantizationType) -> bool:
    nbytes = gguf.GGML_QUANT_SIZES[kind][1]
    try:
        gguf.dequantize(np.zeros((1, nbytes), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


class GgufFormat(Format):
    name = NAME
    description = "a file that begins with GGUF, or a folder with one *.gguf file or the parts of one model"
    writable = False

    def recognise(self, path: Path) -> bool:
        if path.is_dir():
            file = find_model_file(path)
            return file is not None and self.recognise(file)
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC

    def open(self, path: Path, accepted: AcceptedKeys) -> GgufReader:
        if path.is_dir():
            file = find_model_file(path)
            if file is None:
                found = ", ".join(sorted(file.name for file in path.glob("*.gguf"))) or "none"
                raise CheckpointError(
                    Problem(f"{path}", "one *.gguf file, or the parts of one model", found, "Name the file itself.")
                )
            path = file
        return GgufReader(path, accepted)
