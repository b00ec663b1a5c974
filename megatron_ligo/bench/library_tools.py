"""Times the libraries' own tools on the same model: Megatron-core's save and load, DeepSpeed's ds_to_universal.

Each runs in a new process, holds the whole model in memory by design, and leaves its result in `target`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_ligo.checkpoint import formats

LibraryTool = Callable[[Path, Path, Path], dict[str, float]]  # source, work folder, target -> seconds by part


class ParameterSum(torch.nn.Module):
    """A module whose loss depends on every parameter: their sum."""

    def forward(self) -> torch.Tensor:
        """Returns a scalar."""
        return sum(parameter.sum() for parameter in self.parameters())


def run_megatron_core(source: Path, work: Path, target: Path) -> dict[str, float]:
    """Saves and loads the source's weights as one rank's GPTModel, through dist_checkpointing."""
    from megatron.core import dist_checkpointing

    from megatron_ligo.distributed import mesh as meshes
    from megatron_ligo.models.full import parameters
    from megatron_ligo.models.full.gpt import FullGPT
    from megatron_ligo.models.mcore.layer_spec import BuildOptions

    meshes.init_distributed()
    reader, mesh = formats.open(source), meshes.build_mesh(1, 1)
    model = FullGPT(reader.model_config, BuildOptions(), mesh)
    parameters.fill_parameters(model, reader.model_config, mesh, reader.read)
    target.mkdir()
    return {
        "save": _time_until_synced(lambda: dist_checkpointing.save(model.sharded_state_dict(), str(target))),
        "load": _time_until_synced(lambda: dist_checkpointing.load(model.sharded_state_dict(), str(target))),
    }


def run_ds_to_universal(source: Path, work: Path, target: Path) -> dict[str, float]:
    """Converts a ZeRO 1 checkpoint saved after one step (fp32 weights and both moments) with ds_to_universal."""
    import deepspeed
    from deepspeed.checkpoint import ds_to_universal

    from megatron_ligo.distributed import mesh as meshes

    meshes.init_distributed()
    reader = formats.open(source)
    model = ParameterSum()
    for key in reader.keys():  # noqa: SIM118 - no dict
        model.register_parameter(key.replace(".", "_"), torch.nn.Parameter(reader.read(key).clone()))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), fused=True),
        config={"train_batch_size": 1, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True},
        dist_init_required=False,
    )
    engine.backward(engine())
    engine.step()
    engine.save_checkpoint(work, tag="step", client_state={"universal_checkpoint_info": {}, "iteration": 1})
    args = argparse.Namespace(
        input_folder=str(work / "step"),
        output_folder=str(target / "step"),
        num_extract_workers=2,
        num_merge_workers=2,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        return {"ds_to_universal": _time_until_synced(lambda: ds_to_universal.main(args))}


TOOLS: dict[str, LibraryTool] = {"Megatron-core": run_megatron_core, "DeepSpeed": run_ds_to_universal}


def _time_until_synced(job: Callable[[], object]) -> float:
    """Returns the seconds until a job's output is on disk."""
    start = time.perf_counter()
    job()
    os.sync()
    return time.perf_counter() - start
