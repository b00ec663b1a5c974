"""Megatron-LM's per-rank checkpoints (`--ckpt-format torch`), at the tensor and pipeline parallelism of the run.

    DIR/latest_checkpointed_iteration.txt                  the iteration's folder (io/iteration_folders.py)
    DIR/iter_0000100/mp_rank_TT/model_optim_rng.pt         tensor-parallel rank TT
    DIR/iter_0000100/mp_rank_TT_PPP/model_optim_rng.pt     the same, in stage PPP of several
    DIR/iter_0000100/mp_rank_TT_PPP_EEE/model_optim_rng.pt the same, expert-parallel rank EEE of several

The first stage holds the embeddings, the last one the final norm and the head (a copy of the embedding if the model is
tied). Every stage numbers its layers from 0. Adam's state is in the same files (rank_optimizer.py). It is written for
fp32 weights only, with the parameter numbers of Megatron-core's local layer spec.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.mcore_names import EXTRA_STATE, sort_by_construction, to_fused_name
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Pack, Role, Stage, Use, layer_index
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.format import Format, WriteOptions
from megatron_ligo.checkpoint.formats.megatron_lm import arguments, expert_files, rank_optimizer, rope_arguments
from megatron_ligo.checkpoint.formats.megatron_lm.rank_files import RankFiles, has_rank_files, rank_file
from megatron_ligo.checkpoint.io import adam_groups, digest, iteration_folders, tensor_check, torch_files, tp_shards
from megatron_ligo.checkpoint.io.file_layout import LazyTensor
from megatron_ligo.checkpoint.io.output import Output, common_dtype
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT, Reader, TensorInfo
from megatron_ligo.checkpoint.source_keys import NO_KEYS, AcceptedKeys
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector, Problem
from megatron_ligo.config.typed_toml import setting
from megatron_ligo.sharding import fused_tensors, tensor_parallel
from megatron_ligo.sharding.fused_tensors import StoredTensor

NAME = "megatron"
LAYER_SPECS = ("local", "te")


class MegatronReader(Reader):
    """Joins the memory-mapped shards of a stage's tensor-parallel ranks into canonical tensors."""

    format = NAME

    def __init__(self, path: Path, accepted: AcceptedKeys = NO_KEYS):
        self.path = path
        self._folder = iteration_folders.require_folder(path)
        self._rank_files = RankFiles(self._folder)
        self.model_config, self.carried, self.files = arguments.read_model_config(
            self._folder, self._rank_files.args, accepted
        )
        self.run_arguments = arguments.plain_arguments(self._rank_files.args)
        self._stored_by_key: dict[str, StoredTensor] = {}
        # Name of a tied tensor -> name of its copy on the last stage.
        self._copies: dict[str, str] = {}
        self._padded_vocab_size = self._check()
        is_padded = self._padded_vocab_size > self.model_config.vocab_size
        padding = {"padded_vocab": self._padded_vocab_size} if is_padded else {}
        expert_layout = {"ep": self._rank_files.ep} if self._rank_files.ep > 1 else {}
        self.layout = {"tp": self._rank_files.tp, "pp": self._rank_files.pp, **expert_layout, **padding}
        self.step, self.groups = self._rank_files.step, self._rank_files.groups
        unread_optimizer = self._rank_files.unread_optimizer
        self.unread = (f"optimizer state ({unread_optimizer})",) if unread_optimizer else ()

    @property
    def has_moments(self) -> bool:
        return bool(self._rank_files.moments)

    def info(self, key: str) -> TensorInfo:
        shards = self._rank_files.tensors[self._stored_by_key[key].name]
        return TensorInfo(self.param(key).shape(self.model_config), shards[0].dtype)

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        stored = self._stored_by_key[key]
        tensors = self._rank_files.tensors if kind == WEIGHT else self._rank_files.moments[kind]
        shards = tensors[stored.name]
        for rank, copy in enumerate(tensors.get(self._copies.get(stored.name, ""), ())):
            if not digest.same_bits(shards[rank], copy):
                where = f"{stored.name} ({kind}, {self._folder}, rank {rank})"
                hint = "The model is tied, and its stages diverged in training."
                raise CheckpointError(Problem(where, "the bits of the last stage's copy", "other bits", hint))
        where = f"{key} ({stored.name}, {self._folder})"
        # Moments were compared as they were read.
        for rank, copies in enumerate(self._rank_files.copies[stored.name] if kind == WEIGHT else ()):
            tp_shards.check_replicas([shards[rank], *copies], f"{where}, experts' ranks")
        if self._cuts_groups(stored):
            shards = [torch.cat([torch_files.check_stored(where, shard) for shard in shards])]
        padded_config = replace(self.model_config, vocab_size=self._padded_vocab_size)
        return tp_shards.join_shards(stored, key, shards, padded_config, self.model_config, f"{self._folder}")

    def _cuts_groups(self, stored: StoredTensor) -> bool:
        """True for a tensor of queries, keys and values whose rows the ranks share, since KV heads are fewer."""
        tp, groups = self._rank_files.tp, self.model_config.num_kv_heads
        return stored.pack is Pack.GROUPED and groups < tp and tp % groups == 0

    def _shard_shape(self, stored: StoredTensor, padded_config: ModelConfig) -> tuple[int, ...]:
        tp = self._rank_files.tp
        if not self._cuts_groups(stored):
            return stored.shape(padded_config, tp)
        rows, *rest = stored.shape(padded_config)
        return (rows // tp, *rest)

    def _check(self) -> int:
        """Checks that every rank holds each tensor in its shape and dtype, and no others.

        Returns the padded vocabulary size.
        """
        model_config, rank_files = self.model_config, self._rank_files
        errors = ErrorCollector(f"{self._folder} does not hold the model of its config", CheckpointError)
        if model_config.num_layers != rank_files.num_layers:
            hint = "Are files or stages missing?"
            errors.add("num_layers", model_config.num_layers, rank_files.num_layers, hint)
        stored_tensors = fused_tensors.stored_tensors(self.arch, model_config, "mcore")
        cuts_groups = any(map(self._cuts_groups, stored_tensors.values()))
        divided = replace(model_config, num_kv_heads=model_config.num_heads) if cuts_groups else model_config
        tensor_parallel.check_tp(divided, rank_files.tp, errors)
        errors.raise_if_any()
        vocab_tensors = (rank_files.tensors.get(name) for name, s in stored_tensors.items() if s.is_vocab_parallel)
        padded_vocab_size = max(map(_sum_rows, vocab_tensors), default=0)
        if padded_vocab_size < model_config.vocab_size:
            errors.add("vocabulary", f"at least {model_config.vocab_size} rows", padded_vocab_size)
            errors.raise_if_any()
        padded_config = replace(model_config, vocab_size=padded_vocab_size)
        for stored in stored_tensors.values():
            self._stored_by_key |= dict.fromkeys(stored.keys, stored)
            rank_files.check_tensor(stored.name, self._shard_shape(stored, padded_config), errors)
        copies = _find_tied_copies(self.arch, model_config) if rank_files.pp > 1 else {}
        for copy, original in copies.items():
            rank_files.check_tensor(copy, stored_tensors[original].shape(padded_config, rank_files.tp), errors)
            self._copies[original] = copy
        for name in sorted(set(rank_files.tensors) - {*stored_tensors, *copies}):
            errors.add(name, "no such tensor", f"{tuple(rank_files.tensors[name][0].shape)}")
        names = {param.key: param.locations["mcore"].name for param in self.arch.params}
        tied = [{names[param.key], names[param.tied_to]} for param in self.arch.params if param.tied_to]
        for rank in range(rank_files.tp):
            shards = {f"{name} (rank {rank})": tensors[rank] for name, tensors in rank_files.tensors.items()}
            tensor_check.check_own_bytes(shards, [{f"{name} (rank {rank})" for name in pair} for pair in tied], errors)
        rank_files.read_optimizers(errors)
        errors.raise_if_any(rank_files.iter_weights)
        return padded_vocab_size


def _sum_rows(shards: Sequence[Tensor] | None) -> int:
    """Returns the number of rows of all ranks' shards together."""
    return sum(shard.shape[0] for shard in shards if shard.dim()) if shards else 0


def _find_tied_copies(arch: Architecture, model_config: ModelConfig) -> dict[str, str]:
    """Returns the name of each copy on the last stage -> the name of the first stage's tensor."""
    if not model_config.tied:
        return {}
    names = {param.key: param.locations["mcore"].name for param in arch.params}
    return {
        names[param.key]: names[param.tied_to] for param in arch.params if param.tied_to and param.exists(model_config)
    }


def _build_module(
    weights: dict[str, LazyTensor], stored_tensors: dict[str, StoredTensor], layer_spec: str, has_experts: bool
) -> dict[str, LazyTensor | None]:
    """Returns a rank's module state by the names of the layer spec, with Megatron-core's (empty) extra states."""
    module: dict[str, LazyTensor | None] = {}
    for name, stored in stored_tensors.items():
        # Transformer Engine fuses a norm into the linear behind it, and a router is none.
        is_fused = layer_spec == "te" and not (has_experts and stored.params[0].role is Role.FFN_NORM)
        written_name = to_fused_name(name) if is_fused else name
        module[written_name] = weights[name]
        if _is_linear_weight(stored):
            # A grouped product has a weight for each expert, and one state.
            module[f"{written_name.rpartition('weight')[0]}{EXTRA_STATE}"] = None
    return module


def _is_linear_weight(stored: StoredTensor) -> bool:
    """Returns whether the tensor is a linear's weight: these modules have an extra state, for fp8."""
    axes, role = stored.params[0].axes, stored.params[0].role
    return len(axes) == 2 and axes[1].use is Use.INPUT and role not in (Role.ROUTER, Role.SHARED_EXPERT_WEIGHT)


def _stage_bounds(num_layers: int, pp: int) -> list[int]:
    """Returns the first layer of each stage, and the number of layers.

    Megatron-LM lets only the last stage differ in size.
    """
    ceiling = -(-num_layers // pp)
    size = ceiling if ceiling * (pp - 1) < num_layers else num_layers // pp
    return [*(stage * size for stage in range(pp)), num_layers]


def _select_stage(
    stored_tensors: dict[str, StoredTensor], copies: dict[str, str], bounds: list[int], stage: int
) -> dict[str, StoredTensor]:
    """Returns the tensors of a stage by its own names, which number layers from 0, in construction order."""
    tensors = {}
    first_layer, stop = bounds[stage : stage + 2]
    is_last_stage = stage == len(bounds) - 2
    for name, stored in stored_tensors.items():
        part = stored.params[0].stage
        if part is Stage.LAYER:
            layer = layer_index(stored.keys[0])
            if first_layer <= layer < stop:
                tensors[name.replace(f"layers.{layer}.", f"layers.{layer - first_layer}.", 1)] = stored
        elif (part is Stage.FIRST and stage == 0) or (part is Stage.LAST and is_last_stage):
            tensors[name] = stored
    if is_last_stage:
        tensors |= {copy: stored_tensors[original] for copy, original in copies.items()}
    return {name: tensors[name] for name in sort_by_construction(tensors)}


def _check_layout(model_config: ModelConfig, options: WriteOptions, ep: int) -> None:
    """Raises ConfigError for a layout that Megatron-LM does not support. ep: expert-parallel ranks."""
    errors = ErrorCollector(f"the format {NAME} does not support this layout", ConfigError)
    tensor_parallel.check_tp(model_config, options.tp, errors)
    if options.pp > model_config.num_layers:
        found = f"{model_config.num_layers} layers"
        errors.add(f"pp = {options.pp}", "at most one stage per layer", found, "Choose a smaller pp.")
    if ep > 1 and (not model_config.num_experts or model_config.num_experts % ep):
        errors.add(f"option ep = {ep}", "a divisor of the number of experts", model_config.num_experts)
    errors.raise_if_any()


@dataclass(frozen=True)
class MegatronLmOptions(adam_groups.AdamRates):
    vocab_divisible_by: int = setting(
        arguments.VOCAB_DIVISOR,
        f"pads the vocabulary to a multiple of it times tp (default {arguments.VOCAB_DIVISOR})",
        low=1,
    )
    layers: str = setting(
        LAYER_SPECS[0],
        "local (default) or te: names of Megatron-core's local layer spec, or of Transformer Engine's",
        choices=LAYER_SPECS,
    )
    ep: int = setting(1, "expert-parallel ranks, each with its share of every layer's experts (default 1)", low=1)
    grouped_gemm: bool = setting(False, "with layers=te: experts have the names of a grouped product (default false)")


class MegatronLmFormat(Format):
    name = NAME
    description = f"mp_rank_*/model_optim_rng.pt (Megatron-LM), or {iteration_folders.TRACKER} that names their folder"
    has_layout = True
    stores_moments = True
    options = MegatronLmOptions

    def recognise(self, path: Path) -> bool:
        folder = iteration_folders.find_folder(path)
        return folder is not None and has_rank_files(folder)

    def open(self, path: Path, accepted: AcceptedKeys) -> MegatronReader:
        return MegatronReader(path, accepted)

    def write(self, source: Reader, output: Output, options: WriteOptions) -> None:
        """Writes each rank's file. The files of a stage are filled tensor by tensor, side by side."""
        model_config, tp, pp = source.model_config, options.tp, options.pp
        format_options = self.parse_options(options.extra)
        ep, is_grouped = format_options.ep, format_options.grouped_gemm
        _check_layout(model_config, options, ep)
        layer_spec, multiple = format_options.layers, format_options.vocab_divisible_by * tp
        if is_grouped and layer_spec != "te":
            raise ConfigError(Problem("option grouped_gemm", "layers=te", f"layers={layer_spec}"))
        padded_vocab_size = -(-model_config.vocab_size // multiple) * multiple
        folder = iteration_folders.folder_name(0)
        model_record.write(source, output)
        shards = tp_shards.TpShards(source, tp, replace(model_config, vocab_size=padded_vocab_size))
        stored_tensors = fused_tensors.stored_tensors(source.arch, model_config, "mcore")
        bounds = _stage_bounds(model_config.num_layers, pp)
        copies = _find_tied_copies(source.arch, model_config) if pp > 1 else {}
        dtype = common_dtype(source, next(iter(stored_tensors.values())))
        args = arguments.to_megatron_args(model_config, tp, pp, padded_vocab_size, dtype, source.step, ep)
        args.moe_grouped_gemm = is_grouped
        args.transformer_impl = "transformer_engine" if layer_spec == "te" else "local"
        if model_config.num_layers % pp:
            args.decoder_last_pipeline_num_layers = bounds[-1] - bounds[-2]
        for stage in range(pp):
            all_tensors = _select_stage(stored_tensors, copies, bounds, stage)
            states = {}
            for rank, ep_rank in product(range(tp), range(ep)):
                stage_tensors = expert_files.select_experts(all_tensors, model_config, ep, ep_rank, is_grouped)
                weights = {name: shards.lazy_shard(stored, rank) for name, stored in stage_tensors.items()}
                state = {
                    "args": args,
                    "checkpoint_version": arguments.CHECKPOINT_VERSION,
                    "iteration": source.step,
                    "model": _build_module(weights, stage_tensors, layer_spec, model_config.num_experts > 0),
                }
                if source.has_moments:
                    moments = {
                        kind: {name: shards.lazy_shard(stored, rank, kind) for name, stored in stage_tensors.items()}
                        for kind in MOMENTS
                    }
                    groups = adam_groups.to_megatron_groups(source.groups, format_options.rates())
                    build = expert_files.build_optimizers if ep > 1 else rank_optimizer.build_rank_optimizer
                    state["optimizer"] = build(weights, moments, groups, source.step)
                states[f"{folder}/{rank_file(rank, stage, pp, ep_rank, ep)}"] = state
            output.write_torch_files(states)
        iteration_folders.write_tracker(output, 0)

    def reader_warning(self, model_config: ModelConfig) -> str:
        return rope_arguments.explain_reading(model_config)

    def unsupported_moments(self, source: Reader, options: WriteOptions) -> str:
        if self.parse_options(options.extra).layers != "local":
            return "the parameter numbers are those of the local layer spec: say layers=local"
        if {options.dtype or source.info(key).dtype for key in source.keys()} != {torch.float32}:  # noqa: SIM118 - no dict
            return "Megatron-LM's optimizers resume from fp32 weights: say --dtype float32"
        return rank_optimizer.explain_unsupported(source.groups)
