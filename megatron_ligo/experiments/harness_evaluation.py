"""Evaluation by lm-evaluation-harness (`lm_eval`), several models side by side: its tasks, or the user's own text.

A text becomes a task of rolling log-likelihoods: bits per byte, and perplexity per byte and per word. Nothing is
fetched for it; the harness's own tasks load their data, from its cache where there is no network.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from megatron_ligo.checkpoint import convert, formats
from megatron_ligo.common.atomic_files import write_json
from megatron_ligo.common.errors import ConfigError, DataError, ErrorCollector, Problem
from megatron_ligo.common.folder_kinds import EVALUATION, check_output
from megatron_ligo.data.documents import DocumentSource

log = logging.getLogger(__name__)

RESULTS = "eval.json"
# In the order of the table. Others follow in the harness's order.
FIRST_METRICS = ("bits_per_byte", "byte_perplexity", "word_perplexity", "acc")


def check_harness() -> None:
    """Raises ConfigError if the harness is not installed."""
    if find_spec("lm_eval") is None:
        hint = "pip install 'megatron_ligo[eval]', or pip install 'lm-eval[hf]'."
        raise ConfigError(Problem("ligo eval", "the package lm_eval", "not installed", hint))


def evaluate_models(
    models: Mapping[str, Path],
    output: Path,
    tasks: Sequence[str] = (),
    texts: Sequence[Path] = (),
    batch_size: int = 4,
    limit: int | None = None,
    dtype: str = "float32",
) -> dict:
    """Evaluates models by name on the harness's tasks and on texts; returns and writes OUTPUT/eval.json.

    limit: at most so many documents of each task. Models of other formats than Hugging Face's are converted, into
    OUTPUT. Raises ConfigError for unknown tasks and a folder of another kind, DataError for texts without a document.
    """
    check_harness()
    check_output(output, EVALUATION)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    output.mkdir(parents=True, exist_ok=True)
    own_tasks = [_write_task(text, output / "tasks") for text in texts]
    manager = TaskManager(include_path=str(output / "tasks") if own_tasks else None)
    errors = ErrorCollector("eval", ConfigError)
    for task in tasks:
        if not manager.match_tasks([task]):
            errors.add(task, "a task of lm-evaluation-harness", "none of that name", "See: lm-eval ls tasks")
    errors.raise_if_any()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    for name, path in models.items():
        folder = _as_hf_folder(path, output / "models" / name)
        log.info("evaluating %s", name)
        model = HFLM(pretrained=str(folder), device=device, dtype=dtype, batch_size=batch_size)
        answer = lm_eval.simple_evaluate(
            model=model, tasks=[*tasks, *own_tasks], limit=limit, task_manager=manager, bootstrap_iters=0
        )
        results[name] = {task: _plain_metrics(metrics) for task, metrics in answer["results"].items()}
    record = {
        "models": {name: f"{path}" for name, path in models.items()},
        "limit": limit,
        "dtype": dtype,
        "lm_eval": lm_eval.__version__,
        "results": results,
    }
    write_json(output / RESULTS, record)
    return record


def format_table(record: Mapping) -> str:
    """Formats results as text: a row for each metric of each task, a column for each model."""
    names = list(record["results"])
    rows = [("task", "metric", *names)]
    tasks = dict.fromkeys(task for results in record["results"].values() for task in results)
    for task in tasks:
        metrics = dict.fromkeys(key for name in names for key in record["results"][name].get(task, {}))
        ordered = sorted(metrics, key=lambda key: FIRST_METRICS.index(key) if key in FIRST_METRICS else 99)
        for metric in ordered:
            values = (record["results"][name].get(task, {}).get(metric) for name in names)
            rows.append((task, metric, *("" if value is None else f"{value:.4f}" for value in values)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _plain_metrics(metrics: Mapping[str, object]) -> dict[str, float]:
    """Returns a task's numbers by name, without the harness's filter names and standard errors."""
    numbers = {}
    for key, value in metrics.items():
        name, _, _ = key.partition(",")
        if isinstance(value, int | float) and not isinstance(value, bool) and not name.endswith("_stderr"):
            numbers.setdefault(name, float(value))
    numbers.pop("sample_len", None)
    return numbers


def _write_task(text: Path, folder: Path) -> str:
    """Writes a task of a text's documents; returns its name."""
    documents = [document for document in DocumentSource((text,)) if document.strip()]
    if not documents:
        raise DataError(Problem(f"{text}", "a text with a document", "none"))
    folder.mkdir(parents=True, exist_ok=True)
    name = f"text_{text.stem}".replace("-", "_").replace(" ", "_")
    data = (folder / f"{name}.jsonl").resolve()
    data.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    metrics = [{"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": metrics,
    }
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(json.dumps(task, indent=2))
    return name


def _as_hf_folder(path: Path, folder: Path) -> Path:
    """Returns a Hugging Face folder of a model, with its tokenizer: its own, or a conversion."""
    reader = formats.open(path)
    source = reader.path
    if reader.format != "hf":
        convert.convert(reader, folder, "hf")
        source = folder
    if not any(file.name.startswith(("tokenizer", "vocab", "spiece")) for file in reader.files):
        hint = "Copy the tokenizer's files there."
        raise ConfigError(Problem(f"{path}", "a model with its tokenizer", "none", hint))
    return source
