"""`ligo.grow` and `ligo.write_handoff`: growth of a model, in memory or into a folder."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

import torch
from torch import nn

from megatron_ligo.api.settings import (
    ConfigSource,
    DType,
    LargeSizes,
    Settings,
    build_config,
    check_type,
    parse_dtype,
)
from megatron_ligo.api.sources import ModelSource, open_model
from megatron_ligo.checkpoint.content import digest_weights
from megatron_ligo.checkpoint.convert import Progress
from megatron_ligo.checkpoint.formats.hf.transformers_model import build_model
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common.errors import ConfigError, Problem, machine_errors
from megatron_ligo.common.folder_kinds import HANDOFF, check_output, find_operator_part
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.export import handoff
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth.methods import describe_method
from megatron_ligo.growth.operator import Operator
from megatron_ligo.growth.operator_file import OperatorFile
from megatron_ligo.growth.validation import build_initial_operator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# What `ligo.fit` returns, or the folder of a fit or an operator.
OperatorSource: TypeAlias = Operator | str | Path


@machine_errors()
def grow(
    model: ModelSource,
    *,
    method: str | None = None,
    operator: OperatorSource | None = None,
    dtype: DType | None = None,
    config: ConfigSource = None,
    settings: Settings | None = None,
    accept: Iterable[str] = (),
    accept_changed: bool = False,
    **sizes: Unpack[LargeSizes],
) -> PreTrainedModel:
    """Returns the grown model, a new model of transformers, in evaluation mode unless `model` is in training mode.

    model: a model of transformers, which stays as it is, or a checkpoint of any format. sizes: those of [large], such
    as num_layers=32, hidden_size=768; one that is left out is the small model's. method: a growth method by name
    (default: lossless, where the grown model computes what the small one does). operator: a fitted one, which implies
    the sizes. dtype: of the grown weights; None: the small model's. config, settings: a run.toml and more of its keys,
    such as {"operator.noise": 0.1}. accept: unknown keys of the small model's config that may pass. accept_changed:
    applies an operator that was fitted on other weights.
    Raises LigoError with everything that cannot be grown.
    """
    weights_dtype = parse_dtype(dtype)
    run_config = build_config(config, sizes, settings, {} if method is None else {"operator.method": method})
    reader = open_model(model, accept=accept)
    chosen = _open_operator(operator, reader, run_config, accept_changed)
    options = {}
    if isinstance(model, nn.Module):
        options["attn_implementation"] = model.config._attn_implementation
    grown = build_model(GrownReader(chosen, reader), weights_dtype or _main_dtype(reader), **options)
    if isinstance(model, nn.Module):
        if model.can_generate():
            grown.generation_config = copy.deepcopy(model.generation_config)
        _move(grown, model.device).train(model.training)
    return grown


def _move(module: nn.Module, device: torch.device) -> nn.Module:
    """Returns the module on a device. The type of the classes' own `to` hides its arguments."""
    return module.to(device)


@machine_errors()
def write_handoff(
    model: ModelSource,
    folder: str | Path,
    *,
    method: str | None = None,
    operator: OperatorSource | None = None,
    config: ConfigSource = None,
    settings: Settings | None = None,
    accept: Iterable[str] = (),
    accept_changed: bool = False,
    progress: Progress | None = None,
    **sizes: Unpack[LargeSizes],
) -> dict[str, Any]:
    """Grows a model into a hand-off as the command does, one tensor at a time; returns the content of growth.json.

    The large model is never in memory as a whole. settings: [handoff] too, such as {"handoff.dtype": "bf16"}.
    progress: called with the bytes done and the bytes in total. The other arguments are those of `grow`.
    """
    run_config = build_config(config, sizes, settings, {} if method is None else {"operator.method": method})
    check_output(Path(folder), HANDOFF)
    reader = open_model(model, accept=accept)
    chosen = _open_operator(operator, reader, run_config, accept_changed)
    return handoff.write_grown_model(chosen, reader, run_config, Path(folder), progress, accept_changed=accept_changed)


def _open_operator(
    operator: OperatorSource | None, reader: Reader, config: RunConfig, accept_changed: bool
) -> Operator:
    """Returns the operator to apply: the given one if it suits the model and the config, or the named start."""
    check_type("operator", operator, Operator | str | Path | None, "what ligo.fit returned, or the folder of a fit")
    if operator is None:
        if not any(size is not None for size in vars(config.large).values()):
            hint = "Example: num_layers=32, hidden_size=768."
            raise ConfigError(Problem("sizes", "a size of the large model, or an operator", "neither", hint))
        start = build_initial_operator(reader.model_config, config.large, config.operator)
        log.info("%s", describe_method(start.settings, start.small, start.large))
        return start
    chosen = operator if isinstance(operator, Operator) else OperatorFile(find_operator_part(Path(operator)))
    if isinstance(chosen, OperatorFile):
        name = f"{reader.path or reader.format}"
        handoff.check_operator(chosen, config, name, digest_weights(reader), accept_changed)
    return chosen


def _main_dtype(reader: Reader) -> torch.dtype:
    """Returns the dtype that most tensors have."""
    dtypes = [reader.info(key).dtype for key in reader.keys()]  # noqa: SIM118 - no dict
    return max(set(dtypes), key=dtypes.count)
