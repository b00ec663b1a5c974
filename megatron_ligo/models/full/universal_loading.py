"""Loading of DeepSpeed's universal checkpoints into a model in any layout, with verification.

Your own training script, with any Megatron-core GPTModel whose parameters have mcore's names:
examples/deepspeed_megatron.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint.affine import AffinePiece, ParamAffineMap
from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META, UNIVERSAL_CHECKPOINT_VERSION_KEY
from deepspeed.checkpoint.universal_checkpoint import SubparamShape
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import groups
from deepspeed.utils.tensor_fragment import fragment_address
from torch import nn

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Pack, Role
from megatron_ligo.checkpoint.io import torch_files
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common.errors import CheckpointError, ErrorCollector
from megatron_ligo.distributed.mesh import all_ranks
from megatron_ligo.models.full.parameters import iterate_parameters, read_local_tensor
from megatron_ligo.sharding.fused_tensors import StoredTensor
from megatron_ligo.sharding.tensor_parallel import padded_vocab

# From this version on DeepSpeed reads the shards' widths; earlier ones divide evenly.
UNIVERSAL_VERSION = 0.4
# The name of the format.
UNIVERSAL = "universal"
# Classes that DeepSpeed's own tools pickle into universal checkpoints. Unpickling them has no side effects.
ALLOWED_RECORDS = (LossScaler, DynamicLossScaler, ZeroStageEnum, SubparamShape, fragment_address)


def needs_preparation(model_config: ModelConfig, zero: int) -> bool:
    """True if `prepare_for_universal` is needed: under ZeRO 3, and for a head's bias, which DeepSpeed cannot pad."""
    return zero == 3 or architectures.get(model_config.arch).has(Role.HEAD, bias=True)


def prepare_for_universal(model: nn.Module, model_config: ModelConfig, tp_group: dist.ProcessGroup) -> None:
    """Annotates each parameter with its TP sharding. Call before `deepspeed.initialize`.

    ZeRO 1 and 2 mostly read the sharding from the checkpoint. Without it, ZeRO 3 loads whole tensors into parameters.
    """
    tp = dist.get_world_size(tp_group)
    for parameter, item in iterate_parameters(model, model_config):
        setattr(parameter, DS_AUTOTP_UC_META, build_sharding_metadata(item, model_config, tp))
    # DeepSpeed's loader reads the group from this global, which only its own tensor parallelism sets.
    groups._TENSOR_MODEL_PARALLEL_GROUP = tp_group


def build_sharding_metadata(item: StoredTensor, model_config: ModelConfig, tp: int) -> dict:
    """Describes a tensor's sharding, in the format of DeepSpeed's own tensor parallelism."""
    shape = item.shape(model_config)
    meta = {"partition_dim": item.tp_dim, "logical_shape": shape, UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_VERSION}
    if item.tp_dim is None:
        return {**meta, "replicated": True}
    if item.is_vocab_parallel and shape[item.tp_dim] % tp:
        return {**meta, "conversion": {"affine_map": build_padded_vocab_map(shape, tp)}}
    if len(item.keys) > 1 and item.pack is Pack.STACKED:
        sizes = [param.shape(model_config)[item.tp_dim] for param in item.params]
        return {**meta, "sub_param_sizes": sizes, "sub_param_shard_widths": [[size // tp] * tp for size in sizes]}
    return meta


def build_padded_vocab_map(shape: tuple[int, ...], tp: int) -> dict:
    """Maps a vocabulary tensor (table or bias) that tp does not divide to its padded shards.

    DeepSpeed maps whole shards only, so the padding is filled with copies of row 0. It is never used.
    """
    rows, *rest = shape
    width, inner = prod(rest), (1,) * len(rest)
    size = padded_vocab(rows, tp) // tp
    ranks = range(tp)
    pieces = {}
    for rank in ranks:
        real_rows = min(max(rows - rank * size, 0), size)
        real = AffinePiece((real_rows, *rest), rank * size * width, (width, *inner), 0, (width, *inner), {rank})
        padding = AffinePiece((size - real_rows, *rest), 0, (0, *inner), real_rows * width, (width, *inner), ranks)
        pieces[rank] = [piece for piece in (real, padding) if piece.numel]
    return ParamAffineMap(shape, dict.fromkeys(ranks, (size, *rest)), pieces).to_dict()


def load_universal(engine: deepspeed.DeepSpeedEngine, source: Reader, tp_group: dist.ProcessGroup) -> None:
    """Loads `source` (an open universal checkpoint) into an engine configured with `load_universal`. Collective.

    CheckpointError if a file holds anything but tensors and plain values (DeepSpeed would unpickle it), or if a loaded
    parameter is not bit-identical to the files.
    """
    stage3 = engine.zero_optimization_stage() == 3
    if stage3 and dist.get_world_size(tp_group) > 1:
        is_prepared = all(hasattr(parameter, DS_AUTOTP_UC_META) for parameter in engine.module.parameters())
        assert is_prepared, "prepare_for_universal comes before deepspeed.initialize"
    all_ranks().run_on_rank_0(lambda: check_files_are_safe(source.path))
    # ZeRO 1 and 2 load what exists. ZeRO 3 fails without moments unless it loads the module only.
    module_only = stage3 and not (source.has_moments and source.step)
    with reading_shards_of(engine.optimizer, tp_group) if not stage3 else nullcontext():
        engine.load_checkpoint(str(source.path), load_lr_scheduler_states=False, load_module_only=module_only)
    if stage3:
        separate_step_counts(engine.optimizer.optimizer)
    all_ranks().run_on_all(lambda: verify_loaded(engine.module, source, tp_group))


@dataclass(frozen=True)
class TensorParallelRanks:
    """What DeepSpeed's loader asks of an mpu: the number of tensor-parallel ranks, and which this one is."""

    group: dist.ProcessGroup

    def get_tensor_model_parallel_rank(self) -> int:
        return dist.get_rank(self.group)

    def get_tensor_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.group)


@contextmanager
def reading_shards_of(optimizer: object, tp_group: dist.ProcessGroup) -> Iterator[None]:
    """Within it, ZeRO 1 and 2 load shards of the TP ranks, where model-parallel ranks are expert-parallel too."""
    mpu, optimizer.mpu = optimizer.mpu, TensorParallelRanks(tp_group)
    try:
        yield
    finally:
        optimizer.mpu = mpu


def separate_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """Gives each parameter its own step count: ZeRO 3 loads one shared tensor, which every group would increment."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def check_files_are_safe(folder: Path) -> None:
    """Raises CheckpointError if a .pt file in the folder refers to anything but tensors, plain values and
    ALLOWED_RECORDS."""
    errors = ErrorCollector(f"{folder}: files that are not safe to unpickle", CheckpointError)
    allowed = [(kind, f"{kind.__module__}.{kind.__qualname__}") for kind in ALLOWED_RECORDS]
    for path in sorted(folder.rglob("*.pt")):
        try:
            torch_files.load(path, allowed)
        except CheckpointError as error:
            errors.add_message(str(error))
    errors.raise_if_any()


def verify_loaded(model: nn.Module, source: Reader, tp_group: dist.ProcessGroup) -> None:
    """Raises CheckpointError if a parameter of this rank differs from `source`. Collective under ZeRO 3."""
    errors = ErrorCollector(f"{source.path}: loaded parameters differ from it", CheckpointError)
    tp, rank = dist.get_world_size(tp_group), dist.get_rank(tp_group)
    for parameter, item in iterate_parameters(model, source.model_config):
        expected = read_local_tensor(item, source.read, source.model_config, tp, rank).to(parameter.dtype)
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found = parameter.detach().cpu()
            if item.is_vocab_parallel:
                # The contents of the padding are arbitrary.
                rows = max(source.model_config.vocab_size - rank * expected.shape[0], 0)
                expected, found = expected[:rows], found[:rows]
            if not torch.equal(found, expected):
                errors.add(item.name, "the tensor of the file, bit for bit", describe_difference(found, expected))
    errors.raise_if_any()


def describe_difference(found: torch.Tensor, expected: torch.Tensor) -> str:
    """Describes how two tensors differ: by their shapes, or by the largest absolute difference."""
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)} for {tuple(expected.shape)}"
    worst = (found.float() - expected.float()).abs().max()
    return f"a difference of {worst:.3g}"
