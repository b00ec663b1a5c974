"""The files of a DeepSpeed engine's checkpoint, by rank: found by their names, all there, mapped, nothing executed.

    DIR/latest                                                 the tag
    DIR/TAG/mp_rank_MM_model_states.pt                         ZeRO 0 to 2: a model-parallel rank's module
    DIR/TAG/zero_pp_rank_D_mp_rank_MM_model_states.pt          ZeRO 3: shapes only
    DIR/TAG/[bf16_]zero_pp_rank_D_mp_rank_MM_optim_states.pt   a data-parallel rank's part of masters and moments
    DIR/TAG/layer_NN-model_TT-model_states.pt                  pipelines: a layer of a tensor-parallel rank

Of a pipeline, MM counts the tensor-parallel ranks of the first stage, then those of the second, ...
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from megatron_ligo.checkpoint.io import torch_files
from megatron_ligo.checkpoint.model_record import RUN_STATE, RUN_STATE_CONTENT
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem

LATEST = "latest"
MODEL = re.compile(r"(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_?optim_states\.pt")
LAYER = re.compile(r"layer_(?P<layer>\d+)(?:-model_(?P<tp>\d+))?-model_states\.pt")
# More ranks than this beyond the files that are there are a lie, not a loss.
LOST = 1000


class FragmentStub:
    """Stands in for DeepSpeed's record of where a parameter lies in a flat tensor: `start` and `numel`."""


class LossScalerStub:
    """Stands in for DeepSpeed's record of its loss scale."""


class DynamicLossScalerStub(LossScalerStub):
    pass


class ZeroStageStub:
    """Stands in for DeepSpeed's enumeration of ZeRO's stages: its number, by value or by name."""

    NAMES = ("disabled", "optimizer_states", "gradients", "weights")

    def __new__(cls, value: object) -> int:
        return cls.NAMES.index(value) if isinstance(value, str) else int(value)


# DeepSpeed's own classes are neither imported nor built.
STAND_INS = (
    (FragmentStub, "deepspeed.utils.tensor_fragment.fragment_address"),
    (LossScalerStub, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (DynamicLossScalerStub, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (ZeroStageStub, "deepspeed.runtime.zero.config.ZeroStageEnum"),
)


def model_file(mp: int) -> str:
    return f"mp_rank_{mp:02d}_model_states.pt"


def layer_file(layer: int, tp: int) -> str:
    return f"layer_{layer:02d}-model_{tp:02d}-model_states.pt"


def is_engines(folder: Path) -> bool:
    """True where a folder holds files of an engine's checkpoint."""
    return folder.is_dir() and any(MODEL.fullmatch(path.name) for path in folder.iterdir())


def is_pipelines(folder: Path) -> bool:
    """True where a folder holds the layers of a pipeline."""
    return folder.is_dir() and any(LAYER.fullmatch(path.name) for path in folder.iterdir())


class EngineFiles:
    """Everything that a tag's folder holds, loaded.

    models: mp -> module states; optims: mp -> states of the data-parallel ranks in order ([] where there are none);
    layers: (layer, tp) -> state. mp, dp: counts of ranks; zero: the stage. Raises CheckpointError with all faults.
    """

    def __init__(self, tag: Path, operator: bool = False):
        """operator: it is a fit's; else a fit's is refused."""
        self.tag = tag
        self._faults = ErrorCollector(f"{tag} is no whole checkpoint of a DeepSpeed engine", CheckpointError)
        models, optims, layers = self._find()
        first = self._load(next(iter(models.values()))) if models else {}
        self._faults.raise_if_any()
        if not operator:
            _refuse_operator(first, tag)
        self.mp = self._count(first, "mp_world_size", models)
        self.dp = self._count(first, "dp_world_size", {dp: 0 for _, dp in optims} or [0])
        self.sharded = any(dp is not None for _, dp in models)
        steps = first.get("global_steps", 0)
        if type(steps) is not int or steps < 0:
            self._faults.add("global_steps", "a count", repr(steps))
        self.global_steps = steps
        ranks = [(mp, dp) for mp in range(self.mp) for dp in range(self.dp)]
        wanted = ranks if self.sharded else [(mp, None) for mp in range(self.mp)]
        self._complete("module states", models, wanted)
        if optims or self.sharded:
            self._complete("optimizer states", optims, ranks)
        self._faults.raise_if_any()
        self.models = {mp: self._load(models[mp, 0 if self.sharded else None]) for mp in range(self.mp)}
        self.optims = {
            mp: [self._load(optims[mp, dp]) for dp in range(self.dp)] if optims else [] for mp in range(self.mp)
        }
        self.layers = {place: self._load(path) for place, path in layers.items()}
        self._faults.raise_if_any()
        self.zero = 3 if self.sharded else self._stage()

    def _stage(self) -> int:
        """0 where no optimizer is partitioned. What keeps no stage (bf16 with fp32 accumulation) is ZeRO 1."""
        if not self.optims[0]:
            return 0
        inner = self.optims[0][0].get("optimizer_state_dict")
        stage = inner.get("zero_stage", 1) if isinstance(inner, dict) else 1
        return stage if stage in (1, 2) else 1

    def _find(self) -> tuple[dict, dict, dict]:
        models: dict[tuple[int, int | None], Path] = {}
        optims: dict[tuple[int, int], Path] = {}
        layers: dict[tuple[int, int], Path] = {}
        for path in sorted(self.tag.iterdir()):
            if found := MODEL.fullmatch(path.name):
                self._note(models, (int(found["mp"]), int(found["dp"]) if found["dp"] else None), path)
            elif found := OPTIM.fullmatch(path.name):
                self._note(optims, (int(found["mp"]), int(found["dp"])), path)
            elif found := LAYER.fullmatch(path.name):
                self._note(layers, (int(found["layer"]), int(found["tp"] or 0)), path)
        if not models:
            self._faults.add(f"{self.tag}", model_file(0), "nothing like it")
        if len({dp is None for _, dp in models}) > 1:
            self._faults.add(f"{self.tag}", "module states of ZeRO 3 or of another stage", "both")
        return models, optims, layers

    def _note(self, table: dict, place: tuple, path: Path) -> None:
        if place in table:
            self._faults.add(path.name, "one file for each rank", f"{table[place].name} as well")
        table[place] = path

    def _load(self, path: Path) -> dict:
        try:
            state = torch_files.load(path, STAND_INS)
        except CheckpointError as error:
            self._faults.note(str(error))
            return {}
        if not isinstance(state, dict):
            self._faults.add(path.name, "a dict", type(state).__name__)
            return {}
        return state

    def _count(self, state: dict, name: str, found: Iterable) -> int:
        """How many ranks the checkpoint says it has; as many as there are files where it does not say."""
        found = list(found)
        count = state.get(name, len(found))
        if type(count) is not int or not 0 < count <= len(found) + LOST:
            self._faults.add(name, f"a count of ranks like that of the files, {len(found)}", repr(count))
            self._faults.raise_if_any()
        return count

    def _complete(self, what: str, found: dict, wanted: list[tuple]) -> None:
        for said, places in (("missing", set(wanted) - set(found)), ("too many", set(found) - set(wanted))):
            if places:
                names = ", ".join(_rank_name(*place) for place in islice(sorted(places, key=str), 8))
                more = f" and {len(places) - 8} more" if len(places) > 8 else ""
                expected = f"files of {self.mp} model-parallel x {self.dp} data-parallel ranks"
                self._faults.add(what, expected, f"{said}: {names}{more}")


def _rank_name(mp: int, dp: int | None) -> str:
    return f"mp_rank_{mp:02d}" if dp is None else f"zero_pp_rank_{dp}_mp_rank_{mp:02d}"


def _refuse_operator(state: dict, tag: Path) -> None:
    own = state.get(RUN_STATE)
    if isinstance(own, dict) and own.get(RUN_STATE_CONTENT) == "operator":
        hint = "Grow a model with it: tools/grow.py --operator OUTPUT/operator, which the fit writes at its end."
        raise CheckpointError(Problem(f"{tag}", "a checkpoint of a model", "a fit's, which holds an operator", hint))
