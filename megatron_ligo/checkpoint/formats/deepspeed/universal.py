"""DeepSpeed's universal checkpoint: each parameter whole in a folder of its own name, for any layout and ZeRO stage.

    DIR/latest_universal                      the tag
    DIR/TAG/mp_rank_00_model_states.pt        metadata for ZeRO 1 and 2 (and zero_pp_rank_0_... for ZeRO 3)
    DIR/TAG/zero/optimizer_state.pt
    DIR/TAG/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt
    DIR/dims.json, manifest.json              ours; DeepSpeed does not look at them

The settings of Adam's groups are noted where DeepSpeed does not look, so that a run keeps its own.
NAME is Megatron-core's. Weights are fp32, as the format defines it; casting bf16 up is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.arch.spec import Pack
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.format import Format, WriteOptions
from megatron_ligo.checkpoint.formats.deepspeed.latest_tag import TagOptions, find_tag_folder
from megatron_ligo.checkpoint.formats.deepspeed.rank_files import STAND_INS
from megatron_ligo.checkpoint.io import adam_groups, torch_files
from megatron_ligo.checkpoint.io.file_layout import LazyTensor
from megatron_ligo.checkpoint.io.output import Output, lazy_tensor
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT, Reader, TensorInfo
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.config.typed_toml import setting
from megatron_ligo.sharding import fused_tensors

NAME = "universal"
DTYPE = torch.float32

LATEST = "latest_universal"
OPTIMIZER = "optimizer_state.pt"
STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
FILES = {WEIGHT: "fp32.pt", **{kind: f"{kind}.pt" for kind in MOMENTS}}
# The version whose loader this was tried with; it is noted in the file, not asked for.
DS_VERSION = "0.19.8"
# DeepSpeed pairs these with the optimizer's groups and leaves those unloaded that have no partner.
PARAM_GROUPS = 8
# Ours, and no `param_groups`: DeepSpeed would put those, by their order, in the place of the run's own settings.
SETTINGS = "settings_of_source"


class UniversalReader(Reader):
    """Canonical tensors out of the parameters' folders, each mapped."""

    format = NAME

    def __init__(self, path: Path):
        self.path = path
        self._tag = find_tag_folder(path, LATEST)
        if not (self._tag / "zero").is_dir():
            raise CheckpointError(Problem(f"{self._tag}", "a folder zero/", "none"))
        root = path if model_record.find_record(path) else self._tag.parent
        self.model_config, self.carried = model_record.read(root)
        self.files = model_record.find_carried_files(root)
        steps = self._global_steps()
        stored = fused_tensors.stored_tensors(self.arch, self.model_config, "mcore")
        self._tensors = self._check(stored)
        optimizer = self._optimizer() if self._moments else {}
        self.step = self._adam_steps(next(iter(stored)), optimizer, steps) if self._moments else steps
        self.groups = adam_groups.read_settings(optimizer.get("param_groups")) or adam_groups.read_settings(
            optimizer.get(SETTINGS)
        )
        self._items = {key: item for item in stored.values() for key in item.keys}

    @property
    def has_moments(self) -> bool:
        return self._moments

    def info(self, key: str) -> TensorInfo:
        return TensorInfo(self.param(key).shape(self.model_config), self._tensors[self._items[key].name].dtype)

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        item = self._items[key]
        tensor = self._tensors[item.name] if kind == WEIGHT else self._load(item, kind)
        return item.extract(tensor, key, self.model_config)

    def _global_steps(self) -> int:
        for path in (self._tag / name for name in STATES):
            if path.is_file():
                state = torch_files.load(path)
                step = state.get("global_steps") if isinstance(state, dict) else None
                if type(step) is not int or step < 0:
                    raise CheckpointError(Problem(f"{path}", "global_steps, a count", repr(step)))
                return step
        raise CheckpointError(Problem(f"{self._tag}", " or ".join(STATES), "neither"))

    def _optimizer(self) -> dict:
        """What belongs to no parameter."""
        path = self._tag / "zero" / OPTIMIZER
        found = torch_files.load(path, STAND_INS) if path.is_file() else {}
        return found if isinstance(found, dict) else {}

    def _adam_steps(self, name: str, optimizer: dict, otherwise: int) -> int:
        """Adam's own count, not the engine's: beside a parameter, or (from ZeRO 3) for all of them."""
        zero = self._tag / "zero"
        if (zero / name / "step.pt").is_file():
            step = torch_files.load(zero / name / "step.pt")
        else:
            try:
                step = optimizer["optimizer_state_dict"]["state"][0]["step"]
            except (KeyError, TypeError, IndexError):
                return otherwise
        count = adam_groups.parse_step(step)
        if count is None:
            raise CheckpointError(Problem(f"{zero}", "a count of Adam's steps", repr(step)))
        return count

    def _check(self, stored: dict[str, fused_tensors.StoredTensor]) -> dict[str, Tensor]:
        """Every parameter's folder with a tensor of its shape, all or no moments, and no other folder."""
        errors = ErrorCollector(f"{self._tag} does not hold the model of its sizes", CheckpointError)
        tensors = {}
        for name, item in stored.items():
            try:
                tensors[name] = self._load(item, WEIGHT)
            except CheckpointError as error:
                for problem in error.problems:
                    errors.add_message(problem)
        zero = self._tag / "zero"
        found = {folder.name for folder in zero.iterdir() if folder.is_dir()}
        for name in sorted(found - set(stored)):
            errors.add(name, "no such parameter", "a folder")
        moments = {name: [(zero / name / FILES[kind]).is_file() for kind in MOMENTS] for name in stored}
        self._moments = all(all(there) for there in moments.values())
        if not self._moments:
            for name in (name for name, there in moments.items() if any(there)):
                errors.add(name, "both moments for all parameters, or none", "some")
        errors.raise_if_any(tensors.items)
        return tensors

    def _load(self, item: fused_tensors.StoredTensor, kind: str) -> Tensor:
        path = self._tag / "zero" / item.name / FILES[kind]
        state = torch_files.load(path)
        tensor = state.get("param") if isinstance(state, dict) else state
        shape = item.shape(self.model_config)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise CheckpointError(Problem(f"{path}", "a tensor of floating-point numbers", type(tensor).__name__))
        # What DeepSpeed makes of ZeRO 3 is flat.
        if tensor.shape != shape and not (tensor.dim() == 1 and tensor.numel() == torch.Size(shape).numel()):
            raise CheckpointError(Problem(f"{path}", f"shape {shape}", tuple(tensor.shape)))
        return tensor.reshape(shape)


def _cut(item: fused_tensors.StoredTensor) -> dict:
    """How tensor parallelism cuts a parameter, in the words of DeepSpeed's loader."""
    found: dict[str, object] = {}
    if item.tp_dim is not None:
        found["cat_dim"] = item.tp_dim
    if item.pack is Pack.STACKED:
        found["param_n_sub_params"] = len(item.keys)
    if item.is_vocab_parallel:
        found["vocab_tensor"] = True
    return found


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

    def open(self, path: Path) -> UniversalReader:
        return UniversalReader(path)

    def unsupported_moments(self, source: Reader, options: WriteOptions) -> str:
        return "moments = none" if self.parse_options(options.extra).moments == "none" else ""

    def write(self, source: Reader, output: Output, options: WriteOptions) -> None:
        """Every parameter in a folder of its own, then what DeepSpeed asks for besides."""
        own = self.parse_options(options.extra)
        tag = own.folder(source.step)
        moments = own.moments != "none"
        step = source.step if source.has_moments else 0
        # Fresh moments belong to a fresh count: Adam corrects its bias by it.
        count = LazyTensor((), torch.float32, lambda: torch.tensor(float(step)))
        model_record.write(source, output)
        for item in fused_tensors.stored_tensors(source.arch, source.model_config, "mcore").values():
            folder = f"{tag}/zero/{item.name}"
            output.write_torch(f"{folder}/{FILES[WEIGHT]}", {"param": lazy_tensor(source, item), **_cut(item)})
            for kind in MOMENTS if moments else ():
                made = (
                    lazy_tensor(source, item, kind)
                    if source.has_moments
                    else LazyTensor(item.shape(source.model_config), DTYPE, None)
                )
                output.write_torch(f"{folder}/{FILES[kind]}", {"param": made, **_cut(item)})
            if moments:
                output.write_torch(f"{folder}/step.pt", count)
        output.write_torch(
            f"{tag}/zero/{OPTIMIZER}",
            {
                # No clip_grad, no hyperparameters: they would overwrite the run's own.
                "ds_version": DS_VERSION,
                "param_groups": [{} for _ in range(own.param_groups)],
                "optimizer_state_dict": {"state": {0: {"step": count}}, "param_groups": [{}]},
                **({SETTINGS: [dict(group) for group in source.groups]} if moments and source.has_moments else {}),
            },
        )
        # What DeepSpeed's own schedulers note after so many steps; it asks for it wherever a run has a scheduler.
        scheduler = {"last_batch_iteration": step - 1}
        state = {"dp_world_size": 1, "mp_world_size": 1, "global_steps": step, "skipped_steps": 0}
        for name in STATES:
            output.write_torch(f"{tag}/{name}", {**state, "lr_scheduler": scheduler})
        # Last: DeepSpeed takes a folder without it for none.
        output.write_text(LATEST, tag)
