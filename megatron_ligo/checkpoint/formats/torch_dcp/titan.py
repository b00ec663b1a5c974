"""torchtitan's checkpoints: torch.distributed.checkpoint with torchtitan's names, rotary pairs in Meta's order.

torchtitan loads DIR as `checkpoint.initial_load_path`. A tied model stores its embedding a second time, as the head.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.rope_scaling import scaling_kind
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.format import Format, WriteOptions
from megatron_ligo.checkpoint.formats.torch_dcp import dcp_folder
from megatron_ligo.checkpoint.formats.torch_dcp.dcp_folder import DcpTensors
from megatron_ligo.checkpoint.io.output import Output
from megatron_ligo.checkpoint.reader import WEIGHT, Reader, TensorInfo
from megatron_ligo.checkpoint.source_keys import NO_KEYS, AcceptedKeys
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector, Problem
from megatron_ligo.sharding import fused_tensors

NAME = "torchtitan"
LLAMA = "llama"


def check_is_llama(model_config: ModelConfig) -> None:
    """Raises ConfigError for what torchtitan's Llama does not compute."""
    errors = ErrorCollector(f"{NAME} cannot hold this model", ConfigError)
    if model_config.arch != LLAMA:
        errors.add("model_type", "Llama's network", model_config.model_type)
    if model_config.sliding_window is not None:
        errors.add("sliding_window", "none", model_config.sliding_window)
    kind = scaling_kind(model_config.rope_scaling)
    if kind not in ("default", "llama3"):
        errors.add("rope_scaling", "none, or llama3", kind)
    errors.raise_if_any()


class TitanReader(Reader):
    """Reads canonical tensors, joined from the ranks' chunks."""

    format = NAME

    def __init__(self, path: Path, folder: Path, accepted: AcceptedKeys = NO_KEYS):
        root = folder if model_record.has_record(folder) else dcp_folder.find_config(folder).parent
        self.path = path
        self.model_config, self.carried = model_record.read(root, accepted)
        check_is_llama(self.model_config)
        self.files = model_record.find_carried_files(root)
        self._tensors = DcpTensors(folder)
        self.unread = self._tensors.describe_unread()
        self._items = fused_tensors.stored_tensors(self.arch, self.model_config, NAME)
        self._by_key = {key: item for item in self._items.values() for key in item.keys}
        self._tied = dcp_folder.tied_names(self, NAME)
        self._check()

    def info(self, key: str) -> TensorInfo:
        dtype = self._tensors.dtype(self._by_key[key].name)
        return TensorInfo(self.param(key).shape(self.model_config), dtype)

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        assert kind == WEIGHT, "this format's optimizer state is not read"
        item = self._by_key[key]
        tensor, copy = self._tensors.tensor(item.name), self._tied.get(item.name)
        if copy in self._tensors.names() and not torch.equal(tensor, self._tensors.tensor(copy)):
            hint = "Is tie_word_embeddings true by mistake?"
            raise CheckpointError(Problem(f"{self.path}: {copy}", f"the bits of {item.name}", "other bits", hint))
        return item.extract(tensor, key, self.model_config)

    def _check(self) -> None:
        """Raises CheckpointError unless every tensor is there with its shape and dtype, and no others are."""
        errors = ErrorCollector(f"{self.path} does not hold the model of its config", CheckpointError)
        names = set(self._tensors.names())
        expected = {name: item.shape(self.model_config) for name, item in self._items.items()}
        expected |= {copy: expected[name] for name, copy in self._tied.items() if copy in names}
        for name, shape in expected.items():
            if name not in names:
                errors.add(name, f"a tensor of shape {shape}", "nothing")
            elif self._tensors.shape(name) != shape:
                errors.add(name, f"shape {shape}", self._tensors.shape(name))
            elif self._tensors.dtype(name) is None:
                errors.add(name, "a floating-point dtype of 16 bits or more", self._tensors.dtype_name(name))
        for name in sorted(names - set(expected)):
            errors.add(name, "no such tensor", "one")
        errors.raise_if_any()


class TitanFormat(Format):
    name = NAME
    description = ".metadata of torchtitan's checkpoint, with config.json or dims.json in it or beside it"

    def recognise(self, path: Path) -> bool:
        folder = dcp_folder.find_folder(path)
        return folder is not None and dcp_folder.is_torchtitan(folder)

    def open(self, path: Path, accepted: AcceptedKeys) -> TitanReader:
        return TitanReader(path, dcp_folder.find_folder(path) or path, accepted)

    def write(self, source: Reader, output: Output, options: WriteOptions) -> None:
        """Writes one file of whole tensors for each layer. Raises ConfigError for all but Llama's network."""
        check_is_llama(source.model_config)
        model_record.write(source, output)
        dcp_folder.write_folder(source, output, NAME)
