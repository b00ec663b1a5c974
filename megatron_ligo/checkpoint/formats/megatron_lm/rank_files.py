"""The per-rank files of a Megatron-LM checkpoint: checked for completeness, memory-mapped, with current tensor names.

No code of a file is executed: stand-ins replace the pickled classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

from torch import Tensor

from megatron_ligo.arch.mcore_names import to_local_name
from megatron_ligo.checkpoint.formats.megatron_lm import arguments, expert_files, old_names
from megatron_ligo.checkpoint.formats.megatron_lm.rank_optimizer import RankOptimizerState, read_rank_optimizer
from megatron_ligo.checkpoint.io import adam_groups, torch_files
from megatron_ligo.checkpoint.reader import MOMENTS
from megatron_ligo.common.errors import CheckpointError, ErrorCollector

MODEL_FILE = "model_optim_rng.pt"
# The model's file if the optimizer has a file of its own.
MODEL_FILE_WITHOUT_OPTIMIZER = "model_rng.pt"
DISTRIBUTED_OPTIMIZER_FILES = ("distrib_optim.pt", "optim.pt")
DISTRIBUTED_OPTIMIZER = "distributed, with buffers that name no parameters: save it with --ckpt-format torch_dist"
INTERLEAVED_OPTIMIZER = "of an interleaved pipeline: save it with --ckpt-format torch_dist"
# The model of a rank, or its parts in an interleaved pipeline.
PART = re.compile(r"model(\d{0,4})")
RANK_FOLDER = re.compile(r"mp_rank_(?P<tp>\d{2,4})(?:_(?P<second>\d{3,5}))?(?:_(?P<third>\d{3,5}))?")
LAYER_NAME = re.compile(r"(.*\blayers\.)(\d+)(\..*)")
# Older versions order query, key and value differently.
MIN_CHECKPOINT_VERSION = 2.0
# The folders' names may claim at most this many ranks more than there are files; a larger number is corrupt.
MAX_MISSING_RANKS = 1000
IGNORED_NAMES = ("*_extra_state", "*inv_freq")
Rank = tuple[int, int, int]  # tensor-parallel rank, pipeline stage, expert-parallel rank


def rank_file(tp_rank: int, stage: int, pp: int, ep_rank: int = 0, ep: int = 1) -> str:
    """Returns the path of a rank's file within the iteration's folder."""
    stage_part = f"_{stage:03d}" if pp > 1 else ""
    return f"mp_rank_{tp_rank:02d}{stage_part}{f'_{ep_rank:03d}' if ep > 1 else ''}/{MODEL_FILE}"


def has_rank_files(folder: Path) -> bool:
    return folder.is_dir() and any(
        RANK_FOLDER.fullmatch(path.name) and _find_model_file(path) for path in folder.iterdir()
    )


def _find_model_file(folder: Path) -> Path | None:
    paths = (folder / name for name in (MODEL_FILE, MODEL_FILE_WITHOUT_OPTIMIZER))
    return next((path for path in paths if path.is_file()), None)


class RankFiles:
    """All rank files of an iteration's folder, loaded (memory-mapped). Raises CheckpointError with all errors.

    tensors: global name -> shards of the tensor-parallel ranks; args: arguments of the run, None if not saved; step:
    the iteration; copies: global name -> for each tensor-parallel rank, what other expert-parallel ranks hold of it.
    `read_optimizers` sets moments (by kind, shaped as `tensors`; {} if there are none), the optimizer's
    step count as `step`, groups (settings of its param groups) and unread_optimizer: why its state is not read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._errors = ErrorCollector(f"{folder} is not a complete checkpoint of Megatron-LM", CheckpointError)
        paths = self._find_files()
        self.tp, self.pp, self.ep = (max((rank[i] for rank in paths), default=-1) + 1 for i in range(3))
        if self.tp * self.pp * self.ep > len(paths) + MAX_MISSING_RANKS:
            expected = f"{self.tp} x {self.pp} x {self.ep} files, as the folders' names say"
            self._errors.add("ranks", expected, f"{len(paths)} files")
            self._errors.raise_if_any()
        for rank in product(range(self.tp), range(self.pp), range(self.ep)):
            if rank not in paths:
                self._errors.add(self._rank_file(rank), "a file", "nothing there", "Fetch it again.")
        self._errors.raise_if_any()
        states = {rank: self._load(path) for rank, path in sorted(paths.items())}
        self._errors.raise_if_any()
        first = states[0, 0, 0]
        self.args, self.step = first.get("args"), first.get("iteration", 0)
        self._hidden_size = (arguments.plain_arguments(self.args) or {}).get("hidden_size")
        if type(self.step) is not int or self.step < 0:
            self._errors.add("iteration", "a non-negative integer", repr(self.step))
        self.num_layers = 0
        self.tensors: dict[str, list[Tensor]] = {}
        self.moments: dict[str, dict[str, list[Tensor]]] = {}
        self.groups: tuple[Mapping[str, object], ...] = ()
        self.unread_optimizer = ""
        self._optimizers = {rank: state.get("optimizer") for rank, state in states.items()}
        # Of an interleaved pipeline, a stage has several parts of the model: all first ones come before the second.
        self._parts = _part_names(first)
        for rank, state in states.items():
            if _part_names(state) != self._parts:
                found = " and ".join(_part_names(state)) or "none of them"
                self._errors.add(self._rank_file(rank), " and ".join(self._parts) + ", as on rank 0", found)
        self._errors.raise_if_any()
        self.copies: dict[str, list[list[Tensor]]] = {}
        self._copies: dict[tuple[int, int], dict[str, list[Tensor]]] = {}
        self._modules: dict[tuple[int, int], dict[str, Tensor]] = {}
        for (part, name), stage, tp_rank in product(enumerate(self._parts), range(self.pp), range(self.tp)):
            ranks = [(tp_rank, stage, ep_rank) for ep_rank in range(self.ep)]
            modules = [self._read_module(states[rank][name], self._rank_file(rank)) for rank in ranks]
            place = tp_rank, stage + part * self.pp
            joined = expert_files.join_expert_ranks(modules, self._rank_file(ranks[0]), self._errors)
            self._modules[place], self._copies[place] = joined if self.ep > 1 else (modules[0], {})
        # Global name -> stage, and the name in the stage's files.
        self._stage_names: dict[str, tuple[int, str]] = {}
        for stage in range(self.pp * len(self._parts)):
            self._add_stage([self._modules[tp_rank, stage] for tp_rank in range(self.tp)], stage)
        self._errors.raise_if_any()

    def read_optimizers(self, errors: ErrorCollector) -> None:
        """Reads moments, and master weights in place of the weights, from all ranks or from none."""
        if any(any(self.folder.glob(f"mp_rank_*/{name}")) for name in DISTRIBUTED_OPTIMIZER_FILES):
            self.unread_optimizer = DISTRIBUTED_OPTIMIZER
            return
        if len(self._parts) > 1:
            self.unread_optimizer = INTERLEAVED_OPTIMIZER if any(self._optimizers.values()) else ""
            return
        states = {rank: self._read_optimizer(rank, module, errors) for rank, module in self._modules.items()}
        self.unread_optimizer = next((state.unsupported for state in states.values() if state.unsupported), "")
        if not self.unread_optimizer:
            _check_on_all_ranks(
                "masters", {self._rank_file((*rank, 0)): bool(state.masters) for rank, state in states.items()}, errors
            )
            _check_on_all_ranks(
                "moments", {self._rank_file((*rank, 0)): bool(state.moments) for rank, state in states.items()}, errors
            )
        steps = {state.step for state in states.values() if state.moments} - {None}
        if len(steps) > 1:
            errors.add("step", "one Adam step count on all ranks", sorted(steps))
        if self.unread_optimizer or errors.problems:
            return
        if steps:
            (self.step,) = steps
            param_groups = [group for state in states.values() for group in state.param_groups]
            self.groups = adam_groups.read_settings(param_groups)
            self.moments = {kind: {} for kind in MOMENTS}
        for global_name, (stage, name) in self._stage_names.items():
            self._use_optimizer_state(global_name, name, [states[tp_rank, stage] for tp_rank in range(self.tp)])

    def _read_optimizer(
        self, place: tuple[int, int], module: Mapping[str, Tensor], errors: ErrorCollector
    ) -> RankOptimizerState:
        """Reads the state of a tensor-parallel rank of a stage, of all its expert-parallel ranks together."""
        ranks = [(*place, ep_rank) for ep_rank in range(self.ep)]
        if self.ep == 1:
            return read_rank_optimizer(self._optimizers[ranks[0]], module, self._rank_file(ranks[0]), errors)
        optimizers = [self._optimizers[rank] for rank in ranks]
        return expert_files.read_optimizers(optimizers, module, [self._rank_file(rank) for rank in ranks], errors)

    def _use_optimizer_state(self, global_name: str, name: str, states: list[RankOptimizerState]) -> None:
        weights = zip(states, self.tensors[global_name], strict=True)
        self.tensors[global_name] = [state.masters.get(name, weight) for state, weight in weights]
        for kind, moments in self.moments.items():
            moments[global_name] = [state.moments[kind][name] for state in states]

    def iter_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every rank's floating-point tensors, each with a name for error messages."""
        for name, shards in self.tensors.items():
            for rank, shard in enumerate(shards):
                if shard.is_floating_point():
                    yield f"{name} (rank {rank})", shard

    def check_tensor(self, name: str, shape: tuple[int, ...], errors: ErrorCollector) -> None:
        """Adds an error if a tensor is missing, or has another shape or dtype on any rank. shape: of a shard."""
        if name not in self.tensors:
            errors.add(name, "a tensor", "none")
            return
        dtype = self.tensors[name][0].dtype
        for rank, shard in enumerate(self.tensors[name]):
            if tuple(shard.shape) != shape:
                errors.add(f"{name} (rank {rank})", f"shape {shape}", tuple(shard.shape))
            if not shard.is_floating_point() or shard.dtype.itemsize == 1 or shard.dtype != dtype:
                errors.add(f"{name} (rank {rank})", "one floating-point dtype on all ranks", shard.dtype)

    def _rank_file(self, rank: Rank) -> str:
        tp_rank, stage, ep_rank = rank
        return rank_file(tp_rank, stage, self.pp, ep_rank, self.ep)

    def _find_files(self) -> dict[Rank, Path]:
        paths: dict[Rank, Path] = {}
        folder_names = {}
        has_stages = self._has_stages()
        for folder in sorted(path for path in self.folder.iterdir() if path.name.startswith("mp_rank_")):
            match, path = RANK_FOLDER.fullmatch(folder.name), _find_model_file(folder)
            if not match or not path:
                self._errors.add(
                    folder.name, f"mp_rank_TT, mp_rank_TT_PPP or mp_rank_TT_PPP_EEE with {MODEL_FILE}", "neither"
                )
                continue
            second, third = (int(match[name] or 0) for name in ("second", "third"))
            rank = (int(match["tp"]), second, third) if has_stages else (int(match["tp"]), 0, second)
            if rank in paths:
                self._errors.add(folder.name, "one folder per rank", f"{folder_names[rank]} as well")
            paths[rank], folder_names[rank] = path, folder.name
        self._check_expert_layout(paths)
        if not paths:
            self._errors.add(f"mp_rank_00/{MODEL_FILE}", "a file", "nothing there")
        return paths

    def _first_arguments(self, paths: Iterable[Path]) -> Mapping[str, object]:
        """Returns the arguments in the first file; {} if it has none, or is no such file."""
        for path in paths:
            state = torch_files.load(path, arguments.STAND_INS)
            return arguments.plain_arguments(state.get("args") if isinstance(state, dict) else None) or {}
        return {}

    def _has_stages(self) -> bool:
        """Returns whether the second number of a folder's name is a stage: an expert's rank may stand there too."""
        folders = sorted(folder for folder in self.folder.iterdir() if RANK_FOLDER.fullmatch(folder.name))
        numbers = [RANK_FOLDER.fullmatch(folder.name) for folder in folders]
        if any(match["third"] for match in numbers) or not any(match["second"] for match in numbers):
            return True
        args = self._first_arguments(filter(None, map(_find_model_file, folders)))
        return args.get("pipeline_model_parallel_size") != 1 or args.get("expert_model_parallel_size") in (None, 1)

    def _check_expert_layout(self, paths: Mapping[Rank, Path]) -> None:
        """Adds an error for experts whose tensor-parallel size is not the other tensors'."""
        args = self._first_arguments(paths.values())
        size = args.get("expert_tensor_parallel_size")
        if args.get("num_experts") and size not in (None, args.get("tensor_model_parallel_size")):
            expected = f"{args.get('tensor_model_parallel_size')}, the tensor_model_parallel_size"
            self._errors.add("expert_tensor_parallel_size", expected, size, "Save it with --ckpt-format torch_dist.")

    def _load(self, path: Path) -> dict:
        where = str(path.relative_to(self.folder))
        try:
            state = torch_files.load(path, arguments.STAND_INS)
        except CheckpointError as error:
            for problem in error.problems:
                self._errors.add_message(problem)
            return {}
        version = state.get("checkpoint_version", 0) if isinstance(state, dict) else None
        if version is None or not isinstance(version, int | float) or version < MIN_CHECKPOINT_VERSION:
            hint = "Load and save it with a newer Megatron-LM."
            expected = f"checkpoint_version of {MIN_CHECKPOINT_VERSION} or later"
            self._errors.add(where, expected, repr(version), hint)
        elif not _part_names(state):
            self._errors.add(where, "model, a dict of tensors", type(state.get("model")).__name__)
        return state if isinstance(state, dict) else {}

    def _read_module(self, state: dict, where: str) -> dict[str, Tensor]:
        """Returns the tensors of a part by their current names in Megatron-core's local layer spec."""
        module = {}
        values = dict(old_names.flatten(state))
        renamed = old_names.find_renaming(values)
        for name, value in values.items():
            if any(fnmatchcase(name, pattern) for pattern in IGNORED_NAMES):
                continue
            if not isinstance(value, Tensor):
                self._errors.add(f"{name} ({where})", "a tensor", type(value).__name__)
                continue
            local_name = to_local_name(renamed(name))
            if local_name in module:
                self._errors.add(f"{name} ({where})", "one tensor of that name", "two")
            module[local_name] = value
        return expert_files.separate_experts(module, self._hidden_size)

    def _add_stage(self, modules: list[dict[str, Tensor]], stage: int) -> None:
        """Adds the tensors of a stage. Its layers are numbered after those of the stages before."""
        names = {name: None for module in modules for name in module}
        layers = {int(match[2]) for match in map(LAYER_NAME.fullmatch, names) if match}
        if layers != set(range(len(layers))):
            self._errors.add(f"stage {stage}", f"layers 0 to {len(layers) - 1}", sorted(layers))
        for name in names:
            shards = [module.get(name) for module in modules]
            missing = [rank for rank, shard in enumerate(shards) if shard is None]
            if missing:
                self._errors.add(f"{name} (stage {stage})", "a tensor on every rank", f"none on {missing}")
                continue
            match = LAYER_NAME.fullmatch(name)
            global_name = f"{match[1]}{int(match[2]) + self.num_layers}{match[3]}" if match else name
            if global_name in self.tensors:
                self._errors.add(f"{name} (stage {stage})", "one stage that holds it", "two")
            self.tensors[global_name] = shards
            self.copies[global_name] = [self._copies[rank, stage].get(name, []) for rank in range(self.tp)]
            self._stage_names[global_name] = (stage, name)
        self.num_layers += len(layers)


def _part_names(state: Mapping) -> list[str]:
    """Returns the names under which a rank's state holds tensors of the model, in order: model, or model0, ..."""
    names = {name: PART.fullmatch(name) for name, value in state.items() if isinstance(value, dict)}
    return sorted((name for name, match in names.items() if match), key=lambda name: int(names[name][1] or 0))


def _check_on_all_ranks(kind: str, has_kind: Mapping[str, bool], errors: ErrorCollector) -> None:
    """Adds an error if some ranks' files have a kind of optimizer state and others do not."""
    without = [file for file, has in has_kind.items() if not has]
    if 0 < len(without) < len(has_kind):
        errors.add(kind, "on all ranks, or on none", f"none in {', '.join(without)}")
