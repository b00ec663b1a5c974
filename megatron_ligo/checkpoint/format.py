"""What every checkpoint format provides: it recognises a path, opens a Reader of canonical tensors, writes from one.

A format is one subclass of `Format` in a module of formats/<format>/; formats/__init__.py finds it by scanning the
folder. Tensor names that are neither Hugging Face's nor Megatron-core's stand in the families' files. All formats are
imported together: what only one needs (Megatron-core, DeepSpeed) is imported inside its functions.
sharding/fused_tensors.py states which tensors a format stores and the canonical parameters in each; a writer hands
them to `Output` as `LazyTensor`s. A format without a config of its own stores model_record.py's files beside its
weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.io.output import Output
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.checkpoint.source_keys import AcceptedKeys
from megatron_ligo.common.errors import ConfigError, ErrorCollector
from megatron_ligo.config.typed_toml import read_section


@dataclass(frozen=True)
class FormatOptions:
    """Options that one format alone takes: the fields of a subclass, each made by `typed_toml.setting`."""

    def check(self, errors: ErrorCollector) -> None:
        """Adds an error for each value that its type and limits allow and the format cannot use."""


@dataclass
class WriteOptions:
    """How a checkpoint is written.

    dtype: of the weights (None: as stored). tp, pp: the layout, if the format has one. workers: threads that hash and
    write. extra: the format's own options by name, as the user gave them; `Format.parse_options` checks and types them.
    """

    dtype: torch.dtype | None = None
    tp: int = 1
    pp: int = 1
    workers: int = 2
    extra: Mapping[str, object] = field(default_factory=dict)


class Format(ABC):
    """One checkpoint format. It has no state: everything is read from a path, or written from a Reader."""

    name: str  # the word users type
    description: str  # what `recognise` looks for; listed if a path holds no checkpoint
    writable: bool = True
    stored_dtype: torch.dtype | None = None  # the one dtype that the format stores; None: any
    has_layout: bool = False  # `write` obeys tp and pp, or refuses one of them by its name
    stores_moments: bool = False  # `write` stores Adam's moments unless `unsupported_moments` says why not
    options: type[FormatOptions] = FormatOptions

    @abstractmethod
    def recognise(self, path: Path) -> bool:
        """True for a checkpoint of this format. Looks at names and a few bytes only."""

    def recognise_part(self, path: Path) -> bool:
        """True for files of this format that lack others, which `open` then names. Asked if no format has all."""
        return False

    @abstractmethod
    def open(self, path: Path, accepted: AcceptedKeys) -> Reader:
        """Opens a checkpoint, reading headers only. accepted: the unknown keys that may stand in its config.

        Raises CheckpointError with every error in the headers.
        """

    def write(self, source: Reader, output: Output, options: WriteOptions) -> None:
        """Declares files and their contents to `output`. Runs on a `DryRunOutput` first, which only counts bytes."""
        raise ConfigError(f"format {self.name!r} can only be read.")

    def unsupported_moments(self, source: Reader, options: WriteOptions) -> str:
        """Returns why a format that stores moments cannot store the source's; "" if it can."""
        return ""

    def reader_warning(self, model_config: ModelConfig) -> str:
        """Returns why other programs that read the format may refuse the model, or compute another; "" if not."""
        return ""

    def parse_options(self, extra: Mapping[str, object]) -> FormatOptions:
        """Returns the format's own options, typed. Raises ConfigError with every unknown name and unusable value."""
        errors = self._errors()
        parsed = self._parse_options(extra, errors)
        errors.raise_if_any()
        return parsed

    def check_options(self, options: WriteOptions) -> WriteOptions:
        """Returns the options with the format's dtype. Raises ConfigError with everything that it does not take."""
        errors = self._errors()
        self._parse_options(options.extra, errors)
        layout = f"tp {options.tp}, pp {options.pp}"
        if options.tp < 1 or options.pp < 1:
            errors.add("layout", "positive tp and pp", layout)
        elif (options.tp, options.pp) != (1, 1) and not self.has_layout:
            hint = "The layout is chosen when the checkpoint is loaded."
            errors.add("layout", "none: it has no tensor or pipeline parallelism", layout, hint)
        if options.workers < 1:
            errors.add("workers", "a positive number", options.workers)
        if self.stored_dtype is not None and options.dtype not in (None, self.stored_dtype):
            errors.add("dtype", self.stored_dtype, options.dtype, "Leave it out.")
        errors.raise_if_any()
        return replace(options, dtype=self.stored_dtype or options.dtype)

    def _parse_options(self, extra: Mapping[str, object], errors: ErrorCollector) -> FormatOptions:
        if extra and not fields(self.options):
            for name, value in extra.items():
                errors.add(f"option {name}", "none: the format has no options", repr(value), "Leave it out.")
            return self.options()
        parsed = read_section(self.options, dict(extra), errors, prefix="option ")
        parsed.check(errors)
        return parsed

    def _errors(self) -> ErrorCollector:
        return ErrorCollector(f"the format {self.name} cannot be written so", ConfigError)
