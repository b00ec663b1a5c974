"""A run taken up at another layout: its masters and moments, whole, are cut anew and laid into ZeRO's flat tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.formats.deepspeed.rank_files import EngineFiles
from megatron_ligo.checkpoint.formats.deepspeed.reader import read_param_shapes
from megatron_ligo.checkpoint.formats.deepspeed.zero_groups import ZeroOptimizerState
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.config.run_config import TrainingSection
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.models.full.parameters import iterate_parameters, read_local_tensor
from megatron_ligo.training.checkpointing.run_checkpoints import ENGINE_TAG, RunCheckpoint
from megatron_ligo.training.engine import engine_layout

log = logging.getLogger(__name__)

# A parameter, by its name, and what of it (WEIGHT or a moment) -> this tensor-parallel rank's part.
PartReader = Callable[[str, nn.Parameter, str], Tensor]


def layout_changed(found: RunCheckpoint | None, run: TrainingSection, mesh: Mesh) -> bool:
    """Whether a checkpoint is of another layout than this run's."""
    if found is None or found.layout == engine_layout(run, mesh):
        return False
    log.info("%s is of another layout (%s): from here on numbers agree within rounding", found.folder, found.layout)
    return True


@dataclass(frozen=True)
class FlatSlice:
    """Where a rank's numbers of a parameter lie: `numel` of them, from `first` on in it, from `start` on in `flat`."""

    flat: Tensor
    start: int
    first: int
    numel: int


@torch.no_grad()
def fill_module(module: nn.Module, part: PartReader) -> None:
    """Sets the weights of a module that is not yet in an engine."""
    for name, parameter in module.named_parameters():
        parameter.copy_(part(name, parameter, WEIGHT))


@torch.no_grad()
def fill_optimizer(engine: DeepSpeedEngine, part: PartReader, steps: int | None = None) -> None:
    """Sets the fp32 masters of an engine that has made no step, whose module has these weights already.

    steps: Adam's count; its moments are set too. None: there are none.
    """
    optimizer, kinds = engine.optimizer, (WEIGHT,)
    if steps is not None:
        kinds = (WEIGHT, *MOMENTS)
        for flat in _flat_masters(optimizer):
            zeros = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            optimizer.optimizer.state[flat] = {"step": torch.tensor(float(steps), device=flat.device), **zeros}
    for name, parameter in engine.module.named_parameters():
        place = _find_slice(optimizer, parameter)
        for kind in kinds if place else ():
            flat = place.flat if kind == WEIGHT else optimizer.optimizer.state[place.flat][kind]
            numbers = part(name, parameter, kind).reshape(-1)[place.first : place.first + place.numel]
            flat.narrow(0, place.start, place.numel).copy_(numbers)


def _flat_masters(optimizer: object) -> list[Tensor]:
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3
        return optimizer.fp32_partitioned_groups_flat
    return [flat for group in optimizer.optimizer.param_groups for flat in group["params"]]


def _find_slice(optimizer: object, parameter: nn.Parameter) -> FlatSlice | None:
    """None where this rank has none of the parameter's numbers."""
    if hasattr(parameter, "ds_id"):
        group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        first = size * optimizer._get_param_partition_rank(parameter)
        numel = min(size, parameter.ds_numel - first)
        return FlatSlice(optimizer.fp32_partitioned_groups_flat[group], start, first, numel) if numel > 0 else None
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    (flat,) = optimizer.optimizer.param_groups[mapping.param_group_index]["params"]
    held, whole = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
    return FlatSlice(flat, held.start, whole.start, held.numel)


def model_part_reader(
    model: nn.Module, model_config: ModelConfig, read: Callable[..., Tensor], mesh: Mesh
) -> PartReader:
    """Cuts a model's canonical tensors. read: a Reader's, or of weights only."""
    items = {id(parameter): item for parameter, item in iterate_parameters(model, model_config)}

    def part(name: str, parameter: nn.Parameter, kind: str) -> Tensor:
        chosen = read if kind == WEIGHT else lambda key: read(key, kind)
        return read_local_tensor(items[id(parameter)], chosen, model_config, mesh.tp, mesh.tp_rank)

    return part


class SavedOptimizer:
    """The parameters of a fit's checkpoint, whole. steps: Adam's count, None where there are no moments."""

    def __init__(self, found: RunCheckpoint):
        saved = EngineFiles(found.folder / ENGINE_TAG, operator=True)
        self.folder = found.folder
        errors = ErrorCollector(f"{found.folder} does not hold the fit of its layout", CheckpointError)
        held = [
            (ZeroOptimizerState(saved.optim_states[mp], shapes, where, errors), shapes)
            for mp, shapes, where in _ranks(saved, errors)
        ]
        errors.raise_if_any()
        # Tensor-parallel ranks of the first stage come first.
        tp = found.layout.dims.tp
        self._ranks = [held[rank::tp] for rank in range(tp)]
        counts = {masters.step for masters, _ in held}
        if len(counts) > 1:
            raise CheckpointError(Problem(f"{found.folder}", "one count of Adam's steps on all ranks", counts))
        self.steps = counts.pop()

    def part_reader(self, mesh: Mesh) -> PartReader:
        def part(name: str, parameter: nn.Parameter, kind: str) -> Tensor:
            dim = getattr(parameter, "partition_dim", -1)
            pieces = [self._piece(stages, name, kind) for stages in (self._ranks if dim >= 0 else self._ranks[:1])]
            whole = torch.cat(pieces, dim) if dim >= 0 else pieces[0]
            cut = whole.chunk(mesh.tp, dim)[mesh.tp_rank] if dim >= 0 else whole
            expected = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if cut.shape != expected:
                raise CheckpointError(Problem(f"{self.folder}: {name}", f"shape {expected}", tuple(cut.shape)))
            return cut

        return part

    def _piece(self, stages: list, name: str, kind: str) -> Tensor:
        """A tensor-parallel rank's part; what is tied is the first stage's."""
        for masters, groups in stages:
            for shapes in groups:
                if name in shapes and name in masters and masters.numel(name) == prod(shapes[name]):
                    return masters.read(name, kind).reshape(shapes[name])
        raise CheckpointError(Problem(f"{self.folder}: {name}", "its numbers in ZeRO's flat tensors", "none, or some"))


def _ranks(saved: EngineFiles, errors: ErrorCollector) -> Iterator[tuple[int, list, str]]:
    for mp in range(saved.mp_world_size):
        where = f"mp_rank_{mp:02d}"
        yield mp, read_param_shapes(saved.model_states[mp], where, errors), where
