"""For somebody's own DeepSpeed script over a Megatron-core model: the mpu, and the weights of a hand-off."""

from __future__ import annotations

from pathlib import Path

from deepspeed import DeepSpeedEngine
from torch import nn

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common.errors import CheckpointError, Problem, machine_errors
from megatron_ligo.distributed.mesh import DeepSpeedMpu, current_mesh
from megatron_ligo.models.full import universal_loading


@machine_errors()
def deepspeed_mpu() -> DeepSpeedMpu:
    """Returns the `mpu` for `deepspeed.initialize` over the process groups that Megatron-core has now.

    `megatron.core.parallel_state` itself lacks functions that DeepSpeed calls. Raises LayoutError without groups: call
    `parallel_state.initialize_model_parallel` first, also after `ligo.fit`, whose own groups end with it.
    """
    return DeepSpeedMpu(current_mesh())


@machine_errors()
def prepare_for_universal(model: nn.Module, checkpoint: str | Path | Reader) -> None:
    """Tells DeepSpeed how each parameter of a Megatron-core model is sharded. Call it before `deepspeed.initialize`.

    Only ZeRO 3 with tensor parallelism needs it. checkpoint: the universal checkpoint, or its hand-off.
    """
    universal_loading.prepare_for_universal(model, _open(checkpoint).model_config, current_mesh().tp_group)


@machine_errors()
def load_universal(engine: DeepSpeedEngine, checkpoint: str | Path | Reader) -> None:
    """Loads a universal checkpoint, or a hand-off's, into an engine with `"checkpoint": {"load_universal": True}`.

    Collective. The engine's own learning-rate scheduler stays as it is. Raises CheckpointError if a file is not safe to
    load, or if a loaded parameter is not bit-identical to the files: DeepSpeed does not check that.
    """
    universal_loading.load_universal(engine, _open(checkpoint), current_mesh().tp_group)


def _open(checkpoint: str | Path | Reader) -> Reader:
    reader = checkpoint if isinstance(checkpoint, Reader) else formats.open(checkpoint)
    if reader.format != universal_loading.UNIVERSAL:
        hint = "Convert it: ligo.convert(checkpoint, folder, to='universal')."
        raise CheckpointError(Problem(f"{reader.path}", "a universal checkpoint", reader.format, hint))
    return reader
