"""Reads canonical tensors from a DeepSpeed engine's rank files: master weights if saved, else module states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from math import prod
from pathlib import Path

from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.formats.deepspeed import state_keys
from megatron_ligo.checkpoint.formats.deepspeed.engine_rank import EngineRank
from megatron_ligo.checkpoint.formats.deepspeed.expert_ranks import join_expert_ranks
from megatron_ligo.checkpoint.formats.deepspeed.param_names import match_naming
from megatron_ligo.checkpoint.formats.deepspeed.rank_files import EngineFiles
from megatron_ligo.checkpoint.formats.hf import tensor_names
from megatron_ligo.checkpoint.formats.hf.common_prefix import explain_other_names
from megatron_ligo.checkpoint.formats.hf.tensor_names import StoredName
from megatron_ligo.checkpoint.formats.megatron_lm import old_names
from megatron_ligo.checkpoint.io import adam_groups, tensor_check, tp_shards
from megatron_ligo.checkpoint.reader import WEIGHT, Reader, TensorInfo
from megatron_ligo.checkpoint.source_keys import AcceptedKeys
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.distributed.parallel_dims import EngineLayout, ParallelDims
from megatron_ligo.sharding import fused_tensors

# Megatron-LM pads each rank's share of the vocabulary to a multiple of this.
VOCAB_DIVISOR = 128


def find_root(path: Path, tag_folder: Path) -> Path:
    """Returns the folder with the model's config: `path`, the tag's folder or its parent, else `path`."""
    folders = (path, tag_folder, tag_folder.parent)
    return next((folder for folder in folders if model_record.has_record(folder)), path)


class EngineReader(Reader):
    """Joins the shards of all tensor-parallel ranks into canonical tensors."""

    def __init__(
        self,
        format_name: str,
        path: Path,
        root: Path,
        engine_files: EngineFiles,
        ranks: list[EngineRank],
        accepted: AcceptedKeys,
        errors: ErrorCollector,
    ):
        self.format = format_name
        self.path = path
        self.model_config, self.carried = model_record.read(root, accepted)
        for mp_rank, state in engine_files.model_states.items():
            where = f"{engine_files.tag_folder} (rank {mp_rank})"
            state_keys.check_state(state, where, self.model_config, f"the config in {root}", accepted)
        self.files = model_record.find_carried_files(root)
        num_ranks = len(ranks)
        self._ranks = ranks = join_expert_ranks(ranks, self.model_config.num_experts)
        stored_tensors, self._names, self.model_config = self._match_names(errors, f"{path}")
        self._padded_config = self._with_stored_vocab(stored_tensors, errors)
        self._check(stored_tensors, errors)
        errors.raise_if_any(self._iter_tensors)
        self._stored_by_key = {key: stored for stored in stored_tensors for key in stored.keys}
        states_by_tensor = [
            rank.find_optimizer_states(self._names[stored.name].name) for rank in ranks for stored in stored_tensors
        ]
        have_moments = [bool(states) and all(state.has_moments for state in states) for states in states_by_tensor]
        self._has_moments = all(have_moments)
        if any(have_moments) and not self._has_moments:
            first = next(
                stored.name for stored, has in zip(stored_tensors * len(ranks), have_moments, strict=True) if not has
            )
            untrained = have_moments.count(False)
            self.unread = (f"Adam's state ({untrained} of {len(have_moments)} tensors have none, as {first}: frozen)",)
        self.step = self._read_step(engine_files)
        param_groups = [group for rank in ranks for state in rank.optimizer_states for group in state.param_groups]
        self.groups = adam_groups.read_settings(param_groups) if self._has_moments else ()
        tp, ep = len(ranks), num_ranks // len(ranks)
        dims = ParallelDims(tp, engine_files.mp_world_size // num_ranks, engine_files.dp_world_size * ep, ep)
        self.layout = EngineLayout(dims, engine_files.zero_stage).to_json()
        if self._padded_config != self.model_config:
            self.layout["padded_vocab"] = self._padded_config.vocab_size

    @property
    def has_moments(self) -> bool:
        return self._has_moments

    def info(self, key: str) -> TensorInfo:
        name = self._names[self._stored_by_key[key].name].name
        return TensorInfo(self.param(key).shape(self.model_config), self._ranks[0].dtype(name))

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        stored = self._stored_by_key[key]
        stored_name = self._names[stored.name]
        for duplicate in stored_name.duplicates:
            for number, rank in enumerate(self._ranks):
                where = f"{duplicate} and {stored_name.name} (rank {number}), tied"
                tp_shards.check_replicas([rank.module_state[stored_name.name], rank.module_state[duplicate]], where)
        # Compared once: later reads skip it.
        self._names[stored.name] = StoredName(stored_name.name)
        shards = [rank.read(stored_name.name, kind) for rank in self._ranks]
        if kind != WEIGHT:
            shards = [shard.float() for shard in shards]
        return tp_shards.join_shards(stored, key, shards, self._padded_config, self.model_config, kind)

    def _rank_name(self, number: int) -> str:
        return f"rank {number} of {len(self._ranks)}"

    def _iter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every rank's tensors, each with a name for error messages."""
        for number, rank in enumerate(self._ranks):
            for state in rank.optimizer_states:
                for name in sorted(state.names()):
                    yield f"{name} ({self._rank_name(number)})", state.read(name, WEIGHT)
            for name in rank.frozen:
                yield f"{name} ({self._rank_name(number)})", rank.read(name, WEIGHT)
            for name, tensor in rank.module_state.items():
                if tensor.is_floating_point() and not rank.find_optimizer_states(name):
                    yield f"{name} ({self._rank_name(number)})", tensor

    def _match_names(
        self, errors: ErrorCollector, where: str
    ) -> tuple[list[fused_tensors.StoredTensor], dict[str, StoredName], ModelConfig]:
        """Picks the naming, Megatron-core's or transformers', that matches the most of the ranks' names.

        Removes a prefix that they share. Returns the expected tensors, the names that the ranks have for them, and the
        config that follows.
        """
        names = set(self._ranks[0].shapes)
        if self.model_config.num_layers > len(names):
            errors.add("num_layers", f"at most {len(names)}, the number of tensors", self.model_config.num_layers)
            errors.raise_if_any()
        modernized = old_names.find_renaming(names)
        for rank in self._ranks:
            rank.rename(modernized)
        names = set(self._ranks[0].shapes)
        naming, renaming = match_naming(self.arch, self.model_config, names)
        renaming.report(where)
        for rank in self._ranks:
            rank.rename(renaming.apply)
        model_config, names = self.model_config, set(self._ranks[0].shapes)
        if naming == tensor_names.FORMAT:
            model_config = tensor_names.detect_optional_parts(self.arch, model_config, names)
        expected = fused_tensors.stored_tensors(self.arch, model_config, naming)
        if naming == tensor_names.FORMAT:
            stored_names = tensor_names.locate_tensors(self.arch, model_config, names)
        else:
            stored_names = self._mcore_names(expected)
        return list(expected.values()), stored_names, model_config

    def _mcore_names(self, expected: dict[str, fused_tensors.StoredTensor]) -> dict[str, StoredName]:
        """Returns Megatron-core's names. A tied parameter may be stored a second time, under its own name."""
        duplicates: dict[str, list[str]] = {}
        for param in self.arch.params:
            if (
                param.tied_to
                and self.model_config.tied
                and param.locations["mcore"].name in self._ranks[0].module_state
            ):
                duplicates.setdefault(param.tied_to, []).append(param.locations["mcore"].name)
        return {name: StoredName(name, tuple(duplicates.get(stored.keys[0], ()))) for name, stored in expected.items()}

    def _with_stored_vocab(
        self, stored_tensors: list[fused_tensors.StoredTensor], errors: ErrorCollector
    ) -> ModelConfig:
        """Returns the model's config with the padded vocabulary size of the ranks' shards."""
        tp, vocab_size = len(self._ranks), self.model_config.vocab_size
        name = self._names[next(stored.name for stored in stored_tensors if stored.is_vocab_parallel)].name
        shape = self._ranks[0].shapes.get(name)
        rows = shape[0] * tp if shape else vocab_size
        if not vocab_size <= rows < vocab_size + VOCAB_DIVISOR * tp:
            expected = f"{vocab_size} rows, with fewer than {VOCAB_DIVISOR * tp} rows of padding"
            errors.add(name, expected, f"{rows} (tp {tp})")
            return self.model_config
        return replace(self.model_config, vocab_size=rows)

    def _check(self, stored_tensors: list[fused_tensors.StoredTensor], errors: ErrorCollector) -> None:
        """Checks that every rank holds each tensor in its shape, and no others."""
        tp = len(self._ranks)
        ignored = self.arch.ignored_names.get(tensor_names.FORMAT, ())
        for number, rank in enumerate(self._ranks):
            where, before = self._rank_name(number), len(errors.problems)
            expected_names: set[str] = set()
            for stored in stored_tensors:
                stored_name = self._names[stored.name]
                expected_names |= {stored_name.name, *stored_name.duplicates}
                expected = stored.shape(self._padded_config, tp)
                found = rank.shapes.get(stored_name.name)
                if found != expected:
                    errors.add(f"{stored_name.name} ({where})", f"shape {expected}", found or "nothing")
                else:
                    self._check_elements(stored_name.name, rank, prod(expected), where, errors)
            if rank.shapes and not expected_names & rank.shapes.keys():
                names = [name for stored in stored_tensors for name in (self._names[stored.name].name,)]
                del errors.problems[before:]
                explain_other_names(rank.shapes, names, where, errors)
                continue
            tied = tensor_names.find_tied_sets(self.arch, self._names, stored_tensors)
            own = {name: tensor for name, tensor in rank.module_state.items() if name in expected_names}
            tensor_check.check_own_bytes(own, tied, errors)
            for name in sorted(set(rank.shapes) - expected_names):
                if not any(fnmatch(name, pattern) for pattern in ignored):
                    errors.add(f"{name} ({where})", "no such tensor", f"shape {rank.shapes[name]}")

    def _check_elements(self, name: str, rank: EngineRank, numel: int, where: str, errors: ErrorCollector) -> None:
        """Checks that a parameter's master weights are complete, or else that the module state has the parameter."""
        states = rank.find_optimizer_states(name)
        complete = f"{numel} elements in ZeRO's flat partitions"
        for state in states:
            if state.numel(name) != numel:
                hint = "A rank's file is missing or belongs to another checkpoint."
                errors.add(f"{name} ({where})", complete, state.numel(name), hint)
        if states:
            return
        if rank.optimizer_states and name in rank.trained:
            hint = "Its master weights are lost. Without any optimizer files, the module states would be read."
            errors.add(f"{name} ({where})", complete, "none", hint)
        elif name in rank.frozen:
            return
        elif name not in rank.module_state:
            errors.add(f"{name} ({where})", complete, "none", "Was the parameter frozen, and left out when saved?")
        elif not rank.module_state[name].is_floating_point():
            errors.add(f"{name} ({where})", "a floating-point dtype", rank.module_state[name].dtype)

    def _read_step(self, engine_files: EngineFiles) -> int:
        """Returns Adam's step count if moments are read, as the engine may have restarted its own count."""
        if not self._has_moments:
            return engine_files.global_steps
        steps = {state.step for rank in self._ranks for state in rank.optimizer_states}
        if len(steps) > 1:
            raise CheckpointError(
                Problem(f"{engine_files.tag_folder}", "one Adam step count on all ranks", sorted(steps))
            )
        return steps.pop()
