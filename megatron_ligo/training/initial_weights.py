"""The start of a pretraining run: a hand-off, a checkpoint of any format, or fresh weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import UNTRAINED_PARTS
from megatron_ligo.checkpoint import formats, model_record
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.checkpoint.source_keys import AcceptedKeys
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector, Problem
from megatron_ligo.config.run_config import SCRATCH, ParallelSection, RunConfig
from megatron_ligo.export import provenance
from megatron_ligo.growth.validation import derive_large_config
from megatron_ligo.models.full import parameters
from megatron_ligo.sharding.tensor_parallel import check_tp

log = logging.getLogger(__name__)

UNIVERSAL = "universal"


@dataclass(frozen=True)
class InitialWeights:
    """The weights that a pretraining run starts from.

    source: their reader, None for fresh weights. fit_record: the record of the fit behind a hand-off.
    grown: the source is a hand-off. origin: the small model and operator that the hand-off names. fresh_head: the
    source has no output head, and the model gets a fresh one. codes: a folder of token codes, the embedding of fresh
    weights.
    """

    model_config: ModelConfig
    source: Reader | None = None
    fit_record: dict | None = None
    grown: bool = False
    origin: dict | None = None
    fresh_head: bool = False
    codes: str = ""

    @property
    def universal(self) -> bool:
        """True if DeepSpeed itself loads the weights."""
        return self.source is not None and self.source.format == UNIVERSAL and not self.fresh_head

    def reader(self, seed: int) -> Callable[..., Tensor]:
        """Returns a function from a canonical key (and kind) to its tensor; missing weights are drawn from the seed."""
        draw = parameters.build_initial_weights(self.model_config, seed, self.codes)
        stored_keys = set() if self.source is None else set(self.source.keys())
        return lambda key, *kind: self.source.read(key, *kind) if key in stored_keys else draw(key)


def find_initial_weights(config: RunConfig) -> InitialWeights:
    """Opens the start that the config names. LigoError if there is none, or if the layout does not fit it."""
    section = config.pretrain
    if not section.start:
        expected = f"a start: a hand-off, a checkpoint, or {SCRATCH!r}"
        hint = f"Set pretrain.start to runs/grown, for example, or to {SCRATCH} for fresh weights of these sizes."
        raise ConfigError(Problem("pretrain.start", expected, "none", hint))
    from_scratch = section.start == SCRATCH
    if from_scratch:
        start = InitialWeights(scratch_model_config(config), codes=section.codes)
    else:
        start = open_start(Path(section.start))
    if section.codes and (not from_scratch or start.model_config.image_size is not None):
        hint = "Growth takes them by operator.codes."
        raise ConfigError(Problem("pretrain.codes", "a text model from scratch", section.start, hint))
    start = replace(start, model_config=_drop_untrained_parts(start.model_config))
    if section.fresh_head:
        start = _add_head(start)
    # Imported late: sizes are read without Megatron-core.
    from megatron_ligo.models.mcore.layer_spec import check_supported

    check_supported(start.model_config)
    check_layout(start.model_config, section.parallel, start.model_config.tokens_per_sample(config.data.seq_length))
    return start


def _add_head(start: InitialWeights) -> InitialWeights:
    arch = architectures.get(start.model_config.arch)
    if start.source is None or start.model_config.has_head or arch.is_causal:
        hint = "Leave it out if the start has a head."
        raise ConfigError(Problem("pretrain.fresh_head", "an encoder without a head as the start", "another", hint))
    return replace(start, model_config=replace(start.model_config, has_head=True), fresh_head=True)


def _drop_untrained_parts(model_config: ModelConfig) -> ModelConfig:
    """Returns the config without the parts that masked-LM training does not reach."""
    parts = [part for part in UNTRAINED_PARTS if getattr(model_config, part)]
    if parts:
        log.info("left out, because masked-LM training does not reach them: %s", ", ".join(parts))
    return replace(model_config, **dict.fromkeys(parts, False))


def open_start(path: Path) -> InitialWeights:
    """Opens a hand-off, or a checkpoint of any format."""
    record = provenance.read(path)
    if record is None:
        if (path / UNIVERSAL).is_dir():
            expected = f"a complete hand-off, with {provenance.RECORD_NAME}"
            raise CheckpointError(Problem(f"{path}", expected, "none", "Let its writer finish, or give the subfolder."))
        source = formats.open(path)
        return InitialWeights(source.model_config, source)
    source = formats.open(path / (UNIVERSAL if UNIVERSAL in record["formats"] else "hf"))
    has_origin = record.keys() >= provenance.ORIGIN_KEYS
    origin = {key: record[key] for key in provenance.ORIGIN_KEYS} if has_origin else None
    return InitialWeights(source.model_config, source, record.get("fit"), grown=True, origin=origin)


def scratch_model_config(config: RunConfig) -> ModelConfig:
    """Returns the config of the model to train from scratch: that of [small] with the sizes of [large]."""
    hint = "Its sizes are those of fresh weights, except those that [large] sets."
    return derive_large_config(read_small_config(config, hint), config.large, config.operator.expert_start)


def read_small_config(config: RunConfig, hint: str = "Set it in the file of --config, or by --set.") -> ModelConfig:
    """Returns the small model's sizes. Raises ConfigError with `hint` if [small] names no model."""
    if not config.small.path:
        raise ConfigError(Problem("small.path", "a model, or a config.json", "none", hint))
    return read_model_config(Path(config.small.path), config.small.accept)


def read_model_config(path: Path, accept: Iterable[str] = ()) -> ModelConfig:
    """Reads the model config of a config.json, a run's model folder or a checkpoint.

    accept: unknown keys of its config that the user lets through.
    """
    accepted = AcceptedKeys(accept)
    if path.is_file() and path.suffix == ".json":
        return config_json.parse_model_config(config_json.load_config(path), f"{path}", accepted)
    record = model_record.find_record(path, accepted) if path.is_dir() else None
    return record[0] if record else open_start(path).model_config


def check_cp(model_config: ModelConfig, parallel: ParallelSection, errors: ErrorCollector) -> None:
    """Adds an error for each reason why context-parallel ranks cannot share the model's sequences."""
    if parallel.cp == 1:
        return
    if model_config.image_size is not None or model_config.num_experts:
        kind = "images" if model_config.image_size is not None else f"{model_config.num_experts} experts"
        errors.add("cp", "1 for a model of images or with experts", f"cp {parallel.cp}, {kind}", "Set cp = 1.")
    ranks = parallel.tp * parallel.cp
    if model_config.num_heads % ranks:
        hint = "Each rank takes part of the heads."
        errors.add("num_heads", f"a multiple of tp x cp = {ranks}", model_config.num_heads, hint)


def check_layout(model_config: ModelConfig, parallel: ParallelSection, seq_length: int) -> None:
    """Raises ConfigError with every mismatch between the layout and the model or the sequence length."""
    errors = ErrorCollector("the layout does not fit the model", ConfigError)
    check_tp(model_config, parallel.tp, errors)
    _check_experts(model_config, parallel, errors)
    if parallel.pp > model_config.num_layers:
        errors.add(f"pp = {parallel.pp}", "at most one stage per layer", f"{model_config.num_layers} layers")
    check_cp(model_config, parallel, errors)
    ranks, names = (parallel.tp * parallel.cp, "tp x cp") if parallel.sequence_parallel else (parallel.cp, "cp")
    names = "tp" if parallel.cp == 1 else names
    if seq_length % ranks:
        where = "data.seq_length" if model_config.image_size is None else "tokens of an image"
        reason = " (sequence_parallel)" if parallel.sequence_parallel else ""
        errors.add(where, f"a multiple of {names} = {ranks}{reason}", seq_length)
    if seq_length > model_config.max_sequence_length:
        errors.add("data.seq_length", f"at most the model's {model_config.max_sequence_length} positions", seq_length)
    errors.raise_if_any()


def _check_experts(model_config: ModelConfig, parallel: ParallelSection, errors: ErrorCollector) -> None:
    if max(model_config.num_experts, 1) % parallel.ep:
        experts = f"{model_config.num_experts or 'no'} experts"
        errors.add(f"ep = {parallel.ep}", "a divisor of the model's num_experts", experts, "Choose another ep.")
    if model_config.num_experts and parallel.tp > 1 and not parallel.sequence_parallel:
        hint = "Without it every rank would send the same tokens to the experts, and Megatron-core refuses to train."
        errors.add("sequence_parallel", f"true with tp = {parallel.tp} and experts", "false", hint)
