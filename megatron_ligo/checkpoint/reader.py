"""A checkpoint as canonical tensors: the `Reader` that every format opens and every conversion reads from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import ParamSpec
from megatron_ligo.common.file_digest import is_sidecar

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam: fp32, in the weight's shape


@dataclass(frozen=True)
class TensorInfo:
    """The canonical shape and the stored dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Reader(ABC):
    """A table of canonical tensors (unfused, untransposed, unpadded, global), read one at a time.

    A grown model is a Reader too: it computes its tensors from another Reader and an operator.
    """

    format: str
    path: Path | None
    model_config: ModelConfig
    step: int = 0  # optimizer steps taken; 0 if unknown
    layout: dict = {}  # tp, pp, ... as stored; {} if the format has none
    files: tuple[Path, ...] = ()  # the tokenizer's and others that conversions copy
    unread: tuple[str, ...] = ()  # what the files hold beyond the Reader's tensors, as text
    groups: tuple[Mapping[str, object], ...] = ()  # the optimizer's group settings (adam_groups.py)
    carried: Mapping[str, object] = {}  # Hugging Face config keys that are not sizes (token ids, ...)
    run_arguments: Mapping[str, object] | None = None  # Megatron-LM's, as saved; None if there are none
    accepted: Mapping[str, object] = {}  # unknown config keys that the user let through, with their values

    @property
    def arch(self) -> Architecture:
        return architectures.get(self.model_config.arch)

    @property
    def has_moments(self) -> bool:
        return False

    @abstractmethod
    def info(self, key: str) -> TensorInfo:
        """Returns the shape and dtype of a weight without reading it."""

    @abstractmethod
    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        """Returns the canonical tensor of a key, on the CPU, of the shape that `info` gives; may view a mapped file.

        kind: "weight" (in its stored dtype), or one of MOMENTS (fp32, if `has_moments`).
        """

    def keys(self) -> Iterator[str]:
        """Yields every stored key, in file order."""
        return self.arch.keys(self.model_config)

    def param(self, key: str) -> ParamSpec:
        return self.arch.param(key)

    def fingerprint(self) -> object | None:
        """Returns what must be unchanged (JSON) for an interrupted conversion to resume; None if it must start over."""
        if self.path is None:
            return None
        files = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
        stats = [(file, file.stat()) for file in files if file.is_file() and not is_sidecar(file)]
        root = self.path if self.path.is_dir() else self.path.parent
        return [[str(file.relative_to(root)), stat.st_size, stat.st_mtime_ns] for file, stat in stats]

    def trained_steps(self) -> int:
        """Returns the optimizer steps taken, also by a trainer's record that no conversion carries; 0 if unknown."""
        return self.step

    def close(self) -> None:  # noqa: B027 - most readers hold nothing open
        """Closes the files that the Reader holds open."""
