"""Megatron-LM's checkpoints by rank (`--ckpt-format torch`), at their own tensor and pipeline parallelism.

    DIR/latest_checkpointed_iteration.txt                  which folder (iterations.py)
    DIR/iter_0000100/mp_rank_TT/model_optim_rng.pt         tensor-parallel rank TT
    DIR/iter_0000100/mp_rank_TT_PPP/model_optim_rng.pt     of stage PPP, where there is more than one

The first stage holds the embedding, the last one the last norm and the head (of a tied model: a copy of the embedding);
each stage counts its layers from 0. Adam's state lies in the same files (megatron_adam.py); it is written where the
weights are fp32, by the numbers that Megatron-core's own layers give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Use, layer_index
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.format import Format, WriteOptions
from megatron_ligo.checkpoint.formats.megatron_core.tensor_names import EXTRA_STATE, as_made, fused_name
from megatron_ligo.checkpoint.formats.megatron_lm import arguments, rank_optimizer
from megatron_ligo.checkpoint.formats.megatron_lm.rank_files import RankFiles, is_saved, rank_file
from megatron_ligo.checkpoint.io import adam_groups, digest, iteration_folders, tp_shards
from megatron_ligo.checkpoint.io.file_layout import LazyTensor
from megatron_ligo.checkpoint.io.output import Output, common_dtype
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT, Reader, TensorInfo
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector, Problem
from megatron_ligo.config.typed_toml import setting
from megatron_ligo.sharding import fused_tensors, tensor_parallel
from megatron_ligo.sharding.fused_tensors import StoredTensor

NAME = "megatron"
LAYERS = ("local", "te")


class MegatronReader(Reader):
    """Canonical tensors, each put together from the mapped files of the tensor-parallel ranks of its stage."""

    format = NAME

    def __init__(self, path: Path):
        self.path = path
        self._folder = iteration_folders.require_folder(path)
        self._saved = RankFiles(self._folder)
        self.model_config, self.carried, self.files = arguments.sizes(self._folder, self._saved.args)
        self._items: dict[str, StoredTensor] = {}
        # Of a tied model the last of several stages holds a copy: name of the original -> its name.
        self._copies: dict[str, str] = {}
        self._rows = self._check()
        padding = {"padded_vocab": self._rows} if self._rows > self.model_config.vocab_size else {}
        self.layout = {"tp": self._saved.tp, "pp": self._saved.pp, **padding}
        self.step, self.groups = self._saved.step, self._saved.groups
        self.unread = (f"optimizer state ({self._saved.left})",) if self._saved.left else ()

    @property
    def has_moments(self) -> bool:
        return bool(self._saved.moments)

    def info(self, key: str) -> TensorInfo:
        tensors = self._saved.tensors[self._items[key].name]
        return TensorInfo(self.param(key).shape(self.model_config), tensors[0].dtype)

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        item = self._items[key]
        held = self._saved.tensors if kind == WEIGHT else self._saved.moments[kind]
        pieces = held[item.name]
        for rank, copy in enumerate(held.get(self._copies.get(item.name, ""), ())):
            if not digest.same_bits(pieces[rank], copy):
                where = f"{item.name} ({kind}, {self._folder}, rank {rank})"
                hint = "The model is tied, and its stages went apart in training."
                raise CheckpointError(Problem(where, "the bits of the last stage's copy", "others", hint))
        stored = replace(self.model_config, vocab_size=self._rows)
        return tp_shards.join_shards(item, key, pieces, stored, self.model_config, f"{self._folder}")

    def _check(self) -> int:
        """Every tensor on every rank, with its shape and dtype, and no others. The rows of the vocabulary as stored."""
        model_config, saved = self.model_config, self._saved
        errors = ErrorCollector(f"{self._folder} does not hold the model of its sizes", CheckpointError)
        if model_config.num_layers != saved.num_layers:
            errors.add("num_layers", model_config.num_layers, saved.num_layers, "Are files or stages missing?")
        tensor_parallel.check_tp(model_config, saved.tp, errors)
        errors.raise_if_any()
        stored = fused_tensors.stored_tensors(self.arch, model_config, "mcore")
        rows = max(
            (_rows(saved.tensors.get(item.name)) for item in stored.values() if item.is_vocab_parallel), default=0
        )
        if rows < model_config.vocab_size:
            errors.add("vocabulary", f"at least {model_config.vocab_size} rows", rows)
            errors.raise_if_any()
        padded = replace(model_config, vocab_size=rows)
        for item in stored.values():
            self._items |= dict.fromkeys(item.keys, item)
            saved.check(item.name, item.shape(padded, saved.tp), errors)
        for copy, original in _tied(self.arch, model_config).items() if saved.pp > 1 else ():
            saved.check(copy, stored[original].shape(padded, saved.tp), errors)
            self._copies[original] = copy
        known = {*stored, *(_tied(self.arch, model_config) if saved.pp > 1 else ())}
        for name in sorted(set(saved.tensors) - known):
            errors.add(name, "no such tensor", f"{tuple(saved.tensors[name][0].shape)}")
        saved.take_optimizers(errors)
        errors.raise_if_any(saved.weights)
        return rows


def _rows(pieces: list[Tensor] | None) -> int:
    """Rows of all ranks together."""
    return sum(piece.shape[0] for piece in pieces if piece.dim()) if pieces else 0


def _tied(arch: Architecture, model_config: ModelConfig) -> dict[str, str]:
    """Name of what the last stage holds -> name of the tensor of the first one that it shares."""
    if not model_config.tied:
        return {}
    names = {param.key: param.locations["mcore"].name for param in arch.params}
    return {
        names[param.key]: names[param.tied_to] for param in arch.params if param.tied_to and param.exists(model_config)
    }


def _model(weights: dict[str, LazyTensor], held: dict[str, StoredTensor], layers: str) -> dict[str, LazyTensor | None]:
    """A rank's weights by the names that its layers have."""
    model: dict[str, LazyTensor | None] = {}
    for name, item in held.items():
        written = fused_name(name) if layers == "te" else name
        model[written] = weights[name]
        if _has_extra_state(item):
            model[f"{written.removesuffix('weight')}{EXTRA_STATE}"] = None
    return model


def _bounds(num_layers: int, pp: int) -> list[int]:
    """Where stages begin, and the end. All are alike but for the last: that is what Megatron-LM can be told."""
    most = -(-num_layers // pp)
    size = most if most * (pp - 1) < num_layers else num_layers // pp
    return [*(stage * size for stage in range(pp)), num_layers]


def _has_extra_state(item: StoredTensor) -> bool:
    """True for the weights of linears, which keep something for fp8 (here: nothing)."""
    return len(item.params[0].axes) == 2 and item.params[0].axes[1].use is Use.INPUT


def _stage(
    stored: dict[str, StoredTensor], copies: dict[str, str], bounds: list[int], stage: int
) -> dict[str, StoredTensor]:
    """What a stage holds, by its own names: it counts its layers from 0."""
    held = {}
    first, stop = bounds[stage : stage + 2]
    order = list(stored)
    inside = [number for number, item in enumerate(stored.values()) if layer_index(item.keys[0]) is not None]
    for number, name in enumerate(order):
        item = stored[name]
        layer = layer_index(item.keys[0])
        if layer is not None:
            if first <= layer < stop:
                held[name.replace(f"layers.{layer}.", f"layers.{layer - first}.", 1)] = item
        elif (number < inside[0] and stage == 0) or (number > inside[-1] and stage == len(bounds) - 2):
            held[name] = item
    if stage == len(bounds) - 2:
        held |= {copy: stored[original] for copy, original in copies.items()}
    return {name: held[name] for name in as_made(held)}


def _check_layout(model_config: ModelConfig, options: WriteOptions) -> None:
    """Raises ConfigError for a layout that Megatron-LM does not have."""
    errors = ErrorCollector(f"the format {NAME} cannot be written so", ConfigError)
    tensor_parallel.check_tp(model_config, options.tp, errors)
    if options.pp > model_config.num_layers:
        errors.add(
            f"pp = {options.pp}",
            "at most one stage a layer",
            f"{model_config.num_layers} layers",
            "Choose a smaller pp.",
        )
    errors.raise_if_any()


@dataclass(frozen=True)
class MegatronLmOptions(adam_groups.AdamRates):
    vocab_divisible_by: int = setting(
        arguments.DIVISIBLE_BY,
        f"pads the vocabulary to a multiple of it times tp (default {arguments.DIVISIBLE_BY})",
        low=1,
    )
    layers: str = setting(
        LAYERS[0],
        "local (default) or te: names of Megatron-core's own layers, or of Transformer Engine's",
        choices=LAYERS,
    )


class MegatronLmFormat(Format):
    name = NAME
    description = f"mp_rank_*/model_optim_rng.pt (Megatron-LM), or {iteration_folders.TRACKER} that names their folder"
    has_layout = True
    stores_moments = True
    options = MegatronLmOptions

    def recognise(self, path: Path) -> bool:
        folder = iteration_folders.find_folder(path)
        return folder is not None and is_saved(folder)

    def open(self, path: Path) -> MegatronReader:
        return MegatronReader(path)

    def write(self, source: Reader, output: Output, options: WriteOptions) -> None:
        """Each rank's file. Those of a stage are filled side by side."""
        model_config, tp, pp = source.model_config, options.tp, options.pp
        own = self.parse_options(options.extra)
        _check_layout(model_config, options)
        layers, rates, multiple = own.layers, own.rates(), own.vocab_divisible_by * tp
        rows = -(-model_config.vocab_size // multiple) * multiple
        padded = replace(model_config, vocab_size=rows)
        folder = iteration_folders.folder_name(0)
        model_record.write(source, output)
        pieces = tp_shards.TpShards(source, tp, padded)
        stored = fused_tensors.stored_tensors(source.arch, model_config, "mcore")
        bounds = _bounds(model_config.num_layers, pp)
        copies = _tied(source.arch, model_config) if pp > 1 else {}
        dtype = common_dtype(source, next(iter(stored.values())))
        args = arguments.args_of(model_config, tp, pp, rows, dtype, source.step)
        args.transformer_impl = "transformer_engine" if layers == "te" else "local"
        if model_config.num_layers % pp:
            args.decoder_last_pipeline_num_layers = bounds[-1] - bounds[-2]
        for stage in range(pp):
            held = _stage(stored, copies, bounds, stage)
            trees = {}
            for rank in range(tp):
                weights = {name: pieces.lazy_shard(item, rank) for name, item in held.items()}
                tree = {
                    "args": args,
                    "checkpoint_version": arguments.CHECKPOINT_VERSION,
                    "iteration": source.step,
                    "model": _model(weights, held, layers),
                }
                if source.has_moments:
                    moments = {
                        kind: {n: pieces.lazy_shard(item, rank, kind) for n, item in held.items()} for kind in MOMENTS
                    }
                    groups = adam_groups.to_megatron_groups(source.groups, rates)
                    tree["optimizer"] = rank_optimizer.build_rank_optimizer(weights, moments, groups, source.step)
                trees[f"{folder}/{rank_file(rank, stage, pp)}"] = tree
            output.write_torch_files(trees)
        iteration_folders.write_tracker(output, 0)

    def unsupported_moments(self, source: Reader, options: WriteOptions) -> str:
        if self.parse_options(options.extra).layers != LAYERS[0]:
            return "its numbers are those of Megatron-core's own layers: say layers=local"
        if {options.dtype or source.info(key).dtype for key in source.keys()} != {torch.float32}:  # noqa: SIM118 - no dict
            return "Megatron-LM's optimizers go on from fp32 weights: say --dtype float32"
        return rank_optimizer.explain_unsupported(source.groups)
