"""`ligo.fit`: learns the operator, in this process or in all that a launcher started."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ligo.api.settings import ConfigSource, Settings, build_config, check_type, describe, select_sizes
from megatron_ligo.api.sources import ModelSource, open_model
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import convert
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.checkpoint.formats.hf.transformers_model import config_content
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.checkpoint.source_keys import check_agreement
from megatron_ligo.common.errors import ConfigError, DataError, ErrorCollector, Problem, machine_errors
from megatron_ligo.data.indexed_dataset import open_indexed_files
from megatron_ligo.growth.operator_file import OperatorFile
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.training.metrics import StepCallback

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SMALL_FOLDER = "small"
TRAIN, VALID = "train", "valid"


@machine_errors()
def fit(
    model: ModelSource,
    large: PreTrainedConfig | Mapping[str, int],
    *,
    data: str | Path | Sequence[str | float],
    valid: str | Path | Sequence[str | float] | None = None,
    steps: int | None = None,
    output: str | Path | None = None,
    config: ConfigSource = None,
    settings: Settings | None = None,
    on_step: StepCallback | None = None,
) -> OperatorFile:
    """Fits the operator that grows a model into a large one, and returns it. The model stays as it is.

    model: a model of transformers, or a checkpoint of any format. large: a config of transformers, such as that of a
    grown model, or sizes by the names that `grow` takes. data, valid: prefixes of prepared text, as in [data]; valid
    may be left out if it lies beside `data` under the name "valid". steps: optimizer steps in total; 0 measures the
    held-out loss of the start and returns it unfitted; None: as the settings say. output: the run's folder, with
    checkpoints and metrics, in which a repeated call resumes; None: one that is removed with the operator. config,
    settings: a run.toml and more of its keys, such as {"fit.lr": 1e-5, "fit.parallel.tp": 2, "data.seq_length": 512}.
    on_step: called after each step, on rank 0, with its row of the metrics.
    Under a launcher all processes call this together, with one `output`. Megatron-core's groups end with the fit,
    unless they were there before. Raises LigoError.
    """
    if output is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(Problem("output", "one folder for all processes", "none", "Name one that all nodes share."))
    if not isinstance(large, Mapping) and not hasattr(large, "to_json_string"):
        hint = "Pass the config of a large model (model.config)." if hasattr(large, "config") else ""
        raise ConfigError(Problem("large", "a config of transformers, or sizes by name", describe(large), hint))
    for name, prefixes in (("data", data), ("valid", valid)):
        if prefixes is not None:
            check_type(name, prefixes, str | Path | Sequence, "a prefix of prepared text, or a list of them")
    temporary = None
    if output is None:
        temporary = tempfile.TemporaryDirectory(prefix="ligo-fit-")
        output = temporary.name
    folder = Path(output)
    reader = open_model(model)
    sizes = dict(large) if isinstance(large, Mapping) else _read_sizes(large, reader.model_config)
    stated: dict[str, object] = {"data.train": _as_blend(data)}
    stated["data.valid"] = _as_blend(_find_valid(data) if valid is None else valid)
    if steps is not None:
        stated["fit.steps"] = steps
    run_config = build_config(
        config, sizes, settings, stated, {"small.path": f"{reader.path or folder / SMALL_FOLDER}"}
    )
    operator = build_initial_operator(reader.model_config, run_config.large, run_config.operator)
    if not isinstance(large, Mapping):
        _check_large(large, operator.large)

    from megatron_ligo.distributed import mesh
    from megatron_ligo.training.fit import Fit

    mesh.init_distributed(run_config.fit.timeout_minutes)
    if reader.path is None:
        mesh.all_ranks().run_on_rank_0(lambda: _save_small(reader, folder / SMALL_FOLDER))
    has_own_groups = mesh.has_groups()
    try:
        job = Fit(run_config, folder)
        job.on_step = on_step
        job.run()
        # Its hooks would keep the engine and all its tensors alive.
        job.engine.engine.destroy()
    finally:
        # A training script creates groups of its own layout afterwards, which Megatron-core refuses beside others.
        if not has_own_groups:
            mesh.forget_groups()
    fitted = OperatorFile(folder / "operator")
    if temporary:
        weakref.finalize(fitted, temporary.cleanup)
    return fitted


def _save_small(reader: Reader, folder: Path) -> None:
    convert.convert(reader, folder, "hf", overwrite=True)


def _as_blend(data: str | Path | Iterable[str | float]) -> list[str | float]:
    return [f"{data}"] if isinstance(data, str | Path) else list(data)


def _find_valid(data: str | Path | Sequence[str | float]) -> list[str]:
    """Returns the held-out data beside the training data, as the preparation of text writes them.

    Raises DataError if the training data are missing or damaged themselves.
    """
    path = Path(data) if isinstance(data, str | Path) else None
    if path is not None and not path.is_file():
        errors = ErrorCollector("data", DataError)
        open_indexed_files(f"{path}", errors)
        errors.raise_if_any()
    if path is None or path.name != TRAIN or not path.with_name(f"{VALID}.idx").is_file():
        hint = "Give valid=, the prefix of held-out data."
        raise ConfigError(Problem("valid", "held-out data, named or beside the training data", "none", hint))
    return [f"{path.with_name(VALID)}"]


def _read_sizes(large: PreTrainedConfig, small: ModelConfig) -> dict[str, object]:
    """Returns the sizes of a config of transformers that [large] has and that differ from the small model's."""
    sizes = select_sizes(vars(_parse(large)))
    return {name: size for name, size in sizes.items() if size != getattr(small, name)}


def _parse(large: PreTrainedConfig) -> ModelConfig:
    return config_json.parse_model_config(config_content(large), "the large model's config")


def _check_large(large: PreTrainedConfig, grown: ModelConfig) -> None:
    """Raises ConfigError unless growth gives the model of this config."""
    errors = ErrorCollector("the small model does not grow into the model of this config", ConfigError)
    parts = {name for name, value in grown.to_json().items() if isinstance(value, bool)} - {"tied"}
    sizes = {name: value for name, value in vars(_parse(large)).items() if name not in parts}
    check_agreement(sizes, grown.to_json(), "the large model's config", "growth", errors)
    errors.raise_if_any()
