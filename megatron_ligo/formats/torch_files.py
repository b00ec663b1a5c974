"""Files of torch.save, mapped and never executed: tensors, plain values and what the caller allows by name."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile, is_zipfile

import torch
from torch import Tensor

from megatron_ligo.errors import CheckpointError, Faults, message

# What torch raises for files that are not whole, or not its own.
DAMAGE = (
    BadZipFile, OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError, IndexError,
)  # fmt: skip


def load(path: Path, stand_ins: Sequence[tuple[object, str]] = (), mapped: bool = True) -> object:
    """What torch.save wrote, on the CPU, its tensors views of the mapped file unless it is not to be `mapped`.

    stand_ins: (object, "module.name") for classes that the file may name; give inert ones instead of the real.
    Raises CheckpointError for a damaged file, and for one that names anything else.
    """
    try:
        with torch.serialization.safe_globals(list(stand_ins)):
            # The format of torch before 1.6 is no zip archive and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zipfile(path))
    except FileNotFoundError:
        raise CheckpointError(message(f"{path}", "a file", "nothing there")) from None
    except pickle.UnpicklingError as error:
        found = str(error).split("Check the documentation")[0].strip()
        do = "It is not loaded: loading it could run code."
        raise CheckpointError(message(f"{path}", "tensors and plain values", found, do)) from None
    except DAMAGE as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise CheckpointError(message(f"{path}", "a whole file of torch.save", found, "Fetch it again.")) from None


def tensors(path: Path) -> dict[str, Tensor]:
    """A file that is a dict of named weights. Raises CheckpointError if it holds anything else."""
    state = load(path)
    if not isinstance(state, dict):
        raise CheckpointError(message(f"{path}", "tensors by name", type(state).__name__))
    faults = Faults(f"{path} holds what is no weight", CheckpointError)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            faults.add(repr(name), "a tensor by its name", type(value).__name__)
        elif value.layout is not torch.strided or not value.is_floating_point():
            faults.add(name, "a dense tensor of floating-point numbers", f"{value.layout}, {value.dtype}")
    faults.raise_if_any()
    return state
