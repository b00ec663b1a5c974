"""Where a pretraining begins: a hand-off, a checkpoint of any format, or fresh weights of given sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import UNTRAINED_PARTS
from megatron_ligo.checkpoint import formats, model_record
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector, Problem
from megatron_ligo.config.run_config import ParallelSection, RunConfig
from megatron_ligo.export import provenance
from megatron_ligo.growth.validation import derive_large_config
from megatron_ligo.models.full import parameters
from megatron_ligo.models.mcore.layer_spec import check_supported
from megatron_ligo.sharding.tensor_parallel import check_tp

log = logging.getLogger(__name__)

UNIVERSAL = "universal"


@dataclass(frozen=True)
class InitialWeights:
    """source None: fresh weights. fit: the record of the fit that a hand-off comes from, None for any other start.
    grown: whether it is a hand-off. origin: what that says of its small model and its operator. fresh_head: the source
    has no output head, and the model a fresh one.
    """

    model_config: ModelConfig
    source: Reader | None = None
    fit: dict | None = None
    grown: bool = False
    origin: dict | None = None
    fresh_head: bool = False

    @property
    def universal(self) -> bool:
        """True where DeepSpeed itself loads the weights."""
        return self.source is not None and self.source.format == UNIVERSAL and not self.fresh_head

    def read(self, seed: int) -> Callable[..., Tensor]:
        """Its tensors by key (and kind), weights that it lacks drawn from the seed."""
        drawn = parameters.build_initial_weights(self.model_config, seed)
        held = set() if self.source is None else set(self.source.keys())
        return lambda key, *kind: self.source.read(key, *kind) if key in held else drawn(key)


def find_initial_weights(config: RunConfig) -> InitialWeights:
    """What the config asks for; a LigoError if there is no such thing or the layout does not fit it."""
    start = (
        _from_checkpoint(Path(config.pretrain.start))
        if config.pretrain.start
        else InitialWeights(scratch_model_config(config))
    )
    start = replace(start, model_config=_drop_untrained_parts(start.model_config))
    if config.pretrain.fresh_head:
        start = _add_head(start)
    check_supported(start.model_config)
    check_layout(
        start.model_config, config.pretrain.parallel, start.model_config.tokens_of_sample(config.data.seq_length)
    )
    return start


def _add_head(start: InitialWeights) -> InitialWeights:
    arch = architectures.get(start.model_config.arch)
    if start.source is None or start.model_config.has_head or arch.is_causal:
        hint = "Leave it out where the start has a head."
        raise ConfigError(Problem("pretrain.fresh_head", "an encoder without a head as the start", "another", hint))
    return replace(start, model_config=replace(start.model_config, has_head=True), fresh_head=True)


def _drop_untrained_parts(model_config: ModelConfig) -> ModelConfig:
    """The sizes without the parts that the loss of a language model does not read."""
    parts = [part for part in UNTRAINED_PARTS if getattr(model_config, part)]
    if parts:
        log.info("left out, for masked-LM training does not reach them: %s", ", ".join(parts))
    return replace(model_config, **dict.fromkeys(parts, False))


def _from_checkpoint(path: Path) -> InitialWeights:
    grown = provenance.read(path)
    if grown is None:
        if (path / UNIVERSAL).is_dir():
            hint = "Let its writer finish, or give the folder inside."
            raise CheckpointError(Problem(f"{path}", f"a whole hand-off, with {provenance.RECORD_NAME}", "none", hint))
        source = formats.open(path)
        return InitialWeights(source.model_config, source)
    source = formats.open(path / (UNIVERSAL if UNIVERSAL in grown["formats"] else "hf"))
    origin = {key: grown[key] for key in provenance.ORIGIN_KEYS} if grown.keys() >= provenance.ORIGIN_KEYS else None
    return InitialWeights(source.model_config, source, grown.get("fit"), grown=True, origin=origin)


def scratch_model_config(config: RunConfig) -> ModelConfig:
    """Sizes for fresh weights: those that [small] names, with what [large] says put over them."""
    if not config.small.path:
        hint = "Set pretrain.start, or small.path to a model (or a config.json) of the sizes to begin from scratch."
        raise ConfigError(Problem("pretrain", "a start", "none", hint))
    return derive_large_config(read_model_config(Path(config.small.path)), config.large)


def read_model_config(path: Path) -> ModelConfig:
    """The sizes that a path states; weights need not be there."""
    if path.is_file() and path.suffix == ".json":
        return config_json.parse_model_config(config_json.load_config(path), f"{path}")
    stated = model_record.find_record(path) if path.is_dir() else None
    return stated[0] if stated else _from_checkpoint(path).model_config


def check_layout(model_config: ModelConfig, parallel: ParallelSection, seq_length: int) -> None:
    """ConfigError with everything in which a layout does not fit the model and the data."""
    errors = ErrorCollector("the layout does not fit the model", ConfigError)
    check_tp(model_config, parallel.tp, errors)
    if parallel.pp > model_config.num_layers:
        errors.add(f"pp = {parallel.pp}", "at most a stage a layer", f"{model_config.num_layers} layers")
    if parallel.sequence_parallel and seq_length % parallel.tp:
        where = "data.seq_length" if model_config.image_size is None else "tokens of an image"
        errors.add(where, f"a multiple of tp = {parallel.tp} (sequence_parallel)", seq_length)
    if seq_length > model_config.longest_sequence:
        errors.add("data.seq_length", f"at most the model's {model_config.longest_sequence} positions", seq_length)
    errors.raise_if_any()
