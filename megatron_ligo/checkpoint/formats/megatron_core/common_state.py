"""The optimizer's state without tensors in a distributed checkpoint: step counts and settings of param groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_ligo.checkpoint.formats.megatron_core.dcp_metadata import DcpContents, FileSpan
from megatron_ligo.checkpoint.formats.megatron_core.tensor_names import COMMON_FILE, COMMON_OBJECT, CONFIG_FILE
from megatron_ligo.checkpoint.formats.megatron_lm import arguments
from megatron_ligo.checkpoint.io import adam_groups, torch_files
from megatron_ligo.common.errors import CheckpointError, Problem

MAX_NESTING = 6
# What a checkpoint of torch.distributed alone holds under names of their own.
OBJECTS = ("args", "iteration")


def load(folder: Path, contents: DcpContents) -> dict:
    """Loads the state without tensors: the common file, the object that replaces it, or objects by their own names."""
    path, objects = folder / COMMON_FILE, contents.objects
    if not path.is_file() and COMMON_OBJECT in objects:
        states = _load_object(folder, objects[COMMON_OBJECT])
        common = states[0] if isinstance(states, list) and len(states) == 1 else states
    elif not path.is_file() and not (folder / CONFIG_FILE).is_file():
        common = {name: _load_object(folder, objects[name]) for name in OBJECTS if name in objects}
    else:
        common = torch_files.load(path, arguments.STAND_INS)
    if not isinstance(common, dict):
        raise CheckpointError(Problem(f"{path}", "a dict of the state without tensors", type(common).__name__))
    optimizer = common.get("optimizer")
    if isinstance(optimizer, list) and len(optimizer) == 1:
        # PyTorch Lightning's form, in NeMo.
        common["optimizer"] = optimizer[0]
    return common


def _load_object(folder: Path, span: FileSpan) -> object:
    return torch_files.load_part(folder / span.file, span.offset, span.length, arguments.STAND_INS)


def read_step(path: Path, common: dict, has_moments: bool) -> int:
    """Returns the optimizer's step count if its moments are read, else the iteration."""
    # NeMo has PyTorch Lightning's word for it.
    step = common.get("iteration", common.get("global_step", 0))
    if has_moments:
        values = list(_iter_steps(common.get("optimizer")))
        steps = {adam_groups.parse_step(value) for value in values}
        if len(steps) != 1 or None in steps:
            counts = ", ".join(sorted(map(repr, values))) or "none"
            raise CheckpointError(Problem(f"{path}", "one step count of the optimizer", counts))
        (step,) = steps
    if type(step) is not int or step < 0:
        raise CheckpointError(Problem(f"{path}", "iteration, a non-negative integer", repr(step)))
    return step


def read_groups(optimizer: object) -> tuple[dict, ...]:
    """Returns the settings of an optimizer's param groups. An optimizer with fp32 master weights nests another."""
    for _ in range(2):
        if isinstance(optimizer, Mapping) and "param_groups" not in optimizer:
            optimizer = optimizer.get("optimizer")
    return adam_groups.read_settings(optimizer.get("param_groups")) if isinstance(optimizer, Mapping) else ()


def _iter_steps(tree: object, depth: int = 0) -> Iterator[object]:
    """Yields every step count in an optimizer's state dict."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if name in ("step", "common_step"):
                yield value
            elif depth < MAX_NESTING:
                yield from _iter_steps(value, depth + 1)
    elif isinstance(tree, list | tuple) and depth < MAX_NESTING:
        for value in tree:
            yield from _iter_steps(value, depth + 1)
