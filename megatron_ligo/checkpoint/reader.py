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

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's two, in fp32, shaped like the weight


@dataclass(frozen=True)
class TensorInfo:
    """Canonical shape and stored dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Reader(ABC):
    """A checkpoint as a table of canonical tensors, read one at a time.

    Growth is a Reader too: what it reads is computed from another Reader and an operator.
    """

    format: str
    path: Path | None
    model_config: ModelConfig
    step: int = 0  # optimizer steps taken, 0 where unknown
    layout: dict = {}  # tp, pp, ... as stored; {} for formats without
    files: tuple[Path, ...] = ()  # tokenizer and the like, carried along by name
    unread: tuple[str, ...] = ()  # what the files hold besides, in words, and a Reader does not give
    groups: tuple[Mapping[str, object], ...] = ()  # settings of the optimizer's groups as stored (adam.py)
    carried: Mapping[str, object] = {}  # Hugging Face config keys that are no sizes (token ids, ...), verbatim

    @property
    def arch(self) -> Architecture:
        return architectures.get(self.model_config.arch)

    @property
    def has_moments(self) -> bool:
        return False

    @abstractmethod
    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of the weight of a key, without reading it."""

    @abstractmethod
    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        """The canonical tensor of a key (kind: "weight" or one of MOMENTS). CPU; may be a view of a mapped file."""

    def keys(self) -> Iterator[str]:
        """Every stored key, in file order."""
        return self.arch.keys(self.model_config)

    def param(self, key: str) -> ParamSpec:
        return self.arch.param(key)

    def fingerprint(self) -> object | None:
        """What must be unchanged (JSON) for a conversion that was interrupted to go on; None: it starts anew."""
        if self.path is None:
            return None
        found = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
        stats = [(file, file.stat()) for file in found if file.is_file()]
        root = self.path if self.path.is_dir() else self.path.parent
        return [[str(file.relative_to(root)), stat.st_size, stat.st_mtime_ns] for file, stat in stats]

    def close(self) -> None:  # noqa: B027 - most readers hold nothing open
        pass
