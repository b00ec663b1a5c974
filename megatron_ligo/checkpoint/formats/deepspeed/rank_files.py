"""The per-rank files of a DeepSpeed engine's checkpoint: found by name, checked for completeness, memory-mapped.

    DIR/latest                                                 the tag
    DIR/TAG/mp_rank_MM_model_states.pt                         ZeRO 0 to 2: the module of a model-parallel rank
    DIR/TAG/zero_pp_rank_D_mp_rank_MM_model_states.pt          ZeRO 3: shapes only
    DIR/TAG/[bf16_]zero_pp_rank_D_mp_rank_MM_optim_states.pt   a data-parallel rank's partition of masters and moments
    DIR/TAG/layer_NN-model_TT-model_states.pt                  pipelines: one layer of a tensor-parallel rank

In a pipeline, MM runs over the tensor-parallel ranks of the first stage, then over those of the second, and so on.
No code of a file is executed: stand-ins replace DeepSpeed's pickled classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

from megatron_ligo.checkpoint.formats.megatron_lm import arguments
from megatron_ligo.checkpoint.io import torch_files
from megatron_ligo.checkpoint.model_record import RUN_STATE, RUN_STATE_CONTENT
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem

LATEST = "latest"
MODEL_STATES = re.compile(r"(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
OPTIM_STATES = re.compile(r"(?:bf16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_?optim_states\.pt")
LAYER_STATES = re.compile(r"layer_(?P<layer>\d+)(?:-model_(?P<tp>\d+))?-model_states\.pt")
# Keys of a model-states file: parameters that the optimizer does not train.
FROZEN_FRAGMENTS, FROZEN_SHAPES = "frozen_param_fragments", "frozen_param_shapes"
# A recorded world size may exceed the number of files by at most this much; a larger one is corrupt.
MAX_MISSING_RANKS = 1000
MAX_LISTED_RANKS = 8


class FragmentStub:
    """Stands in for DeepSpeed's `fragment_address`, the `start` and `numel` of a parameter in a flat partition."""


class LossScalerStub:
    """Stands in for DeepSpeed's loss scaler."""


class DynamicLossScalerStub(LossScalerStub):
    pass


class ZeroStageStub:
    """Stands in for DeepSpeed's `ZeroStageEnum`. Calling it with a value or a member's name gives the stage."""

    NAMES = ("disabled", "optimizer_states", "gradients", "weights")

    def __new__(cls, value: object) -> int:
        return cls.NAMES.index(value) if isinstance(value, str) else int(value)


# DeepSpeed's own classes are neither imported nor constructed, nor are those in the arguments of Megatron-DeepSpeed.
STAND_INS = (
    (FragmentStub, "deepspeed.utils.tensor_fragment.fragment_address"),
    (LossScalerStub, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (DynamicLossScalerStub, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (ZeroStageStub, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    *arguments.STAND_INS,
)


def model_states_file(mp_rank: int) -> str:
    return f"mp_rank_{mp_rank:02d}_model_states.pt"


def layer_states_file(layer: int, tp_rank: int) -> str:
    return f"layer_{layer:02d}-model_{tp_rank:02d}-model_states.pt"


def has_model_states(folder: Path) -> bool:
    """Returns whether the folder holds the files of an engine's checkpoint."""
    return folder.is_dir() and any(MODEL_STATES.fullmatch(path.name) for path in folder.iterdir())


def has_layer_states(folder: Path) -> bool:
    """Returns whether the folder holds the layer files of a pipeline's checkpoint."""
    return folder.is_dir() and any(LAYER_STATES.fullmatch(path.name) for path in folder.iterdir())


class EngineFiles:
    """All files of a tag's folder, loaded.

    model_states: module state of each model-parallel rank; optim_states: for each model-parallel rank, the optimizer
    states of its data-parallel ranks in order ([] without optimizer files); layer_states: state of each (layer,
    tensor-parallel rank); frozen_fragments: for each model-parallel rank, the parts of frozen parameters by name that
    its data-parallel ranks hold under ZeRO 3, in order; zero_stage: 0 to 3. Raises CheckpointError with all errors.
    """

    def __init__(self, tag_folder: Path, operator: bool = False):
        """operator: accepts the checkpoint of a fit, which holds an operator and is refused otherwise."""
        self.tag_folder = tag_folder
        title = f"{tag_folder} is not a complete checkpoint of a DeepSpeed engine"
        self._errors = ErrorCollector(title, CheckpointError)
        model_paths, optim_paths, layer_paths = self._find_files()
        first = self._load(next(iter(model_paths.values()))) if model_paths else {}
        self._errors.raise_if_any()
        if not operator:
            _refuse_operator(first, tag_folder)
        self.mp_world_size = self._read_world_size(first, "mp_world_size", model_paths)
        self.dp_world_size = self._read_world_size(first, "dp_world_size", {dp for _, dp in optim_paths} or [0])
        self.is_zero3 = any(dp is not None for _, dp in model_paths)
        global_steps = first.get("global_steps", 0)
        if type(global_steps) is not int or global_steps < 0:
            self._errors.add("global_steps", "a non-negative integer", repr(global_steps))
        self.global_steps = global_steps
        ranks = [(mp, dp) for mp in range(self.mp_world_size) for dp in range(self.dp_world_size)]
        model_ranks = ranks if self.is_zero3 else [(mp, None) for mp in range(self.mp_world_size)]
        self._check_ranks("module states", model_paths, model_ranks)
        if optim_paths or self.is_zero3:
            self._check_ranks("optimizer states", optim_paths, ranks)
        self._errors.raise_if_any()
        dp_rank = 0 if self.is_zero3 else None
        self.model_states = {mp: self._load(model_paths[mp, dp_rank]) for mp in range(self.mp_world_size)}
        self.frozen_fragments = {mp: self._load_frozen(mp, model_paths) for mp in range(self.mp_world_size)}
        self.optim_states = {
            mp: [self._load(optim_paths[mp, dp]) for dp in range(self.dp_world_size)] if optim_paths else []
            for mp in range(self.mp_world_size)
        }
        self.layer_states = {layer_rank: self._load(path) for layer_rank, path in layer_paths.items()}
        self._errors.raise_if_any()
        self.zero_stage = 3 if self.is_zero3 else self._read_zero_stage()

    def _load_frozen(self, mp_rank: int, model_paths: dict) -> list[dict]:
        first = self.model_states[mp_rank].get(FROZEN_FRAGMENTS)
        if not self.is_zero3 or not first:
            return []
        others = (self._load(model_paths[mp_rank, dp]).get(FROZEN_FRAGMENTS) for dp in range(1, self.dp_world_size))
        fragments = [first, *others]
        if not all(isinstance(by_name, Mapping) for by_name in fragments):
            self._errors.add(_rank_name(mp_rank, None), f"{FROZEN_FRAGMENTS} on every data-parallel rank", "on some")
            return []
        return [{str(name): fragment for name, fragment in by_name.items()} for by_name in fragments]

    def _read_zero_stage(self) -> int:
        """Returns the ZeRO stage; 0 without partitions. A bf16 optimizer records none and partitions as ZeRO 1."""
        if not self.optim_states[0]:
            return 0
        state_dict = self.optim_states[0][0].get("optimizer_state_dict")
        stage = state_dict.get("zero_stage", 1) if isinstance(state_dict, dict) else 1
        return stage if stage in (1, 2) else 1

    def _find_files(self) -> tuple[dict, dict, dict]:
        """Returns paths of model states by (mp, dp or None), optimizer states by (mp, dp), layers by (layer, tp)."""
        model_paths: dict[tuple[int, int | None], Path] = {}
        optim_paths: dict[tuple[int, int], Path] = {}
        layer_paths: dict[tuple[int, int], Path] = {}
        for path in sorted(self.tag_folder.iterdir()):
            if match := MODEL_STATES.fullmatch(path.name):
                self._add_path(model_paths, (int(match["mp"]), int(match["dp"]) if match["dp"] else None), path)
            elif match := OPTIM_STATES.fullmatch(path.name):
                self._add_path(optim_paths, (int(match["mp"]), int(match["dp"])), path)
            elif match := LAYER_STATES.fullmatch(path.name):
                self._add_path(layer_paths, (int(match["layer"]), int(match["tp"] or 0)), path)
        if not model_paths:
            self._errors.add(f"{self.tag_folder}", model_states_file(0), "no such file")
        if len({dp is None for _, dp in model_paths}) > 1:
            self._errors.add(f"{self.tag_folder}", "module states of ZeRO 3 or of another stage", "both")
        return model_paths, optim_paths, layer_paths

    def _add_path(self, paths: dict, rank: tuple, path: Path) -> None:
        if rank in paths:
            self._errors.add(path.name, "one file per rank", f"{paths[rank].name} as well")
        paths[rank] = path

    def _load(self, path: Path) -> dict:
        try:
            state = torch_files.load(path, STAND_INS)
        except CheckpointError as error:
            for problem in error.problems:
                self._errors.add_message(problem)
            return {}
        if not isinstance(state, dict):
            self._errors.add(path.name, "a dict", type(state).__name__)
            return {}
        return state

    def _read_world_size(self, state: dict, name: str, file_ranks: Iterable) -> int:
        """Returns the world size that the checkpoint records, or the number of files if it records none."""
        num_files = len(list(file_ranks))
        world_size = state.get(name, num_files)
        if type(world_size) is not int or not 0 < world_size <= num_files + MAX_MISSING_RANKS:
            self._errors.add(name, f"the number of ranks, near the {num_files} of the files", repr(world_size))
            self._errors.raise_if_any()
        return world_size

    def _check_ranks(self, kind: str, paths: dict, expected_ranks: list[tuple]) -> None:
        differences = {
            "missing": set(expected_ranks) - set(paths),
            "unexpected": set(paths) - set(expected_ranks),
        }
        for difference, ranks in differences.items():
            if ranks:
                names = ", ".join(_rank_name(*rank) for rank in islice(sorted(ranks, key=str), MAX_LISTED_RANKS))
                more = f" and {len(ranks) - MAX_LISTED_RANKS} more" if len(ranks) > MAX_LISTED_RANKS else ""
                expected = f"files of {self.mp_world_size} model-parallel x {self.dp_world_size} data-parallel ranks"
                self._errors.add(kind, expected, f"{difference}: {names}{more}")


def _rank_name(mp: int, dp: int | None) -> str:
    return f"mp_rank_{mp:02d}" if dp is None else f"zero_pp_rank_{dp}_mp_rank_{mp:02d}"


def _refuse_operator(state: dict, tag_folder: Path) -> None:
    own_state = state.get(RUN_STATE)
    if isinstance(own_state, dict) and own_state.get(RUN_STATE_CONTENT) == "operator":
        hint = "Grow a model with the operator: ligo grow --operator OUTPUT/operator, written at the end of the fit."
        raise CheckpointError(
            Problem(f"{tag_folder}", "a checkpoint of a model", "a fit's, which holds an operator", hint)
        )
