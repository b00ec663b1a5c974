"""Hugging Face folders: config.json beside safetensors, single or sharded with an index.

pytorch_model.bin, single or sharded, is read where there are no safetensors; Accelerate's pytorch_model_fsdp.bin where
there is neither.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Role
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.format import Format, FormatOptions, WriteOptions
from megatron_ligo.checkpoint.formats.hf import config_json, tensor_names
from megatron_ligo.checkpoint.formats.hf.common_prefix import explain_other_names
from megatron_ligo.checkpoint.formats.hf.fused_experts import split_experts
from megatron_ligo.checkpoint.formats.hf.shards import (
    FILE_KINDS,
    INDEX,
    SINGLE,
    TORCH_FILES,
    WeightShards,
    describe_unread,
    open_shards,
)
from megatron_ligo.checkpoint.formats.hf.trainer_state import read_trainer_step
from megatron_ligo.checkpoint.io.output import Output, lazy_tensor
from megatron_ligo.checkpoint.reader import WEIGHT, Reader, TensorInfo
from megatron_ligo.checkpoint.source_keys import NO_KEYS, AcceptedKeys
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.config.typed_toml import setting
from megatron_ligo.sharding import fused_tensors

log = logging.getLogger(__name__)

NAME = "hf"
SHARD_BYTES = 5_000_000_000
BASE_MODEL = "nothing: a base model alone"
HEAD_HINT = "Save the model with its head; a tied one says tie_word_embeddings = true."
WEIGHT_SUFFIXES = (".safetensors", ".bin")


class HfNamesReader(Reader):
    """Reads canonical tensors from tensors of Hugging Face's names: a folder's, or a state dict's in memory."""

    format = NAME

    def __init__(
        self,
        config: Mapping[str, object],
        shards: WeightShards,
        where: str,
        accepted: AcceptedKeys = NO_KEYS,
        folder: Path | None = None,
    ):
        """config: the content of config.json. where: its place, for errors. folder: None for a model in memory."""
        self.path, self._where = folder, f"{folder or where}"
        self.model_config = config_json.parse_model_config(config, where, accepted)
        self.carried = config_json.parse_carried(config)
        self._shards = shards
        if folder is not None:
            self.files = model_record.find_carried_files(folder)
            self.unread = describe_unread(folder)
        self._check_layers()
        renaming = tensor_names.find_common_prefix(self.arch, self.model_config, self._shards.names())
        renaming.report(self._where)
        self._shards.rename(renaming.apply)
        split_experts(self.arch, self.model_config, self._shards)
        stated = self.model_config
        self.model_config = tensor_names.detect_optional_parts(self.arch, stated, self._shards.names())
        if stated.has_head and not self.model_config.has_head:
            self._check_base_model(config.get("architectures"))
        if folder is not None:
            model_record.check_beside(folder, self.model_config, accepted)
        stored, self._stored_names = self._check()
        self._items = {key: item for item in stored.values() for key in item.keys}

    def info(self, key: str) -> TensorInfo:
        dtype = self._shards.dtype(self._stored_names[self._items[key].name].name)
        return TensorInfo(self.param(key).shape(self.model_config), dtype)

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        assert kind == WEIGHT, "this format holds no optimizer state"
        item = self._items[key]
        stored = self._stored_names[item.name]
        tensor = self._shards.tensor(stored.name)
        for duplicate in stored.duplicates:
            if not torch.equal(tensor, self._shards.tensor(duplicate)):
                hint = "Is tie_word_embeddings true by mistake?"
                where = f"{self._where}: {duplicate}"
                raise CheckpointError(Problem(where, f"the bits of {stored.name}", "other bits", hint))
        # Compared once: later reads skip it.
        self._stored_names[item.name] = tensor_names.StoredName(stored.name)
        return item.extract(tensor, key, self.model_config)

    def trained_steps(self) -> int:
        return self.step or (read_trainer_step(self.path) if self.path else 0)

    def close(self) -> None:
        self._shards.close()

    def _check(self) -> tuple[dict[str, fused_tensors.StoredTensor], dict[str, tensor_names.StoredName]]:
        """Checks that every expected tensor has its shape and dtype. Allows no others but copies of tied ones."""
        names = self._shards.names()
        errors = self._errors()
        stored = fused_tensors.stored_tensors(self.arch, self.model_config, NAME)
        locations = tensor_names.locate_tensors(self.arch, self.model_config, names)
        expected = {
            name: item.shape(self.model_config)
            for item in stored.values()
            for name in (locations[item.name].name, *locations[item.name].duplicates)
        }
        if not any(name in names for name in expected):
            explain_other_names(names, list(expected), self._where, errors)
            errors.raise_if_any(self._shards.weights)
        self._shards.check(expected, self.arch.ignored_names.get(NAME, ()), errors)
        head = self.arch.find(Role.HEAD)
        item = head and stored.get(self.arch.stored_name(head.key, self.model_config, NAME))
        if item and [problem.where for problem in errors.problems if isinstance(problem, Problem)] == [item.name]:
            # A base model lacks nothing else.
            errors.problems.clear()
            expected_head = f"the head, a tensor of shape {item.shape(self.model_config)}"
            errors.add(item.name, expected_head, BASE_MODEL, HEAD_HINT)
        tied = tensor_names.find_tied_sets(self.arch, locations, stored.values())
        self._shards.check_own_bytes(expected, tied, errors)
        errors.raise_if_any(self._shards.weights)
        return stored, locations

    def _check_base_model(self, classes: object) -> None:
        """Says that the tensors are a base model's. Raises CheckpointError if the config names a class with a head."""
        head = self.arch.param(self.arch.find(Role.HEAD).key).locations[NAME].name
        if isinstance(classes, list) and classes:
            errors = self._errors()
            hint = f"{HEAD_HINT} A base model's config names {self.arch.hf_class(self.model_config)}."
            errors.add(head, f"the head, which {classes[0]} has", BASE_MODEL, hint)
            errors.raise_if_any(self._shards.weights)
        log.info("%s has no %s: it is read as a base model.", self._where, head)

    def _check_layers(self) -> None:
        """Raises CheckpointError for more layers than tensors, which bounds the work that a false num_layers causes."""
        count = len(self._shards.names())
        if self.model_config.num_layers > count:
            errors = self._errors()
            if not count:
                errors.raise_if_any()
            errors.add("num_layers", f"no more than the {count} tensors found", self.model_config.num_layers)
            errors.raise_if_any(self._shards.weights)

    def _errors(self) -> ErrorCollector:
        errors = ErrorCollector(f"{self._where} does not hold the model of its config.json", CheckpointError)
        errors.problems += self._shards.errors
        return errors


class HfReader(HfNamesReader):
    """Reads a folder's canonical tensors as views of mapped files."""

    def __init__(self, folder: Path, accepted: AcceptedKeys = NO_KEYS):
        config = config_json.load_config(folder / config_json.CONFIG)
        super().__init__(config, open_shards(folder), f"{folder / config_json.CONFIG}", accepted, folder)


def _split_shards(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    """Splits names, in order, into shards of at most `limit` bytes; a larger tensor has a shard of its own."""
    shard, filled = [], 0
    for name, size in sizes.items():
        if shard and filled + size > limit:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard


@dataclass(frozen=True)
class HfOptions(FormatOptions):
    shard_bytes: int = setting(SHARD_BYTES, f"largest shard (default {SHARD_BYTES})", low=1)


class HfFormat(Format):
    name = NAME
    description = f"config.json beside {SINGLE}, {TORCH_FILES.single}, or shards of either with their index"
    options = HfOptions

    def recognise(self, path: Path) -> bool:
        folder = path.parent if path.suffix in WEIGHT_SUFFIXES else path
        return (folder / config_json.CONFIG).is_file() and any(kind.are_complete_in(folder) for kind in FILE_KINDS)

    def recognise_part(self, path: Path) -> bool:
        return path.is_dir() and any(kind.are_in(path) for kind in FILE_KINDS)

    def open(self, path: Path, accepted: AcceptedKeys) -> HfReader:
        return HfReader(path.parent if path.is_file() else path, accepted)

    def write(self, source: Reader, output: Output, options: WriteOptions) -> None:
        """Writes the config, the shards, and their index if there are several."""
        stored = fused_tensors.stored_tensors(source.arch, source.model_config, NAME)
        tensors = {name: lazy_tensor(source, item) for name, item in stored.items()}
        dtypes = [tensor.dtype for tensor in tensors.values()]
        dtype = max(set(dtypes), key=dtypes.count)
        output.write_json(config_json.CONFIG, config_json.to_hf_config(source.model_config, source.carried, dtype))
        shards = list(
            _split_shards(
                {name: t.nbytes for name, t in tensors.items()}, self.parse_options(options.extra).shard_bytes
            )
        )
        weight_map = {}
        for number, names in enumerate(shards, 1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            output.write_safetensors(file, {name: tensors[name] for name in names}, {"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            output.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for file in source.files:
            output.copy_file(file)

    def reader_warning(self, model_config: ModelConfig) -> str:
        return config_json.explain_transformers_refusal(model_config)
