"""Names that wrapped modules give to a model's tensors, and Megatron-LM's own for them.

NeMo writes `module.` before a parameter's name, in an optimizer state's name too. Checkpoints of torch.distributed
alone (torch_dcp, Megatron-FSDP's fsdp_dtensor) write `model.`, and any number of `module.`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_ligo.checkpoint.formats.megatron_core.dcp_metadata import DcpContents
from megatron_ligo.common.errors import CheckpointError, Problem

WRAPPER, MODEL_STATE, OPTIMIZER_STATE = "module.", "model.", "optimizer.state."


def unwrap(contents: DcpContents, folder: Path) -> DcpContents:
    """Returns the contents with Megatron-LM's names of tensors. Raises CheckpointError if two become one."""
    tensors = {_unwrap_name(name): tensor for name, tensor in contents.tensors.items()}
    if len(tensors) < len(contents.tensors):
        raise CheckpointError(Problem(f"{folder}", "one model", "tensors that differ by a prefix of their names"))
    return replace(contents, tensors=tensors)


def _unwrap_name(name: str) -> str:
    if name.startswith(OPTIMIZER_STATE):
        state, dot, rest = name.removeprefix(OPTIMIZER_STATE).partition(".")
        return f"{OPTIMIZER_STATE}{state}{dot}{rest.removeprefix(WRAPPER)}"
    name = name.removeprefix(MODEL_STATE)
    while name.startswith(WRAPPER):
        name = name.removeprefix(WRAPPER)
    return name
