"""Resumes at another layout: joins saved fp32 masters and moments, reshards them and fills ZeRO's state."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.formats.deepspeed.engine_rank import read_param_shapes
from megatron_ligo.checkpoint.formats.deepspeed.rank_files import EngineFiles
from megatron_ligo.checkpoint.formats.deepspeed.zero_groups import ZeroOptimizerState
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.config.run_config import TrainingSection
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.models.full.parameters import iterate_parameters, read_local_tensor
from megatron_ligo.training.checkpointing.run_checkpoints import ENGINE_TAG, RunCheckpoint
from megatron_ligo.training.engine import engine_layout

log = logging.getLogger(__name__)

# Takes a parameter's name, the parameter and a kind (WEIGHT or a moment); returns this TP rank's shard of it.
PartReader = Callable[[str, nn.Parameter, str], Tensor]


def layout_changed(checkpoint: RunCheckpoint | None, section: TrainingSection, mesh: Mesh) -> bool:
    """Returns True if the checkpoint's tensors must be resharded to this layout; False without a checkpoint.

    Logs it if the layout is another one at all.
    """
    layout = engine_layout(section, mesh)
    if checkpoint is None or checkpoint.layout == layout:
        return False
    message = "%s is of another layout (%s): from here on numbers agree within rounding"
    log.info(message, checkpoint.folder, checkpoint.layout)
    return not layout.has_files_of(checkpoint.layout)


@dataclass(frozen=True)
class FlatSlice:
    """The elements of a parameter that this rank holds: `numel` from index `first`, at `start` in `flat` (1-D)."""

    flat: Tensor
    start: int
    first: int
    numel: int


@torch.no_grad()
def fill_module(module: nn.Module, read_part: PartReader) -> None:
    """Sets the weights of a module that no engine wraps yet."""
    for name, parameter in module.named_parameters():
        parameter.copy_(read_part(name, parameter, WEIGHT))


@torch.no_grad()
def fill_optimizer(engine: DeepSpeedEngine, read_part: PartReader, steps: int | None = None) -> None:
    """Sets the fp32 masters of an engine that has taken no step and whose module already has these weights.

    steps: Adam's step count, which is set together with its moments; None: sets the masters only.
    """
    optimizer, kinds = engine.optimizer, (WEIGHT,)
    if steps is not None:
        kinds = (WEIGHT, *MOMENTS)
        for flat in _flat_masters(optimizer):
            zeros = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            optimizer.optimizer.state[flat] = {"step": torch.tensor(float(steps), device=flat.device), **zeros}
    for name, parameter in engine.module.named_parameters():
        part = _find_slice(optimizer, parameter)
        for kind in kinds if part else ():
            flat = part.flat if kind == WEIGHT else optimizer.optimizer.state[part.flat][kind]
            values = read_part(name, parameter, kind).reshape(-1)[part.first : part.first + part.numel]
            flat.narrow(0, part.start, part.numel).copy_(values)


def _flat_masters(optimizer: object) -> list[Tensor]:
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3
        return optimizer.fp32_partitioned_groups_flat
    return [flat for group in optimizer.optimizer.param_groups for flat in group["params"]]


def _find_slice(optimizer: object, parameter: nn.Parameter) -> FlatSlice | None:
    """Returns where this rank holds elements of the parameter, or None if it holds none."""
    if hasattr(parameter, "ds_id"):
        group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        first = size * optimizer._get_param_partition_rank(parameter)
        numel = min(size, parameter.ds_numel - first)
        return FlatSlice(optimizer.fp32_partitioned_groups_flat[group], start, first, numel) if numel > 0 else None
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    (flat,) = optimizer.optimizer.param_groups[mapping.param_group_index]["params"]
    fragment = mapping.get_hp_fragment_address()
    return FlatSlice(flat, fragment.start, mapping.lp_fragment_address.start, fragment.numel)


def model_part_reader(
    model: nn.Module, model_config: ModelConfig, read: Callable[..., Tensor], mesh: Mesh
) -> PartReader:
    """Returns a reader of this rank's shards of a model's canonical tensors, each in its parameter's shape.

    read: a Reader's `read`, or one for weights only.
    """
    items = {id(parameter): item for parameter, item in iterate_parameters(model, model_config)}

    def read_part(name: str, parameter: nn.Parameter, kind: str) -> Tensor:
        read_kind = read if kind == WEIGHT else lambda key: read(key, kind)
        return read_local_tensor(items[id(parameter)], read_kind, model_config, mesh.tp, mesh.tp_rank)

    return read_part


class SavedOptimizer:
    """The parameters and moments in a fit's checkpoint, joined over its ranks.

    steps: Adam's step count, None if there are no moments.
    """

    def __init__(self, checkpoint: RunCheckpoint):
        self.folder = checkpoint.folder
        files = EngineFiles(self.folder / ENGINE_TAG, operator=True)
        errors = ErrorCollector(f"{self.folder} does not hold the fit of its layout", CheckpointError)
        states = []
        for mp_rank in range(files.mp_world_size):
            where = f"mp_rank_{mp_rank:02d}"
            shapes = read_param_shapes(files.model_states[mp_rank], where, errors)
            states.append((ZeroOptimizerState(files.optim_states[mp_rank], shapes, where, errors), shapes))
        errors.raise_if_any()
        # A model-parallel rank is (pp_rank x ep + ep_rank) x tp + tp_rank. Expert-parallel ranks hold the same maps.
        dims = checkpoint.layout.dims
        self._stages_by_tp_rank = [states[tp_rank :: dims.tp * dims.ep] for tp_rank in range(dims.tp)]
        counts = {state.step for state, _ in states}
        if len(counts) > 1:
            raise CheckpointError(Problem(f"{self.folder}", "one count of Adam's steps on all ranks", counts))
        self.steps = counts.pop()

    def part_reader(self, mesh: Mesh) -> PartReader:
        """Returns a reader of this rank's shards at the layout of `mesh`."""

        def read_part(name: str, parameter: nn.Parameter, kind: str) -> Tensor:
            dim = getattr(parameter, "partition_dim", -1)
            tp_ranks = self._stages_by_tp_rank if dim >= 0 else self._stages_by_tp_rank[:1]
            pieces = [self._read_piece(stages, name, kind) for stages in tp_ranks]
            joined = torch.cat(pieces, dim) if dim >= 0 else pieces[0]
            part = joined.chunk(mesh.tp, dim)[mesh.tp_rank] if dim >= 0 else joined
            expected = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if part.shape != expected:
                raise CheckpointError(Problem(f"{self.folder}: {name}", f"shape {expected}", tuple(part.shape)))
            return part

        return read_part

    def _read_piece(self, stages: list, name: str, kind: str) -> Tensor:
        """Reads a tensor-parallel rank's shard; a tied parameter is read from the first stage that has it."""
        for state, groups in stages:
            for shapes in groups:
                if name in shapes and name in state and state.numel(name) == prod(shapes[name]):
                    return state.read(name, kind).reshape(shapes[name])
        raise CheckpointError(
            Problem(f"{self.folder}: {name}", "all of its elements in ZeRO's tensors", "none, or some")
        )
