"""A run's settings: typed sections, read from a TOML file and `--set section.key=value`.

`RunConfig.load` is the only way in. Every unknown name, wrong type and value out of range is reported, all in one
ConfigError. None of the values is changed, so `to_dict` says what the user said, with the defaults filled in.
"""

# ruff: noqa: RUF009 (`setting` gives a dataclass field)

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_ligo.common.atomic_files import read_text
from megatron_ligo.common.errors import ConfigError, ErrorCollector, did_you_mean
from megatron_ligo.config.typed_toml import read_section, setting

TextBySpace = dict[str, str]
HANDOFF_FORMATS = ("universal", "hf")
SOURCE_PLACEMENTS = ("divided", "whole")
POSITION_INITS = ("tile", "mean", "random")
MOMENT_POLICIES = ("reset", "grow", "old")
T = TypeVar("T")


@dataclass(frozen=True)
class SmallSection:
    path: str = setting("", "checkpoint of the small model (a file or a folder)")
    format: str = setting("auto", "its format, or auto to find out")


@dataclass(frozen=True)
class LargeSection:
    num_layers: int | None = setting(None, "layers of the large model; left out: as the small one", low=1)
    hidden_size: int | None = setting(None, "residual features; left out: as the small one", low=1)
    ffn_size: int | None = setting(None, "feed-forward neurons; left out: as the small one", low=1)
    num_heads: int | None = setting(None, "query heads; left out: as the small one", low=1)
    num_kv_heads: int | None = setting(None, "key and value heads; left out: as the small one", low=1)
    head_dim: int | None = setting(None, "features of a head; left out: as the small one", low=1)
    vocab_size: int | None = setting(None, "rows of the vocabulary (labels); left out: as the small one", low=1)
    max_positions: int | None = setting(None, "positions, rows of their table if learned; left out: as small", low=1)
    image_size: int | None = setting(None, "pixels of a side: positions are interpolated; left out: as before", low=1)


@dataclass(frozen=True)
class OperatorSection:
    """Maps' keys are one value, or a table by space: {default = "lossless", ffn = "copy"}.

    None: as the method has it (growth/methods.py).
    """

    method: str = setting("lossless", "named method; the other keys are put over what it means")
    width_init: str | TextBySpace | None = setting(None, "named initialisation of the width maps")
    depth_init: str | TextBySpace | None = setting(None, "named initialisation of the depth maps")
    noise: float | dict[str, float] | None = setting(None, "put on top, relative to the maps' own scale", low=0.0)
    structure: str | TextBySpace | None = setting(
        None, "the heads' spaces: whole heads move, or dense", choices=("heads", "dense")
    )
    share: str | TextBySpace | None = setting(
        None, "one map for all layers, or one for each large layer", choices=("all", "layer")
    )
    contract: str | TextBySpace | None = setting(
        None, "readers: the transposed map, or a map of their own", choices=("tied", "free")
    )
    identity: str | TextBySpace | None = setting(
        None, "rows that copy the small model: kept, or learned", choices=("frozen", "learned")
    )
    gain: str | TextBySpace | None = setting(
        None, "norm gains: of the copied feature, or by the map", choices=("copied", "expand")
    )
    fresh: str | None = setting(
        None, "drawn where width_init and depth_init are pad", choices=("none", "writers", "all")
    )
    borrow: str | None = setting(None, "new features' rows: of the next layer", choices=("none", "next"))
    vocab_noise: float = setting(0.0, "new tokens around the mean token, relative to the tokens' spread", low=0.0)
    position_init: str = setting(
        "tile", "new learned positions: the old ones in turn, their mean, or around it", choices=POSITION_INITS
    )
    rank: int | dict[str, int] = setting(0, "maps learned as start + U V of this rank; 0: whole", low=0)
    seed: int = setting(1234, "seed of the initialisation", low=0)

    def check_spaces(self, spaces: Iterable[str]) -> None:
        """ConfigError if a table names a space (or another name given by the caller) that the model does not have."""
        spaces = sorted(spaces)
        errors = ErrorCollector("config [operator]", ConfigError)
        for key, value in asdict(self).items():
            for name in value if isinstance(value, dict) else ():
                if name != "default" and name not in spaces:
                    errors.add(
                        f"operator.{key}.{name}", "a space of this model", repr(name), did_you_mean(name, spaces)
                    )
        errors.raise_if_any()


def value_for_space(value: T | Mapping[str, T], space: str) -> T:
    """The value of an [operator] key for one space."""
    if isinstance(value, Mapping):
        return value[space] if space in value else value["default"]
    return value


@dataclass(frozen=True)
class ParallelSection:
    tp: int = setting(1, "tensor-parallel ranks", low=1)
    pp: int = setting(1, "pipeline stages", low=1)
    zero: int = setting(1, "ZeRO stage (1 under a pipeline)", low=1, high=3)
    sequence_parallel: bool = setting(False, "activations outside attention and ffn split over the tp ranks")
    ds_config: str = setting("", "DeepSpeed profile; empty: ds_configs/zero{zero}.json")


@dataclass(frozen=True)
class TrainingSection:
    """What fitting and pretraining have in common."""

    steps: int = setting(100, "optimizer steps of the whole run", low=0)
    optimizer: str = setting("adamw", "optimizer", choices=("adamw", "sgd"))
    lr: float = setting(1e-3, "learning rate after the warm-up", low=0.0)
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW's betas", low=0.0, below=1.0)
    eps: float = setting(1e-8, "AdamW's eps", above=0.0)
    weight_decay: float = setting(0.0, "decoupled weight decay", low=0.0)
    clip: float = setting(1.0, "largest norm of the gradient; 0: no clipping", low=0.0)
    warmup_steps: int = setting(5, "steps of linear warm-up", low=0)
    schedule: str = setting("linear", "after the warm-up", choices=("constant", "linear", "cosine"))
    min_lr: float = setting(0.0, "learning rate at the last step", low=0.0)
    global_batch_size: int = setting(8, "sequences a step, over all ranks", low=1)
    micro_batch_size: int = setting(1, "sequences a rank runs at once", low=1)
    precision: str = setting("fp32", "of weights and activations", choices=("fp32", "bf16"))
    recompute: bool = setting(False, "recompute activations in the backward pass")
    save_every: int = setting(50, "steps between checkpoints; 0: only at the end", low=0)
    eval_samples: int = setting(8, "held-out sequences of an evaluation", low=1)
    seed: int = setting(1234, "seed of everything random in the run but the data's order", low=0)
    keep_last: int = setting(2, "checkpoints kept", low=1)
    timeout_minutes: float = setting(10.0, "how long ranks wait for one another", above=0.0)
    grace_seconds: float = setting(25.0, "from SIGTERM or SIGINT to the end: the step and the save", above=0.0)
    bad_numbers: str = setting("stop", "NaN, Inf or a spike: stop, or skip and go on", choices=("stop", "skip"))
    spike: float = setting(4.0, "a loss so many times the last 20's median is one; 0: none is", low=0.0)
    check_replicas_every: int = setting(50, "steps between comparisons of the ranks' copies; 0: never", low=0)
    parallel: ParallelSection = field(default_factory=ParallelSection)


@dataclass(frozen=True)
class FitSection(TrainingSection):
    lr: float = setting(1e-5, "learning rate of the width maps after the warm-up", low=0.0)
    source: str = setting(
        "divided",
        "the small weights: cut over the ranks that read them all, or whole on each",
        choices=SOURCE_PLACEMENTS,
    )
    depth_lr: float | None = setting(1e-4, "learning rate of the depth maps", low=0.0)
    distill: float = setting(0.0, "part of the loss that is the divergence from the small model", low=0.0, high=1.0)
    lag: str = setting("", "checkpoint of the start after some training: fit on the loss after it; empty: at once")
    eval_every: int = setting(0, "steps between held-out evaluations; 0: at the start and the end", low=0)
    patience: int = setting(0, "evaluations without a new best that end the fit; 0: none do", low=0)
    keep: str = setting(
        "best", "operator that is written, by its held-out loss: best or last", choices=("best", "last")
    )
    max_flops: float | None = setting(None, "ends the fit before it would cost more; left out: never", above=0.0)


@dataclass(frozen=True)
class PretrainSection(TrainingSection):
    start: str = setting("", "folder of a hand-off (universal checkpoint); empty: from scratch")
    fresh_head: bool = setting(False, "give a start without an output head a fresh one, and train nothing else")
    lr: float = setting(3e-4, "learning rate after the warm-up", low=0.0)
    weight_decay: float = setting(0.1, "decoupled weight decay", low=0.0)
    eval_every: int = setting(0, "steps between evaluations; 0: at the start and the end", low=0)
    grown_peak: float = setting(0.5, "peak learning rate from a hand-off, as a part of lr", above=0.0)
    grown_warmup_steps: int | None = setting(None, "warm-up from a hand-off; left out: warmup_steps", low=0)
    first_sample: int = setting(0, "training sample that step 0 begins with: skip those that a fit has read", low=0)


@dataclass(frozen=True)
class HandoffSection:
    dtype: str = setting("fp32", "of the weights written", choices=("fp32", "bf16"))
    moments: str = setting(
        "reset", "Adam's: begin anew, grow with the weights, or so for old features only", choices=MOMENT_POLICIES
    )
    formats: tuple[str, ...] = setting(HANDOFF_FORMATS, "what is written", choices=HANDOFF_FORMATS)
    timeout_minutes: float = setting(60.0, "how long processes that share the work wait for one another", above=0.0)


@dataclass(frozen=True)
class DataSection:
    train: tuple[str | float, ...] = setting(
        (), "prefixes of .bin/.idx pairs, or weight, prefix, ...; images: their files", above=0.0
    )
    valid: tuple[str | float, ...] = setting((), "held-out prefixes, in the same form", above=0.0)
    seq_length: int = setting(256, "tokens of a sequence", low=1)
    seed: int = setting(1234, "seed of the order of the samples", low=0)
    tokenizer: str = setting("", "folder of the tokenizer the data were made with")
    cache: str = setting("", "folder of the sample indices; empty: OUTPUT/data_cache")
    mask_rate: float = setting(0.15, "encoders: share of a sample's tokens that is to be told", above=0.0, below=1.0)
    mask_token: int | None = setting(None, "encoders: id of the mask token; left out: the tokenizer's", low=0)
    ends: tuple[int, ...] | None = setting(
        None, "encoders: ids around each sample, which is of segment 0, or []; left out: the tokenizer's", low=0
    )
    special_tokens: tuple[int, ...] = setting((), "encoders: more ids that are never masked", low=0)
    pixel_mean: tuple[float, ...] = setting((0.5,), "images: taken from pixels of 0 to 1; one, or one a channel")
    pixel_std: tuple[float, ...] = setting((0.5,), "images: what pixels are divided by afterwards", above=0.0)


@dataclass(frozen=True)
class RunConfig:
    small: SmallSection = field(default_factory=SmallSection)
    large: LargeSection = field(default_factory=LargeSection)
    operator: OperatorSection = field(default_factory=OperatorSection)
    fit: FitSection = field(default_factory=FitSection)
    handoff: HandoffSection = field(default_factory=HandoffSection)
    pretrain: PretrainSection = field(default_factory=PretrainSection)
    data: DataSection = field(default_factory=DataSection)

    @classmethod
    def load(cls, path: str | Path | None, sets: Iterable[str] = ()) -> RunConfig:
        """The config of a TOML file (None: the defaults) with `section.key=value` settings put over it in order."""
        title = f"config {path}" if path else "config"
        errors = ErrorCollector(title, ConfigError)
        table = read_toml(Path(path)) if path else {}
        for text in sets:
            apply_setting(table, text, errors)
        return cls._build(table, errors)

    @classmethod
    def from_dict(cls, table: dict, where: str = "config") -> RunConfig:
        """The config that `to_dict` gave (from a run's record)."""
        return cls._build(table, ErrorCollector(where, ConfigError))

    @classmethod
    def _build(cls, table: dict, errors: ErrorCollector) -> RunConfig:
        config = read_section(cls, table, errors)
        _check_dependencies(config, errors)
        errors.raise_if_any()
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain nested tables, as JSON would give them back (lists, None for what was left out)."""
        return json.loads(json.dumps(asdict(self)))


def read_toml(path: Path) -> dict:
    try:
        return tomllib.loads(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"config {path}: expected a TOML file, found nothing there. Check --config.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config {path}: expected TOML, found a fault in it: {error}.") from None


def apply_setting(table: dict, text: str, errors: ErrorCollector) -> None:
    """Puts `section.key=value` into the table; the value is TOML, or a bare word that stands for text."""
    name, equals, raw = text.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not sections or not all([*sections, key]):
        errors.add("--set", "section.key=value", repr(text), "For example: --set fit.steps=20")
        return
    try:
        value = tomllib.loads(f"value = {raw.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            errors.add(f"--set {name}", "a section or a table", repr(table), f"{section!r} is already one value.")
            return
    table[key] = value


def _check_dependencies(config: RunConfig, errors: ErrorCollector) -> None:
    for key, value in asdict(config.operator).items():
        if isinstance(value, dict) and "default" not in value:
            errors.add(f"operator.{key}", "a table with a default", f"{value}", 'Add default = "..." to it.')
    for name in ("fit", "pretrain"):
        _check_training(name, getattr(config, name), errors)
    for name in ("train", "valid"):
        _check_blend(f"data.{name}", getattr(config.data, name), errors)


def _check_training(name: str, run: TrainingSection, errors: ErrorCollector) -> None:
    if run.global_batch_size % run.micro_batch_size:
        found = f"{run.global_batch_size} over micro_batch_size {run.micro_batch_size}"
        errors.add(f"{name}.global_batch_size", "a multiple of micro_batch_size", found)
    if run.min_lr > run.lr:
        errors.add(f"{name}.min_lr", f"at most lr = {run.lr}", run.min_lr)
    layout = run.parallel
    if layout.pp > 1 and layout.zero > 1:
        hint = "DeepSpeed's pipeline takes ZeRO 1 only: set zero = 1, or pp = 1."
        errors.add(f"{name}.parallel.zero", f"1 with pp = {layout.pp}", layout.zero, hint)
    if layout.sequence_parallel and layout.tp == 1:
        errors.add(f"{name}.parallel.sequence_parallel", "false with tp = 1", "true", "Raise tp, or leave it out.")


def _check_blend(where: str, blend: tuple[str | float, ...], errors: ErrorCollector) -> None:
    weighted = len(blend) % 2 == 0 and all(
        isinstance(entry, str) == bool(index % 2) for index, entry in enumerate(blend)
    )
    if not weighted and not all(isinstance(entry, str) for entry in blend):
        errors.add(
            where, "prefixes only, or weight and prefix in turn", list(blend), 'For example: [0.3, "a", 0.7, "b"].'
        )
