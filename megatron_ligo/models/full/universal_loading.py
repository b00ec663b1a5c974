"""DeepSpeed's universal checkpoint into a model at any layout: what ZeRO 3 must be told, and proof of what was loaded.

In a training script of your own, over any Megatron-core GPTModel whose parameters bear mcore's names:

    source = formats.open("runs/grown/universal")
    model = GPTModel(...)
    prepare_for_universal(model, source.model_config, tp_group)        # needed with ZeRO 3 and tensor parallelism
    engine, *_ = deepspeed.initialize(model=model, config={..., "checkpoint": {"load_universal": True}}, ...)
    load_universal(engine, source, tp_group)
"""

from __future__ import annotations

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
from megatron_ligo.arch.spec import Pack
from megatron_ligo.checkpoint.io import torch_files
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common.errors import CheckpointError, ErrorCollector
from megatron_ligo.distributed.mesh import all_ranks
from megatron_ligo.models.full.parameters import iterate_parameters, read_local_tensor
from megatron_ligo.sharding.fused_tensors import StoredTensor
from megatron_ligo.sharding.tensor_parallel import padded_vocab

# From this version on the shards' widths are stated; before, DeepSpeed divides evenly.
UNIVERSAL_VERSION = 0.4
# What DeepSpeed's own tools put into universal checkpoints; none of these does anything when it is loaded.
ALLOWED_RECORDS = (LossScaler, DynamicLossScaler, ZeroStageEnum, SubparamShape, fragment_address)


def needs_preparation(model_config: ModelConfig, zero: int) -> bool:
    """Whether `prepare_for_universal` is needed: with ZeRO 3, and at any stage for a vocabulary's bias, which DeepSpeed
    cannot pad."""
    return zero == 3 or "head_bias" in architectures.get(model_config.arch).params_by_key


def prepare_for_universal(model: nn.Module, model_config: ModelConfig, tp_group: dist.ProcessGroup) -> None:
    """Says on each parameter how tensor parallelism cuts it. Call before `deepspeed.initialize`.

    ZeRO 1 and 2 mostly read it from the checkpoint's files; ZeRO 3 loads whole tensors where nobody says so.
    """
    tp = dist.get_world_size(tp_group)
    for parameter, item in iterate_parameters(model, model_config):
        setattr(parameter, DS_AUTOTP_UC_META, build_sharding_metadata(item, model_config, tp))
    # DeepSpeed's loader asks its own record for the group, and only its own tensor parallelism sets it.
    groups._TENSOR_MODEL_PARALLEL_GROUP = tp_group


def build_sharding_metadata(item: StoredTensor, model_config: ModelConfig, tp: int) -> dict:
    """How a tensor is cut, in the words of DeepSpeed's own tensor parallelism."""
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
    """A vocabulary (rows, or a bias) that tp does not divide. DeepSpeed maps whole shards only: row 0 stands in for the
    rows that pad, which nothing reads."""
    rows, *rest = shape
    width, inner = prod(rest), (1,) * len(rest)
    size = padded_vocab(rows, tp) // tp
    everyone = range(tp)
    pieces = {}
    for rank in everyone:
        held = min(max(rows - rank * size, 0), size)
        real = AffinePiece((held, *rest), rank * size * width, (width, *inner), 0, (width, *inner), {rank})
        padding = AffinePiece((size - held, *rest), 0, (0, *inner), held * width, (width, *inner), everyone)
        pieces[rank] = [piece for piece in (real, padding) if piece.numel]
    return ParamAffineMap(shape, dict.fromkeys(everyone, (size, *rest)), pieces).to_dict()


def load_universal(engine: deepspeed.DeepSpeedEngine, source: Reader, tp_group: dist.ProcessGroup) -> None:
    """Loads `source` (a universal checkpoint, opened) into an engine made with `load_universal`. Collective.

    CheckpointError if a file holds anything but tensors and plain values (DeepSpeed would run it), or if what was
    loaded is not, bit for bit, what the files hold.
    """
    stage3 = engine.zero_optimization_stage() == 3
    if stage3 and dist.get_world_size(tp_group) > 1:
        told = all(hasattr(parameter, DS_AUTOTP_UC_META) for parameter in engine.module.parameters())
        assert told, "prepare_for_universal comes before deepspeed.initialize"
    all_ranks().run_on_rank_0(lambda: check_files_are_safe(source.path))
    # ZeRO 1 and 2 take what there is; ZeRO 3 wants moments, or else to be told that there are none.
    fresh = stage3 and not (source.has_moments and source.step)
    engine.load_checkpoint(str(source.path), load_lr_scheduler_states=False, load_module_only=fresh)
    if stage3:
        separate_step_counts(engine.optimizer.optimizer)
    all_ranks().run_on_all(lambda: verify_loaded(engine.module, source, tp_group))


def separate_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """ZeRO 3 gives one and the same count of steps to all of its groups, and each would add to it."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def check_files_are_safe(folder: Path) -> None:
    """CheckpointError if a .pt file in a folder names anything but tensors, plain values and DeepSpeed's records."""
    errors = ErrorCollector(f"{folder}: files that are not safe to load", CheckpointError)
    allowed = [(kind, f"{kind.__module__}.{kind.__qualname__}") for kind in ALLOWED_RECORDS]
    for path in sorted(folder.rglob("*.pt")):
        try:
            torch_files.load(path, allowed)
        except CheckpointError as error:
            errors.add_message(str(error))
    errors.raise_if_any()


def verify_loaded(model: nn.Module, source: Reader, tp_group: dist.ProcessGroup) -> None:
    """CheckpointError if a parameter of this rank is not what `source` holds for it. Collective under ZeRO 3."""
    errors = ErrorCollector(f"{source.path}: what was loaded is not what it holds", CheckpointError)
    tp, rank = dist.get_world_size(tp_group), dist.get_rank(tp_group)
    for parameter, item in iterate_parameters(model, source.model_config):
        expected = read_local_tensor(item, source.read, source.model_config, tp, rank).to(parameter.dtype)
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found = parameter.detach().cpu()
            if item.is_vocab_parallel:
                # The rows that pad the vocabulary may hold anything.
                rows = max(source.model_config.vocab_size - rank * expected.shape[0], 0)
                expected, found = expected[:rows], found[:rows]
            if not torch.equal(found, expected):
                errors.add(item.name, "the tensor of the file, bit for bit", describe_difference(found, expected))
    errors.raise_if_any()


def describe_difference(found: torch.Tensor, expected: torch.Tensor) -> str:
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)} for {tuple(expected.shape)}"
    worst = (found.float() - expected.float()).abs().max()
    return f"a difference of {worst:.3g}"
