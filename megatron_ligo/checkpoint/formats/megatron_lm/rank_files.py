"""The files of a Megatron-LM checkpoint by rank: all there, mapped, nothing executed, their names made today's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

from megatron_ligo.checkpoint.formats.megatron_core.tensor_names import local_name
from megatron_ligo.checkpoint.formats.megatron_lm import arguments, rank_optimizer
from megatron_ligo.checkpoint.io import adam_groups, torch_files
from megatron_ligo.checkpoint.reader import MOMENTS
from megatron_ligo.common.errors import CheckpointError, ErrorCollector

FILE = "model_optim_rng.pt"
# Where the optimizer had files of its own.
OLD_FILE = "model_rng.pt"
OPTIMIZERS = ("distrib_optim.pt", "optim.pt")
BUFFERS = "a distributed one's, whose buffers name no parameters: save it with --ckpt-format torch_dist"
FOLDER = re.compile(r"mp_rank_(?P<tp>\d{2,4})(?:_(?P<pp>\d{3,5}))?")
LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")
# Before, query, key and value lay in another order.
FIRST_VERSION = 2.0
# More ranks than this beyond the files that are there are a lie, not a loss.
LOST = 1000
IGNORED = ("*_extra_state", "*inv_freq")
# Names of the years before Megatron-core, and today's. In this order.
OLD_NAMES = {
    "language_model.embedding.": "embedding.",
    "language_model.encoder.": "decoder.",
    "language_model.transformer.": "decoder.",
    "language_model.output_layer.": "output_layer.",
    "word_embeddings_for_head.": "output_layer.",
    ".attention.": ".self_attention.",
    ".query_key_value.": ".linear_qkv.",
    ".self_attention.dense.": ".self_attention.linear_proj.",
    ".dense_h_to_4h.": ".linear_fc1.",
    ".dense_4h_to_h.": ".linear_fc2.",
    ".input_norm.": ".input_layernorm.",
    ".post_attention_norm.": ".pre_mlp_layernorm.",
    ".post_attention_layernorm.": ".pre_mlp_layernorm.",
    ".final_norm.": ".final_layernorm.",
}


def rank_file(tp: int, pp: int, stages: int) -> str:
    """Where a rank's file lies in an iteration's folder."""
    return f"mp_rank_{tp:02d}{f'_{pp:03d}' if stages > 1 else ''}/{FILE}"


def is_saved(folder: Path) -> bool:
    """True where a folder holds such files."""
    return folder.is_dir() and any(FOLDER.fullmatch(path.name) and _file(path) for path in folder.iterdir())


def _file(folder: Path) -> Path | None:
    return next((folder / name for name in (FILE, OLD_FILE) if (folder / name).is_file()), None)


class RankFiles:
    """An iteration's folder, its files loaded (mapped).

    tensors: global name -> what each tensor-parallel rank stores. args: the run's arguments (None: none kept).
    `take_optimizers` adds moments (by kind, as tensors; {} where there are none), the optimizer's count of steps, the
    settings of its groups, and left: why its state is not read.
    Raises CheckpointError with all faults of the files themselves.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._faults = ErrorCollector(f"{folder} is no whole checkpoint of Megatron-LM", CheckpointError)
        files = self._find()
        self.tp, self.pp = (max((rank[i] for rank in files), default=-1) + 1 for i in (0, 1))
        if self.tp * self.pp > len(files) + LOST:
            self._faults.add("ranks", f"{self.tp} x {self.pp} files, as their names say", f"{len(files)} files")
            self._faults.raise_if_any()
        for rank in ((tp, pp) for pp in range(self.pp) for tp in range(self.tp)):
            if rank not in files:
                self._faults.add(rank_file(*rank, self.pp), "a file", "nothing there", "Fetch it again.")
        self._faults.raise_if_any()
        states = {rank: self._load(path) for rank, path in sorted(files.items())}
        self._faults.raise_if_any()
        first = states[0, 0]
        self.args, self.step = first.get("args"), first.get("iteration", 0)
        if type(self.step) is not int or self.step < 0:
            self._faults.add("iteration", "a count", repr(self.step))
        self.num_layers = 0
        self.tensors: dict[str, list[Tensor]] = {}
        self.moments: dict[str, dict[str, list[Tensor]]] = {}
        self.groups: tuple[Mapping[str, object], ...] = ()
        self.left = ""
        self._optimizers = {rank: state.get("optimizer") for rank, state in states.items()}
        self._models = {rank: self._model(state, rank_file(*rank, self.pp)) for rank, state in states.items()}
        self._places: dict[str, tuple[int, str]] = {}
        for stage in range(self.pp):
            self._add([self._models[tp, stage] for tp in range(self.tp)], stage)
        self._faults.raise_if_any()

    def take_optimizers(self, errors: ErrorCollector) -> None:
        """Masters take the place of the weights, the moments come beside them: all ranks' or none."""
        if any(any(self.folder.glob(f"mp_rank_*/{name}")) for name in OPTIMIZERS):
            self.left = BUFFERS
            return
        kept = {
            rank: rank_optimizer.read_rank_optimizer(self._optimizers[rank], model, rank_file(*rank, self.pp), errors)
            for rank, model in self._models.items()
        }
        self.left = next((state.unsupported for state in kept.values() if state.unsupported), "")
        for what in () if self.left else ("masters", "moments"):
            without = [rank_file(*rank, self.pp) for rank, one in kept.items() if not getattr(one, what)]
            if 0 < len(without) < len(kept):
                errors.add(what, "all ranks', or none", f"none in {', '.join(without)}")
        steps = {one.step for one in kept.values() if one.moments} - {None}
        if len(steps) > 1:
            errors.add("step", "one count of Adam's steps on all ranks", sorted(steps))
        if self.left or errors.problems:
            return
        if steps:
            (self.step,) = steps
            self.groups = adam_groups.read_settings([group for one in kept.values() for group in one.param_groups])
            self.moments = {kind: {} for kind in MOMENTS}
        for known, (stage, name) in self._places.items():
            held = [kept[tp, stage] for tp in range(self.tp)]
            pieces = zip(held, self.tensors[known], strict=True)
            self.tensors[known] = [one.masters.get(name, weight) for one, weight in pieces]
            for kind, moments in self.moments.items():
                moments[known] = [one.moments[kind][name] for one in held]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """What each rank stores of floating-point numbers, with its name."""
        for name, held in self.tensors.items():
            for rank, tensor in enumerate(held):
                if tensor.is_floating_point():
                    yield f"{name} (rank {rank})", tensor

    def check(self, name: str, shape: tuple[int, ...], errors: ErrorCollector) -> None:
        """Adds a fault if a tensor is missing, or has another shape or dtype on any rank."""
        if name not in self.tensors:
            errors.add(name, "a tensor", "none")
            return
        first = self.tensors[name][0].dtype
        for rank, tensor in enumerate(self.tensors[name]):
            if tuple(tensor.shape) != shape:
                errors.add(f"{name} (rank {rank})", f"shape {shape}", tuple(tensor.shape))
            if not tensor.is_floating_point() or tensor.dtype.itemsize == 1 or tensor.dtype != first:
                errors.add(f"{name} (rank {rank})", "floating-point numbers of one dtype", tensor.dtype)

    def _find(self) -> dict[tuple[int, int], Path]:
        found: dict[tuple[int, int], Path] = {}
        names = {}
        for folder in sorted(path for path in self.folder.iterdir() if path.name.startswith("mp_rank_")):
            match, file = FOLDER.fullmatch(folder.name), _file(folder)
            if not match or not file:
                self._faults.add(folder.name, f"mp_rank_TT or mp_rank_TT_PPP with {FILE}", "neither")
                continue
            rank = (int(match["tp"]), int(match["pp"] or 0))
            if rank in found:
                self._faults.add(folder.name, "one folder for a rank", f"{names[rank]} too")
            found[rank], names[rank] = file, folder.name
        if not found:
            self._faults.add(f"mp_rank_00/{FILE}", "a file", "nothing there")
        return found

    def _load(self, path: Path) -> dict:
        where = str(path.relative_to(self.folder))
        try:
            state = torch_files.load(path, arguments.STAND_INS)
        except CheckpointError as error:
            self._faults.problems.extend(error.problems)
            return {}
        version = state.get("checkpoint_version", 0) if isinstance(state, dict) else None
        if version is None or not isinstance(version, int | float) or version < FIRST_VERSION:
            hint = "Load and save it with a newer Megatron-LM."
            self._faults.add(where, f"checkpoint_version of {FIRST_VERSION} or later", repr(version), hint)
        elif not isinstance(state.get("model"), dict):
            found = "model0: an interleaved pipeline's" if "model0" in state else type(state.get("model")).__name__
            self._faults.add(where, "model, a dict of tensors", found, "Save it without --num-layers-per-virtual-*.")
        return state if isinstance(state, dict) else {}

    def _model(self, state: dict, where: str) -> dict[str, Tensor]:
        found = {}
        flat = dict(_flat(state["model"]))
        old = any(name.startswith(tuple(OLD_NAMES)) for name in flat)
        for name, value in flat.items():
            if any(fnmatchcase(name, pattern) for pattern in IGNORED):
                continue
            if not isinstance(value, Tensor):
                self._faults.add(f"{name} ({where})", "a tensor", type(value).__name__)
                continue
            known = local_name(_todays(name) if old else name)
            if known in found:
                self._faults.add(f"{name} ({where})", "one tensor of that name", "two")
            found[known] = value
        return found

    def _add(self, models: list[dict[str, Tensor]], stage: int) -> None:
        """The tensors of a stage, with its layers numbered after those of the stages before."""
        names = {name: None for model in models for name in model}
        layers = {int(match[2]) for match in map(LAYER.fullmatch, names) if match}
        if layers != set(range(len(layers))):
            self._faults.add(f"stage {stage}", f"layers 0 to {len(layers) - 1}", sorted(layers))
        for name in names:
            held = [model.get(name) for model in models]
            missing = [rank for rank, tensor in enumerate(held) if tensor is None]
            if missing:
                self._faults.add(f"{name} (stage {stage})", "a tensor on every rank", f"none on {missing}")
                continue
            match = LAYER.fullmatch(name)
            known = f"{match[1]}{int(match[2]) + self.num_layers}{match[3]}" if match else name
            if known in self.tensors:
                self._faults.add(f"{name} (stage {stage})", "one stage that holds it", "two")
            self.tensors[known] = held
            self._places[known] = (stage, name)
        self.num_layers += len(layers)


def _flat(tree: Mapping, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    """Names joined by dots. Old files nest dicts, a few deep."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and depth < 4:
            yield from _flat(value, f"{prefix}{name}.", depth + 1)
        else:
            yield f"{prefix}{name}", value


def _todays(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name
