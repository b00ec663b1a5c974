"""Tensors by name: a mapped file (safetensors, or a state dict of torch.save), or a state dict in memory."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_ligo.checkpoint.io import tensor_check, torch_files
from megatron_ligo.common.atomic_files import parse_json
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem

SAFETENSORS = ".safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorFile(ABC):
    """An open file, or a state dict. Opening it raises CheckpointError if it is damaged."""

    @abstractmethod
    def names(self) -> Collection[str]:
        """Returns the names of the tensors."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's stored shape."""

    @abstractmethod
    def dtype_name(self, name: str) -> str:
        """Returns a tensor's stored dtype, as text."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype | None:
        """Returns a tensor's dtype; None for integers, booleans and 8-bit types, which are not weights."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Returns a tensor in its stored shape and dtype, as a view of the mapped file."""


class SafetensorsFile(TensorFile):
    def __init__(self, path: Path):
        self._path = path
        try:
            # The library checks that the tensors' bytes fill the file, each their own.
            self._file = safe_open(path, framework="pt")
            _check_header(path)
        except (SafetensorError, OSError, ValueError) as error:
            hint = "Download it again."
            raise CheckpointError(Problem(f"{path}", "a whole safetensors file", f"{error}", hint)) from None

    def names(self) -> Collection[str]:
        return self._file.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype_name(self, name: str) -> str:
        return self._file.get_slice(name).get_dtype()

    def dtype(self, name: str) -> torch.dtype | None:
        return DTYPES.get(self.dtype_name(name))

    def tensor(self, name: str) -> Tensor:
        return tensor_check.check_tensor(f"{name} ({self._path.name})", self._file.get_tensor(name))


def _check_header(path: Path) -> None:
    """Raises ValueError for a header with one name twice, of which the library silently takes the last."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        parse_json(file.read(size))


class StateDict(TensorFile):
    """A state dict in memory. where: what holds it, for errors."""

    def __init__(self, state: Mapping[str, object], where: str):
        self.where = where
        errors = ErrorCollector(f"{where} holds values that are not tensors", CheckpointError)
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                hint = "Save the model's state dict alone." if isinstance(value, dict) else ""
                errors.add(f"{name!r}"[:200], "a tensor by its name", type(value).__name__, hint)
            elif isinstance(value, DTensor) or value.is_meta:
                found = "one on the meta device" if value.is_meta else "a DTensor: a part of one on each rank"
                hint = "Gather it first, by torch's get_model_state_dict with full_state_dict = true."
                errors.add(name, "a tensor with all its numbers", found, hint)
        errors.raise_if_any()
        self._tensors: dict[str, Tensor] = dict(state)

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype_name(self, name: str) -> str:
        return f"{self._tensors[name].dtype}"

    def dtype(self, name: str) -> torch.dtype | None:
        dtype = self._tensors[name].dtype
        return dtype if dtype in DTYPES.values() else None

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach().cpu()

    def stored_tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by name, of any shape; of a file, their bytes are not compared yet."""
        return self._tensors


class StateDictFile(StateDict):
    """The state dict in a file of torch.save."""

    def __init__(self, path: Path):
        self._path = path
        state = torch_files.load(path)
        if not isinstance(state, dict):
            raise CheckpointError(Problem(f"{path}", "tensors by name", type(state).__name__))
        super().__init__(state, f"{path}")

    def tensor(self, name: str) -> Tensor:
        return torch_files.check_stored(f"{name} ({self._path.name})", self._tensors[name])


def open_tensor_file(path: Path) -> TensorFile:
    """Opens a file by its suffix. Raises CheckpointError if it is damaged, or no file."""
    if not path.is_file():
        raise CheckpointError(Problem(f"{path}", "a file of tensors", "no file"))
    return SafetensorsFile(path) if path.suffix == SAFETENSORS else StateDictFile(path)
