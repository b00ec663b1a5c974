"""GGUF files (llama.cpp): plain and quantised tensors and the tokenizer. Read only.

Quantised tensors are read as fp32, dequantised by the gguf package; F16 and BF16 keep their dtype.
"""

from __future__ import annotations

import json
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

from megatron_ligo import arch as architectures
from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.format import Format
from megatron_ligo.checkpoint.formats.gguf.header import MAGIC, GgufHeader, read_header
from megatron_ligo.checkpoint.formats.gguf.rope_metadata import TABLES, parse_rope_scaling, shortest_decimal
from megatron_ligo.checkpoint.reader import WEIGHT, Reader, TensorInfo
from megatron_ligo.checkpoint.source_keys import NO_KEYS, AcceptedKeys
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem, did_you_mean
from megatron_ligo.sharding import fused_tensors

NAME = "gguf"
PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
# llama.cpp interleaves rotary pairs for this architecture only.
INTERLEAVED = ("llama",)


class GgufReader(Reader):
    """Reads canonical tensors, dequantised one at a time."""

    format = NAME

    def __init__(self, path: Path, accepted: AcceptedKeys = NO_KEYS):
        self.path = path
        self._header = read_header(path)
        metadata = self._header.metadata
        self.model_config = _parse_model_config(self._header, path, accepted)
        self._data = np.memmap(path, mode="c")
        self._items = self._check()
        ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        token_ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in ids.items()}
        self.carried = {name: value for name, value in token_ids.items() if value is not None}

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The tokenizer as Hugging Face files, in a temporary folder that lives as long as the reader."""
        if "tokenizer.ggml.tokens" not in self._header.metadata:
            return ()
        self._folder = tempfile.TemporaryDirectory()
        return _extract_tokenizer(self.path, Path(self._folder.name))

    def info(self, key: str) -> TensorInfo:
        block = self._header.tensors[self._items[key].name]
        return TensorInfo(self.param(key).shape(self.model_config), PLAIN.get(block.type, torch.float32))

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        assert kind == WEIGHT, "this format holds no optimizer state"
        item = self._items[key]
        return item.extract(self._tensor(item.name), key, self.model_config)

    def _tensor(self, name: str) -> Tensor:
        block = self._header.tensors[name]
        data = self._data[block.offset : block.offset + block.nbytes]
        if block.type in PLAIN:
            return torch.from_numpy(data).view(PLAIN[block.type]).reshape(block.shape)
        rows = data.reshape(*block.shape[:-1], -1)
        return torch.from_numpy(gguf.dequantize(rows, block.type))

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
        if self._header.metadata["general.architecture"] not in INTERLEAVED:
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


def _find_architecture(metadata: dict, path: Path) -> Architecture:
    known = {
        name: arch for arch in architectures.architectures().values() if arch.gguf_fields for name in arch.model_types
    }
    name = metadata.get("general.architecture")
    if name not in known:
        hint = did_you_mean(str(name), known)
        raise CheckpointError(Problem(f"{path}: general.architecture", "a known architecture", repr(name), hint))
    return known[name]


def _parse_model_config(header: GgufHeader, path: Path, accepted: AcceptedKeys) -> ModelConfig:
    metadata = header.metadata
    arch = _find_architecture(metadata, path)
    family = metadata["general.architecture"]
    errors = ErrorCollector(f"{path} describes a model that this program does not support", CheckpointError)
    _refuse_features(header, family, errors)
    sizes: dict[str, object] = {"arch": arch.name, "model_type": family}
    for key, name in arch.gguf_fields.items():
        if f"{family}.{key}" in metadata:
            sizes[name] = metadata[f"{family}.{key}"]
    for name in ("norm_eps", "rope_base"):
        if name in sizes:
            sizes[name] = shortest_decimal(sizes[name])
    if "vocab_size" not in sizes:
        sizes["vocab_size"] = len(metadata.get("tokenizer.ggml.tokens", ()))
    for name in ("hidden_size", "num_heads", "num_layers", "max_positions", "norm_eps", "ffn_size"):
        if not isinstance(sizes.get(name), int | float) or not sizes[name] > 0:
            errors.add(name, "a positive number", repr(sizes.get(name)))
    errors.raise_if_any()
    sizes.setdefault("num_kv_heads", sizes["num_heads"])
    sizes.setdefault("head_dim", sizes["hidden_size"] // sizes["num_heads"])
    if "rope_base" in arch.gguf_fields.values():
        # llama.cpp's default.
        sizes.setdefault("rope_base", 10000.0)
        sizes["rope_scaling"] = parse_rope_scaling(header, path, family, sizes["head_dim"], sizes["rope_base"], errors)
    rotary = metadata.get(f"{family}.rope.dimension_count", sizes["head_dim"])
    value = metadata.get(f"{family}.attention.value_length", sizes["head_dim"])
    for name, size in (("rope.dimension_count", rotary), ("attention.value_length", value)):
        if size != sizes["head_dim"]:
            errors.add(name, f"the head size, {sizes['head_dim']}", size)
    errors.raise_if_any()
    sizes["tied"] = any(param.tied_to and param.locations[NAME].name not in header.tensors for param in arch.params)
    return ModelConfig.from_json(sizes | arch.implied_sizes.get(family, {}))


def _refuse_features(header: GgufHeader, family: str, errors: ErrorCollector) -> None:
    metadata = header.metadata
    for key in ("expert_count", "attention.sliding_window"):
        if metadata.get(f"{family}.{key}"):
            errors.add(key, "none", metadata[f"{family}.{key}"])
    if metadata.get("split.count", 1) > 1:
        errors.add("split.count", "one file", metadata["split.count"], "Merge the parts with gguf-split first.")


def _extract_tokenizer(path: Path, folder: Path) -> tuple[Path, ...]:
    """Writes vocabulary, merges, special tokens and chat template as Hugging Face files, through transformers."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast.from_pretrained(str(path.parent.absolute()), gguf_file=path.name).save_pretrained(folder)
    # A class that transformers 4 knows too; without the keys that state where the tokenizer was read.
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only", "backend"):
        settings.pop(name, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tuple(sorted(folder.iterdir()))


class GgufFormat(Format):
    name = NAME
    description = "a file that begins with GGUF, or a folder with one *.gguf file"
    writable = False

    def recognise(self, path: Path) -> bool:
        if path.is_dir():
            files = list(path.glob("*.gguf"))
            return len(files) == 1 and self.recognise(files[0])
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC

    def open(self, path: Path, accepted: AcceptedKeys) -> GgufReader:
        if path.is_dir():
            files = sorted(path.glob("*.gguf"))
            if len(files) != 1:
                found = ", ".join(file.name for file in files) or "none"
                raise CheckpointError(Problem(f"{path}", "one *.gguf file", found, "Name the file itself."))
            path = files[0]
        return GgufReader(path, accepted)
