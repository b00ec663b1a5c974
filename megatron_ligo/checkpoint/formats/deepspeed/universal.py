"""DeepSpeed's universal checkpoint: a folder per parameter with the global tensor, for any layout and ZeRO stage.

    DIR/latest_universal                      the tag
    DIR/TAG/mp_rank_00_model_states.pt        metadata for ZeRO 1 and 2 (and zero_pp_rank_0_... for ZeRO 3)
    DIR/TAG/zero/optimizer_state.pt
    DIR/TAG/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt
    DIR/dims.json, manifest.json              this program's, which DeepSpeed does not read

NAME is Megatron-core's, or transformers' if an engine trained such a model (read only). Weights are fp32, as the format
requires; the cast from bf16 is exact. The settings of Adam's param groups are stored under a key that DeepSpeed does
not read, so that a run keeps its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.arch.spec import Pack
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.format import Format, WriteOptions
from megatron_ligo.checkpoint.formats.deepspeed import state_keys
from megatron_ligo.checkpoint.formats.deepspeed.latest_tag import TagOptions, find_tag_folder
from megatron_ligo.checkpoint.formats.deepspeed.param_names import match_naming
from megatron_ligo.checkpoint.formats.deepspeed.rank_files import STAND_INS
from megatron_ligo.checkpoint.formats.hf import tensor_names
from megatron_ligo.checkpoint.formats.hf.common_prefix import explain_other_names
from megatron_ligo.checkpoint.io import adam_groups, torch_files
from megatron_ligo.checkpoint.io.file_layout import LazyTensor
from megatron_ligo.checkpoint.io.output import Output, lazy_tensor
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT, Reader, TensorInfo
from megatron_ligo.checkpoint.source_keys import NO_KEYS, AcceptedKeys
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.config.typed_toml import setting
from megatron_ligo.sharding import fused_tensors

NAME = "universal"
DTYPE = torch.float32

LATEST = "latest_universal"
OPTIMIZER = "optimizer_state.pt"
STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
FILES = {WEIGHT: "fp32.pt", **{kind: f"{kind}.pt" for kind in MOMENTS}}
# The version whose loader was tested. DeepSpeed does not check it.
DS_VERSION = "0.19.8"
# DeepSpeed zips these with the optimizer's param groups, and skips groups beyond them.
PARAM_GROUPS = 8
STEP_FILE = "step.pt"
MOST_LISTED_STEPS = 4
# Not `param_groups`: DeepSpeed would replace the run's own settings by those.
SETTINGS = "settings_of_source"


class UniversalReader(Reader):
    """Reads canonical tensors from the parameters' folders, memory-mapped."""

    format = NAME

    def __init__(self, path: Path, accepted: AcceptedKeys = NO_KEYS):
        self.path = path
        self._tag_folder = find_tag_folder(path, LATEST)
        self._zero_folder = self._tag_folder / "zero"
        if not self._zero_folder.is_dir():
            raise CheckpointError(Problem(f"{self._tag_folder}", "a folder zero/", "none"))
        root = path if model_record.has_record(path) else self._tag_folder.parent
        self.model_config, self.carried = model_record.read(root, accepted)
        self.files = model_record.find_carried_files(root)
        global_steps = self._read_global_steps(root, accepted)
        stored_tensors = self._find_folders()
        self._has_moments = False
        self._weights = self._check(stored_tensors)
        optimizer = self._load_optimizer() if self._has_moments else {}
        self.step = self._read_adam_step(stored_tensors, optimizer, global_steps) if self._has_moments else global_steps
        self.groups = adam_groups.read_settings(optimizer.get("param_groups")) or adam_groups.read_settings(
            optimizer.get(SETTINGS)
        )
        self._stored_by_key = {key: stored for stored in stored_tensors.values() for key in stored.keys}

    @property
    def has_moments(self) -> bool:
        return self._has_moments

    def info(self, key: str) -> TensorInfo:
        weight = self._weights[self._stored_by_key[key].name]
        return TensorInfo(self.param(key).shape(self.model_config), weight.dtype)

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        stored = self._stored_by_key[key]
        tensor = self._weights[stored.name] if kind == WEIGHT else self._load(stored, kind)
        torch_files.check_stored(f"{self._folders[stored.name] / FILES[kind]}", tensor)
        return stored.extract(tensor, key, self.model_config)

    def _find_folders(self) -> dict[str, fused_tensors.StoredTensor]:
        """Returns the model's tensors under the naming of the parameters' folders, and sets each one's folder."""
        folders = {folder.name for folder in self._zero_folder.iterdir() if folder.is_dir()}
        if self.model_config.num_layers > len(folders):
            expected = f"at most {len(folders)}, the number of parameters"
            raise CheckpointError(Problem("num_layers", expected, self.model_config.num_layers))
        naming, renaming = match_naming(self.arch, self.model_config, folders)
        renaming.report(f"{self.path}")
        originals = {renaming.apply(name): name for name in folders}
        names = {}
        if naming == tensor_names.FORMAT:
            self.model_config = tensor_names.detect_optional_parts(self.arch, self.model_config, originals)
            located = tensor_names.locate_tensors(self.arch, self.model_config, originals)
            names = {name: stored.name for name, stored in located.items()}
        stored_tensors = fused_tensors.stored_tensors(self.arch, self.model_config, naming)
        names = {name: names.get(name, name) for name in stored_tensors}
        if not any(name in originals for name in names.values()):
            errors = ErrorCollector(f"{self._tag_folder} does not hold the model of its config", CheckpointError)
            explain_other_names(folders, list(names.values()), f"{self._zero_folder}", errors)
            errors.raise_if_any()
        self._folders = {name: self._zero_folder / originals.get(other, other) for name, other in names.items()}
        return stored_tensors

    def _read_global_steps(self, root: Path, accepted: AcceptedKeys) -> int:
        """Returns the step count, and checks what else the state says of the model. root: the config's folder."""
        for path in (self._tag_folder / name for name in STATES):
            if path.is_file():
                state = torch_files.load(path, STAND_INS)
                step = state.get("global_steps") if isinstance(state, dict) else None
                if type(step) is not int or step < 0:
                    raise CheckpointError(Problem(f"{path}", "global_steps, a non-negative integer", repr(step)))
                state_keys.check_state(state, f"{path}", self.model_config, f"the config in {root}", accepted)
                return step
        raise CheckpointError(Problem(f"{self._tag_folder}", " or ".join(STATES), "neither"))

    def _load_optimizer(self) -> dict:
        """Loads the optimizer state that belongs to no parameter; {} if there is none."""
        path = self._zero_folder / OPTIMIZER
        state = torch_files.load(path, STAND_INS) if path.is_file() else {}
        return state if isinstance(state, dict) else {}

    def _read_adam_step(self, names: Iterable[str], optimizer: dict, default: int) -> int:
        """Returns Adam's own step count: stored with each parameter, or (from ZeRO 3) in the optimizer state.

        Raises CheckpointError unless all parameters have the same, as a checkpoint has one.
        """
        steps: dict[int | None, list[str]] = {}
        for name in names:
            path = self._folders[name] / STEP_FILE
            value = torch_files.load(path) if path.is_file() else None
            step = None if value is None else self._parse_step(value, f"{path}")
            steps.setdefault(step, []).append(name)
        if steps.keys() == {None}:
            steps = self._read_optimizer_steps(optimizer)
        if len(steps) > 1:
            found = " and ".join(
                f"{'none' if step is None else step} of {owners[0]} ({len(owners)} in all)"
                for step, owners in sorted(steps.items(), key=lambda item: str(item[0]))[:MOST_LISTED_STEPS]
            )
            hint = "Are parts of two checkpoints mixed?"
            raise CheckpointError(Problem(f"{self._zero_folder}", "one Adam step count of all parameters", found, hint))
        return next((step for step in steps if step is not None), default)

    def _read_optimizer_steps(self, optimizer: dict) -> dict[int | None, list[str]]:
        """Returns the step counts in the optimizer state, each with the param groups that have it; {} without any."""
        base = optimizer.get("optimizer_state_dict")
        states = base.get("state") if isinstance(base, dict) else None
        groups = base.get("param_groups") if isinstance(base, dict) else None
        holders = [*states.items()] if isinstance(states, dict) else []
        holders += enumerate(groups) if isinstance(groups, list) else ()
        steps: dict[int | None, list[str]] = {}
        for number, state in holders:
            if isinstance(state, dict) and adam_groups.STEP in state:
                step = self._parse_step(state[adam_groups.STEP], f"{self._zero_folder / OPTIMIZER}")
                steps.setdefault(step, []).append(f"param group {number}")
        return steps

    def _parse_step(self, value: object, where: str) -> int:
        step = adam_groups.parse_step(value)
        if step is None:
            raise CheckpointError(Problem(where, "Adam's step count", f"{value!r}"[:200]))
        return step

    def _check(self, stored_tensors: dict[str, fused_tensors.StoredTensor]) -> dict[str, Tensor]:
        """Returns all weights, and sets whether there are moments.

        Raises CheckpointError unless every parameter has a folder with tensors of its shape, and moments are complete.
        """
        errors = ErrorCollector(f"{self._tag_folder} does not hold the model of its config", CheckpointError)
        weights = {}
        for name, stored in stored_tensors.items():
            try:
                weights[name] = self._load(stored, WEIGHT)
            except CheckpointError as error:
                errors.problems.extend(error.problems)
        folders = {folder.name for folder in self._zero_folder.iterdir() if folder.is_dir()}
        for name in sorted(folders - {folder.name for folder in self._folders.values()}):
            errors.add(name, "no such parameter", "a folder")
        moment_files = {name: [(self._folders[name] / FILES[kind]).is_file() for kind in MOMENTS] for name in weights}
        self._has_moments = all(all(exist) for exist in moment_files.values())
        if not self._has_moments:
            for name in (name for name, exist in moment_files.items() if any(exist)):
                errors.add(name, "both moments of all parameters, or none", "some of them")
        errors.raise_if_any(weights.items)
        return weights

    def _load(self, stored: fused_tensors.StoredTensor, kind: str) -> Tensor:
        """Loads a parameter's weight or moment in the stored (global) shape."""
        path = self._folders[stored.name] / FILES[kind]
        state = torch_files.load(path)
        tensor = state.get("param") if isinstance(state, dict) else state
        shape = stored.shape(self.model_config)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise CheckpointError(Problem(f"{path}", "a floating-point tensor", type(tensor).__name__))
        # DeepSpeed's converter writes flat tensors for ZeRO 3.
        if tensor.shape != shape and not (tensor.dim() == 1 and tensor.numel() == torch.Size(shape).numel()):
            raise CheckpointError(Problem(f"{path}", f"shape {shape}", tuple(tensor.shape)))
        return tensor.reshape(shape)


def _sharding_metadata(stored: fused_tensors.StoredTensor) -> dict:
    """Returns how DeepSpeed's loader shards a parameter over tensor-parallel ranks, under its own keys."""
    metadata: dict[str, object] = {}
    if stored.tp_dim is not None:
        metadata["cat_dim"] = stored.tp_dim
    if stored.pack is Pack.STACKED:
        metadata["param_n_sub_params"] = len(stored.keys)
    if stored.is_vocab_parallel:
        metadata["vocab_tensor"] = True
    return metadata


@dataclass(frozen=True)
class UniversalOptions(TagOptions):
    moments: str = setting(
        "source",
        "source (default: the source's, or zeros at step 0 where it has none) or none",
        choices=("source", "none"),
    )
    param_groups: int = setting(PARAM_GROUPS, f"how many groups the optimizer may have (default {PARAM_GROUPS})", low=1)


class UniversalFormat(Format):
    name = NAME
    description = "latest_universal, or a folder zero/ with optimizer_state.pt (DeepSpeed universal)"
    stored_dtype = DTYPE
    stores_moments = True
    options = UniversalOptions

    def recognise(self, path: Path) -> bool:
        return (path / LATEST).is_file() or (path / "zero" / OPTIMIZER).is_file()

    def open(self, path: Path, accepted: AcceptedKeys) -> UniversalReader:
        return UniversalReader(path, accepted)

    def unsupported_moments(self, source: Reader, options: WriteOptions) -> str:
        return "moments = none" if self.parse_options(options.extra).moments == "none" else ""

    def write(self, source: Reader, output: Output, options: WriteOptions) -> None:
        """Writes a folder per parameter, then the state files that DeepSpeed's loader requires."""
        format_options = self.parse_options(options.extra)
        tag = format_options.folder(source.step)
        with_moments = format_options.moments != "none"
        # Zero moments go with step 0, as Adam corrects their bias by the step.
        step = source.step if source.has_moments else 0
        step_tensor = LazyTensor((), torch.float32, lambda: torch.tensor(float(step)))
        model_record.write(source, output)
        for stored in fused_tensors.stored_tensors(source.arch, source.model_config, "mcore").values():
            folder = f"{tag}/zero/{stored.name}"
            metadata = _sharding_metadata(stored)
            output.write_torch(f"{folder}/{FILES[WEIGHT]}", {"param": lazy_tensor(source, stored), **metadata})
            for kind in MOMENTS if with_moments else ():
                moment = (
                    lazy_tensor(source, stored, kind)
                    if source.has_moments
                    else LazyTensor(stored.shape(source.model_config), DTYPE, None)
                )
                output.write_torch(f"{folder}/{FILES[kind]}", {"param": moment, **metadata})
            if with_moments:
                output.write_torch(f"{folder}/{STEP_FILE}", step_tensor)
        output.write_torch(
            f"{tag}/zero/{OPTIMIZER}",
            {
                # Without clip_grad and hyperparameters, which would overwrite the run's own.
                "ds_version": DS_VERSION,
                "param_groups": [{} for _ in range(format_options.param_groups)],
                "optimizer_state_dict": {"state": {0: {"step": step_tensor}}, "param_groups": [{}]},
                **({SETTINGS: [dict(group) for group in source.groups]} if with_moments and source.has_moments else {}),
            },
        )
        # The state of DeepSpeed's schedulers after these steps. Its loader requires it if a run has a scheduler.
        scheduler = {"last_batch_iteration": step - 1}
        state = {"dp_world_size": 1, "mp_world_size": 1, "global_steps": step, "skipped_steps": 0}
        for name in STATES:
            output.write_torch(f"{tag}/{name}", {**state, "lr_scheduler": scheduler})
        # Written last: without it, DeepSpeed sees no checkpoint.
        output.write_text(LATEST, tag)
