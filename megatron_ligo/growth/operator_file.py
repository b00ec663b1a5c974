"""An operator's files: `operator.safetensors` (its tensors, global, fp32) and `operator.json` (sizes, settings).

operator.json has a digest of its own content and of the tensors' file, and `source`: the digest of the small model's
weights. The digests detect damage and accidents, not an attacker.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common import symlinks
from megatron_ligo.common.atomic_files import publish_file, read_json, write_json
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.common.file_digest import SEAL, digest_file, is_intact, seal
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.growth.operator import Operator

log = logging.getLogger(__name__)

TENSORS, RECORD = "operator.safetensors", "operator.json"
# Version 1 has neither its own digest nor that of the tensors' file.
VERSION, VERSIONS = 2, (1, 2)


class OperatorFile(Operator):
    """Operator whose tensors are read from its folder, one at a time (memory-mapped)."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        symlinks.check_symlinks(self.folder)
        self.record = _read_record(self.folder / RECORD)
        settings = RunConfig.from_dict({"operator": self.record["settings"]}, f"{self.folder / RECORD}").operator
        super().__init__(
            ModelConfig.from_json(self.record["small"]), ModelConfig.from_json(self.record["large"]), settings
        )
        self._file = _open(self.folder / TENSORS)
        self._check_tensors()

    def tensor(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def check_digest(self) -> None:
        """Reads the tensors' file. CheckpointError unless it is the one that operator.json was written for."""
        expected = self.record.get("tensors_digest")
        actual = digest_file(self.folder / TENSORS)
        if expected is None:
            log.warning("%s was written by an earlier version: its tensors are taken as they are", self.folder)
        elif actual != expected:
            raise CheckpointError(
                Problem(f"{self.folder / TENSORS}", f"digest {expected} ({RECORD})", f"digest {actual}")
            )

    def source_digest(self) -> str | None:
        """Returns the digest of the weights that the operator was fitted on; None if its writer did not state it."""
        return self.record.get("source", {}).get("digest")

    def _check_tensors(self) -> None:
        errors = ErrorCollector(f"operator {self.folder}", CheckpointError)
        stored = set(self._file.keys())
        for name, shape in self.shapes().items():
            if name not in stored:
                errors.add(name, f"a tensor of shape {shape}", "nothing")
                continue
            header = self._file.get_slice(name)
            dtype = "I64" if name.startswith("gain.") and name.endswith(".source") else "F32"
            if tuple(header.get_shape()) != shape or header.get_dtype() != dtype:
                found = f"{header.get_dtype()} of shape {tuple(header.get_shape())}"
                errors.add(name, f"{dtype} of shape {shape}", found)
        for name in sorted(stored - set(self.shapes())):
            errors.add(name, "no such tensor for these sizes and settings", "one")
        errors.raise_if_any()


def write_operator(operator: Operator, tensors: Iterable[tuple[str, Tensor]], folder: Path, record: dict) -> None:
    """Writes an operator's folder. Each file is published atomically, the record last.

    tensors: all of `operator.shapes()`, of any strides. record: further keys of the record (source digest, step,
    losses). CheckpointError if a tensor has NaN or Inf.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors}
    assert set(contiguous) == set(operator.shapes()), "the tensors are not those that the operator's sizes imply"
    bad = [name for name, tensor in contiguous.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise CheckpointError(Problem(f"operator {folder}", "finite numbers", f"NaN or Inf in {', '.join(bad)}"))
    staged = folder / f".{TENSORS}.new"
    staged.touch()
    mode = staged.stat().st_mode
    # save_file replaces the file by one with owner-only permissions.
    save_file(contiguous, staged)
    staged.chmod(mode)
    tensors_digest = digest_file(staged)
    publish_file(staged, folder / TENSORS)
    own = {
        "version": VERSION,
        "tensors_digest": tensors_digest,
        "small": operator.small.to_json(),
        "large": operator.large.to_json(),
        "settings": asdict(operator.settings),
    }
    write_json(folder / RECORD, seal({**record, **own}))


def _read_record(path: Path) -> dict:
    try:
        record = read_json(path, finite=False)
    except FileNotFoundError:
        hint = "Name the folder that a fit wrote."
        raise CheckpointError(Problem(f"{path}", "an operator's record", "nothing", hint)) from None
    except ValueError as error:
        raise CheckpointError(Problem(f"{path}", "JSON", f"an error: {error}")) from None
    missing = {"version", "small", "large", "settings"} - set(record if isinstance(record, dict) else ())
    if missing:
        raise CheckpointError(Problem(f"{path}", f"the keys {', '.join(sorted(missing))}", "none of them"))
    if record["version"] not in VERSIONS:
        raise CheckpointError(Problem(f"{path}", f"version {VERSION}", record["version"]))
    if record["version"] > 1 and not is_intact(record):
        raise CheckpointError(Problem(f"{path}", f"its own digest, {record.get(SEAL)}", "other content"))
    if not isinstance(record.get("source", {}), dict):
        raise CheckpointError(Problem(f"{path}: source", "a table", repr(record["source"])))
    return record


def _open(path: Path):
    if not path.is_file():
        raise CheckpointError(Problem(f"{path}", "the operator's tensors", "no file"))
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(Problem(f"{path}", "a whole safetensors file", f"{error}")) from None
