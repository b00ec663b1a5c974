"""The settings of a run: typed sections, read from a TOML file and from `--set section.key=value`.

`RunConfig.load` reports every unknown key, wrong type and value out of range in one ConfigError. Values are stored as
given, so `to_dict` returns the user's settings with the defaults filled in.
"""

# ruff: noqa: RUF009 (`setting` returns a dataclass field)

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from megatron_ligo.common.errors import ConfigError, ErrorCollector, did_you_mean
from megatron_ligo.common.hub_models import add_config_folder
from megatron_ligo.config.toml_tables import apply_setting, read_toml
from megatron_ligo.config.typed_toml import field_types, read_section, setting

TextBySpace = dict[str, str]
HANDOFF_FORMATS = ("universal", "hf")
SOURCE_PLACEMENTS = ("divided", "whole")
# pretrain.start for fresh weights.
SCRATCH = "scratch"
POSITION_INITS = ("tile", "mean", "random")
# The name in operator.fresh_scale of the tables that begin the residual stream.
EMBEDDING = "embedding"
TRACKERS = ("csv", "wandb", "mlflow", "comet")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
MOMENT_POLICIES = ("reset", "grow", "old")
T = TypeVar("T")


@dataclass(frozen=True)
class SmallSection:
    path: str = setting("", "checkpoint of the small model (file or folder)")
    format: str = setting("auto", "format of that checkpoint; auto: detected")
    accept: tuple[str, ...] = setting((), "keys of its config to accept that this program does not know")


@dataclass(frozen=True)
class LargeSection:
    """The large model's sizes. A key that is unset has the small model's value."""

    num_layers: int | None = setting(None, "transformer layers; unset: as in the small model", low=1)
    hidden_size: int | None = setting(None, "width of the residual stream; unset: as in the small model", low=1)
    ffn_size: int | None = setting(None, "width of the feed-forward layers, or of one expert; unset: as is", low=1)
    num_heads: int | None = setting(None, "query heads; unset: as in the small model", low=1)
    num_kv_heads: int | None = setting(None, "key-value heads; unset: as in the small model", low=1)
    head_dim: int | None = setting(None, "features per head; unset: as in the small model", low=1)
    vocab_size: int | None = setting(None, "vocabulary size, or labels; unset: as in the small model", low=1)
    max_positions: int | None = setting(None, "context length in tokens; unset: as in the small model", low=1)
    num_experts: int | None = setting(None, "feed-forward experts per layer; unset: as in the small model", low=1)
    top_k: int | None = setting(None, "experts that a token is routed to; unset: as in the small model", low=1)
    renormalises_routing: bool | None = setting(
        None, "divide the weights of a token's experts by their sum; unset: as in the small model"
    )
    shared_expert_ffn_size: int | None = setting(
        None, "width of the expert that every token passes; unset: as in the small model", low=1
    )
    image_size: int | None = setting(None, "image side in pixels (positions are interpolated); unset: as is", low=1)


@dataclass(frozen=True)
class OperatorSection:
    """The growth operator. Most keys take one value, or a table by space: {default = "lossless", ffn = "copy"}.

    None: the value that the method defines (growth/methods.py).
    """

    method: str = setting("lossless", "named growth method; the keys below override its values")
    width_init: str | TextBySpace | None = setting(None, "initialisation of the width maps")
    depth_init: str | TextBySpace | None = setting(None, "initialisation of the depth maps")
    noise: float | dict[str, float] | None = setting(
        None, "noise that copies cancel, relative to the maps' entries, or to the weights (noise_draw)", low=0.0
    )
    noise_draw: str | None = setting(
        None, "noise drawn for each map, at the small model's rank, or for each weight", choices=("map", "weight")
    )
    structure: str | TextBySpace | None = setting(
        None, "maps of the head spaces: whole heads move, or dense", choices=("heads", "dense")
    )
    share: str | TextBySpace | None = setting(
        None, "one map for all layers, or one per large layer", choices=("all", "layer")
    )
    contract: str | TextBySpace | None = setting(
        None, "input-side maps: tied to the transposed expand map, or free parameters", choices=("tied", "free")
    )
    identity: str | TextBySpace | None = setting(
        None, "map rows that copy the small model: frozen or learned", choices=("frozen", "learned")
    )
    gain: str | TextBySpace | None = setting(
        None, "norm gains: copied from the source feature, or mapped by expand", choices=("copied", "expand")
    )
    fresh: str | None = setting(
        None, "random weights where a map is pad: none, writers, corner (residual ones too), all",
        choices=("none", "writers", "corner", "all"),
    )  # fmt: skip
    fresh_scale: float | dict[str, float] | None = setting(
        None, "factor of corner's random weights, by the space that they write (embedding: the tables)", low=0.0
    )
    codes: str = setting("", "folder of `ligo codes`: the tokens' new features with fresh = 'corner'")
    borrow: str | None = setting(
        None, "weights of new features: from the same layer, or from the next (AKI)", choices=("none", "next")
    )
    expert_start: str | None = setting(
        None, "what a dense block becomes: copies, or the shared expert beside new ones (shared)",
        choices=("copies", "shared"),
    )  # fmt: skip
    expert_drop: float | None = setting(
        None, "share of each expert's neurons that start from new random weights (drop-upcycling)", low=0.0, high=1.0
    )
    vocab_noise: float = setting(
        0.0, "spread of new tokens around the mean embedding, relative to all tokens' spread", low=0.0
    )
    position_init: str = setting(
        "tile", "new learned positions: the table tiled, its mean, or random around the mean", choices=POSITION_INITS
    )
    rank: int | dict[str, int] = setting(0, "rank of the learned update, start + U V; 0: full rank", low=0)
    seed: int = setting(1234, "seed of the initialisation", low=0)

    def check_spaces(self, spaces: Iterable[str]) -> None:
        """Raises ConfigError if a table has an entry for anything but `default` and the names in `spaces`."""
        spaces = sorted(spaces)
        errors = ErrorCollector("config [operator]", ConfigError)
        for key, value in asdict(self).items():
            known = [*spaces, EMBEDDING] if key == "fresh_scale" else spaces
            for name in value if isinstance(value, dict) else ():
                if name != "default" and name not in known:
                    errors.add(f"operator.{key}.{name}", "a space of this model", repr(name), did_you_mean(name, known))
        errors.raise_if_any()


def value_for_space(value: T | Mapping[str, T], space: str) -> T:
    """Returns an [operator] value for one space: its own entry of a table, or the default."""
    if isinstance(value, Mapping):
        return value[space] if space in value else value["default"]
    return value


@dataclass(frozen=True)
class ParallelSection:
    tp: int = setting(1, "tensor-parallel size", low=1)
    pp: int = setting(1, "pipeline-parallel size", low=1)
    ep: int = setting(1, "expert-parallel size: data-parallel ranks that divide a layer's experts among them", low=1)
    cp: int = setting(1, "context-parallel size: ranks that share each sequence (DeepSpeed-Ulysses)", low=1)
    zero: int = setting(1, "ZeRO stage; 1 with pp > 1", low=1, high=3)
    sequence_parallel: bool = setting(False, "shard activations outside attention and FFN over the TP ranks")
    ds_config: str = setting("", "DeepSpeed config; empty: ds_configs/zero{zero}.json")


@dataclass(frozen=True)
class TrainingSection:
    """Keys that [fit] and [pretrain] share."""

    steps: int = setting(100, "optimizer steps in total; 0: only evaluate", low=0)
    optimizer: str = setting("adamw", "optimizer", choices=("adamw", "sgd"))
    lr: float = setting(1e-3, "peak learning rate, after warm-up", low=0.0)
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW betas", low=0.0, below=1.0)
    eps: float = setting(1e-8, "AdamW epsilon", above=0.0)
    weight_decay: float = setting(0.0, "decoupled weight decay", low=0.0)
    clip: float = setting(1.0, "maximum gradient norm; 0: no clipping", low=0.0)
    warmup_steps: int = setting(5, "steps of linear learning-rate warm-up", low=0)
    schedule: str = setting("linear", "learning rate after warm-up", choices=SCHEDULES)
    decay_steps: int = setting(0, "with schedule = wsd: steps of the linear decay at the end; 0: a trunk", low=0)
    min_lr: float = setting(0.0, "learning rate at the last step", low=0.0)
    global_batch_size: int = setting(8, "sequences per step, over all ranks", low=1)
    micro_batch_size: int = setting(1, "sequences per forward pass on a rank", low=1)
    precision: str = setting("fp32", "dtype of weights and activations", choices=("fp32", "bf16"))
    recompute: bool = setting(False, "recompute activations in the backward pass")
    save_every: int = setting(50, "steps between checkpoints; 0: only at the end", low=0)
    async_save: bool = setting(False, "another process writes checkpoints while the training goes on")
    eval_samples: int = setting(8, "held-out sequences per evaluation", low=1)
    seed: int = setting(1234, "seed of all random numbers except the data order", low=0)
    keep_last: int = setting(2, "number of most recent checkpoints to keep", low=1)
    timeout_minutes: float = setting(10.0, "timeout of collectives, in minutes", above=0.0)
    grace_seconds: float = setting(25.0, "seconds to finish the step and save after SIGTERM or SIGINT", above=0.0)
    bad_numbers: str = setting(
        "stop", "on NaN, Inf or an anomaly: stop, skip the step, or warn", choices=("stop", "skip", "warn")
    )
    spike: float = setting(10.0, "loss spike threshold, in deviations of recent losses; 0: no anomalies", low=0.0)
    check_replicas_every: int = setting(50, "steps between checks that replicas are equal; 0: never", low=0)
    replica_tolerance: float | None = setting(
        None, "allowed relative difference of replicas; unset: 0 on a CPU, 1e-4 (bf16 1e-2) on a GPU", low=0.0
    )
    router_aux_loss: float = setting(
        0.01, "weight of each sequence's load-balancing loss, where the model has experts", low=0.0
    )
    trackers: tuple[str, ...] = setting((), "also log each step to these", choices=TRACKERS)
    tracker_project: str = setting("megatron_ligo", "project of the run in a tracker")
    parallel: ParallelSection = field(default_factory=ParallelSection)


@dataclass(frozen=True)
class FitSection(TrainingSection):
    lr: float = setting(1e-5, "peak learning rate of the width maps, after warm-up", low=0.0)
    source: str = setting(
        "divided",
        "small weights: sharded over the ranks that share them, or whole on each",
        choices=SOURCE_PLACEMENTS,
    )
    depth_lr: float | None = setting(1e-4, "peak learning rate of the depth maps, after warm-up", low=0.0)
    distill: float = setting(0.0, "weight of the KL divergence from the small model in the loss", low=0.0, high=1.0)
    lag: str = setting("", "checkpoint trained from the start: minimise the loss after that training; empty: off")
    eval_every: int = setting(20, "steps between evaluations; 0: only at start and end", low=0)
    patience: int = setting(0, "stop after this many evaluations without improvement; 0: never", low=0)
    keep: str = setting("best", "operator to write: lowest held-out loss, or last", choices=("best", "last"))
    max_flops: float | None = setting(None, "FLOP budget: the fit ends before it; unset: no limit", above=0.0)


@dataclass(frozen=True)
class PretrainSection(TrainingSection):
    start: str = setting("", "hand-off folder, any checkpoint, or 'scratch': fresh weights at the sizes of [large]")
    codes: str = setting("", "folder of `ligo codes`: the embedding of a scratch start")
    fresh_head: bool = setting(False, "add a new output head to a headless start and train only the head")
    lr: float = setting(3e-4, "peak learning rate, after warm-up", low=0.0)
    weight_decay: float = setting(0.1, "decoupled weight decay", low=0.0)
    eval_every: int = setting(100, "steps between evaluations; 0: only at start and end", low=0)
    grown_peak: float = setting(0.5, "peak learning rate from a hand-off, as a fraction of lr", above=0.0)
    grown_warmup_steps: int | None = setting(None, "warm-up steps from a hand-off; unset: warmup_steps", low=0)
    first_sample: int = setting(0, "first training sample of step 0, to skip those that a fit has used", low=0)


@dataclass(frozen=True)
class HandoffSection:
    dtype: str = setting("fp32", "dtype of the written weights", choices=("fp32", "bf16"))
    moments: str = setting(
        "reset", "Adam moments: zero, grown, or grown for existing features only", choices=MOMENT_POLICIES
    )
    formats: tuple[str, ...] = setting(HANDOFF_FORMATS, "checkpoint formats to write", choices=HANDOFF_FORMATS)
    timeout_minutes: float = setting(60.0, "timeout between processes that share the work, in minutes", above=0.0)


@dataclass(frozen=True)
class DataSection:
    train: tuple[str | float, ...] = setting(
        (), "prefixes of .bin/.idx pairs, or weight, prefix, ...; images: safetensors files", above=0.0
    )
    valid: tuple[str | float, ...] = setting((), "held-out data, in the same form", above=0.0)
    seq_length: int = setting(256, "tokens per sequence", low=1)
    seed: int = setting(1234, "seed of the sample order", low=0)
    tokenizer: str = setting("", "tokenizer that the data were prepared with; empty: the one beside the model")
    cache: str = setting("", "folder for sample indices; empty: OUTPUT/data_cache")
    mask_rate: float = setting(0.15, "encoders: fraction of tokens to predict", above=0.0, below=1.0)
    mask_token: int | None = setting(None, "encoders: id of the mask token; unset: the tokenizer's", low=0)
    ends: tuple[int, ...] | None = setting(
        None, "encoders: first and last id of a sample (all segment 0), or []; unset: the tokenizer's", low=0
    )
    special_tokens: tuple[int, ...] = setting((), "encoders: additional ids that are never masked", low=0)
    pixel_mean: tuple[float, ...] = setting(
        (0.5,), "images: mean of pixels in [0, 1], subtracted; one, or one per channel"
    )
    pixel_std: tuple[float, ...] = setting(
        (0.5,), "images: standard deviation of pixels, divided by; one, or one per channel", above=0.0
    )


@dataclass(frozen=True)
class RunConfig:
    """All sections. stated: section.key of what the file and --set give, defaults included; no setting itself."""

    small: SmallSection = field(default_factory=SmallSection)
    large: LargeSection = field(default_factory=LargeSection)
    operator: OperatorSection = field(default_factory=OperatorSection)
    fit: FitSection = field(default_factory=FitSection)
    handoff: HandoffSection = field(default_factory=HandoffSection)
    pretrain: PretrainSection = field(default_factory=PretrainSection)
    data: DataSection = field(default_factory=DataSection)
    stated: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    @classmethod
    def load(cls, path: str | Path | None, sets: Iterable[str] = ()) -> RunConfig:
        """Reads a TOML file (None: the defaults) and applies `section.key=value` overrides in order.

        Raises ConfigError with every problem.
        """
        title = f"config {path}" if path else "config"
        errors = ErrorCollector(title, ConfigError)
        table = read_toml(Path(path)) if path else {}
        if path:
            add_config_folder(Path(path))
        for text in sets:
            apply_setting(table, text, errors)
        return cls._build(table, errors)

    @classmethod
    def from_dict(cls, table: dict, where: str = "config") -> RunConfig:
        """Restores the config that `to_dict` returned, for example from a run's record."""
        return cls._build(table, ErrorCollector(where, ConfigError))

    @classmethod
    def _build(cls, table: dict, errors: ErrorCollector) -> RunConfig:
        config = read_section(cls, table, errors)
        _check_dependencies(config, errors)
        errors.raise_if_any()
        sections = ((name, keys) for name, keys in table.items() if isinstance(keys, dict))
        stated = (f"{name}.{key}" for name, keys in sections for key, value in keys.items() if value is not None)
        return replace(config, stated=frozenset(stated))

    def states(self, section: str) -> bool:
        """True if any key of a section was given, or has another value than its default."""
        differs = getattr(self, section) != getattr(RunConfig(), section)
        return differs or any(key.startswith(f"{section}.") for key in self.stated)

    def to_dict(self) -> dict[str, Any]:
        """Returns nested tables of JSON values: lists for tuples, None for unset keys."""
        return json.loads(json.dumps({name: asdict(getattr(self, name)) for name in field_types(RunConfig)}))


def _check_dependencies(config: RunConfig, errors: ErrorCollector) -> None:
    """Adds an error for each combination of keys whose values are incompatible."""
    for key, value in asdict(config.operator).items():
        if isinstance(value, dict) and "default" not in value:
            errors.add(f"operator.{key}", "a table with a default", value, 'Add default = "...".')
    for name in ("fit", "pretrain"):
        _check_training(name, getattr(config, name), errors)
    for name in ("train", "valid"):
        _check_blend(f"data.{name}", getattr(config.data, name), errors)


def _check_training(name: str, section: TrainingSection, errors: ErrorCollector) -> None:
    if section.global_batch_size % section.micro_batch_size:
        found = f"{section.global_batch_size} over micro_batch_size {section.micro_batch_size}"
        errors.add(f"{name}.global_batch_size", "a multiple of micro_batch_size", found)
    if section.min_lr > section.lr:
        errors.add(f"{name}.min_lr", f"at most lr = {section.lr}", section.min_lr)
    parallel = section.parallel
    if parallel.pp > 1 and parallel.zero > 1:
        hint = "DeepSpeed's pipeline engine supports ZeRO 1 only. Set zero = 1 or pp = 1."
        errors.add(f"{name}.parallel.zero", f"1 with pp = {parallel.pp}", parallel.zero, hint)
    if parallel.sequence_parallel and parallel.tp == 1:
        errors.add(f"{name}.parallel.sequence_parallel", "false with tp = 1", "true", "Set tp > 1, or remove the key.")


def _check_blend(where: str, blend: tuple[str | float, ...], errors: ErrorCollector) -> None:
    weighted = len(blend) % 2 == 0 and all(
        isinstance(entry, str) == bool(index % 2) for index, entry in enumerate(blend)
    )
    if not weighted and not all(isinstance(entry, str) for entry in blend):
        errors.add(
            where, "prefixes only, or alternating weights and prefixes", list(blend), 'Example: [0.3, "a", 0.7, "b"].'
        )
