"""`ligo.convert`, `ligo.inspect` and `ligo.verify`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_ligo.api.settings import DType, check_number, parse_dtype
from megatron_ligo.api.sources import ModelSource, open_model
from megatron_ligo.checkpoint import convert as conversion
from megatron_ligo.checkpoint import inspect as inspection
from megatron_ligo.checkpoint.content import compare_with_manifest
from megatron_ligo.checkpoint.convert import Progress
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.checkpoint.manifest import Manifest
from megatron_ligo.checkpoint.verify import ComparisonResult, compare, has_manifest
from megatron_ligo.common.errors import ConfigError, Problem, machine_errors
from megatron_ligo.experiments.reference_logits import LOGIT_TOLERANCE, compare_reference_logits


@machine_errors()
def convert(
    source: ModelSource,
    target: str | Path,
    *,
    to: str,
    dtype: DType | None = None,
    tp: int = 1,
    pp: int = 1,
    options: Mapping[str, object] | None = None,
    accept: Iterable[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Writes a model as a checkpoint of format `to` in a new folder; returns its manifest.

    dtype: of the weights; None: as they are. tp, pp: the layout, where the format has one. options: the format's own.
    progress: called with the bytes done and the bytes in total. The target appears whole or not at all.
    Raises CheckpointError with every bad tensor, ConfigError for options that the format does not take.
    """
    check_number("tp", tp, 1)
    check_number("pp", pp, 1)
    written = WriteOptions(dtype=parse_dtype(dtype), tp=tp, pp=pp, extra=dict(options or {}))
    reader = open_model(source, accept=accept)
    return conversion.convert(reader, target, to, written, overwrite=overwrite, progress=progress)


@machine_errors()
def inspect(model: ModelSource, *, format: str | None = None, accept: Iterable[str] = ()) -> dict[str, Any]:
    """Summarises a model as plain data: format, sizes (`dims`), layout, step, and each tensor's shape and dtype."""
    return inspection.describe(open_model(model, format=format, accept=accept))


@machine_errors()
def verify(
    a: ModelSource,
    b: ModelSource | None = None,
    *,
    values_only: bool = False,
    logits: bool = False,
    tolerance: float = LOGIT_TOLERANCE,
) -> ComparisonResult:
    """Compares two models bit for bit, and each with its manifest if it has one.

    b: None compares `a` with its manifest alone. values_only: equal numbers of different dtypes are equal. logits:
    compares the models by their logits on a fixed batch, each side by its own library, instead of by their tensors.
    The result is true in `same`, or lists its `differences`.
    """
    readers = [open_model(model) for model in (a, b) if model is not None]
    if b is None and (logits or not has_manifest(readers[0])):
        expected = "two models" if logits else "a manifest, or a second model to compare with"
        raise ConfigError(Problem("verify", expected, "one model" if logits else "neither"))
    results = [compare_with_manifest(reader) for reader in readers if b is None or has_manifest(reader)]
    if logits:
        comparison = compare_reference_logits(*readers)
        text = f"logits differ by {comparison.difference:.3e}, more than {tolerance:g}"
        results.append(ComparisonResult(comparison.compared, [] if comparison.difference <= tolerance else [text]))
    elif b is not None:
        results.append(compare(*readers, values_only=values_only))
    differences = [line for result in results for line in result.differences]
    return ComparisonResult(sum(result.compared for result in results), differences)
