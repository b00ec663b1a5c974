"""Evaluates models side by side with lm-evaluation-harness, on its tasks or on your own text."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ligo import cli
from megatron_ligo.common import hub_models
from megatron_ligo.common.errors import ConfigError, ErrorCollector

EXAMPLE = """
ligo eval small=models/small grown=runs/grown trained=runs/pretrain --text corpus/test.txt --output runs/eval
ligo eval grown=runs/grown --task lambada_openai --task hellaswag --output runs/eval
"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    parser = cli.build_parser(
        f"{__doc__}\nA text gives bits per byte and perplexities. Needs the package lm_eval.",
        EXAMPLE,
        output="folder for eval.json and what the evaluation needs",
        prog=prog,
    )
    parser.add_argument(
        "models", nargs="+", metavar="NAME=PATH", help="a model of any format, and its name in the table"
    )
    parser.add_argument("--task", action="append", default=[], metavar="TASK", help="task of the harness; repeatable")
    parser.add_argument("--text", action="append", default=[], metavar="FILE", help="text, .jsonl, ...; repeatable")
    parser.add_argument("--batch-size", type=cli.positive(int), default=4, help="sequences at a time (default: 4)")
    parser.add_argument("--limit", type=cli.positive(int), metavar="N", help="at most N documents of each task")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    models = _parse_models(args.models)
    errors = ErrorCollector("eval", ConfigError)
    if not args.task and not args.text:
        errors.add("eval", "a --task or a --text", "neither")
    for text in args.text:
        if not Path(text).exists():
            problem = hub_models.missing_path(text, "a text")
            errors.add(problem.where, problem.expected, problem.found, problem.hint)
    errors.raise_if_any()
    cli.check_paths(*map(str, models.values()))

    from megatron_ligo.experiments import harness_evaluation

    texts = [Path(text) for text in args.text]
    record = harness_evaluation.evaluate_models(
        models, Path(args.output), args.task, texts, args.batch_size, args.limit, args.dtype
    )
    print(harness_evaluation.format_table(record))
    again = "the same command with other tasks, or a later checkpoint of the run"
    cli.print_wrote(Path(args.output) / harness_evaluation.RESULTS, again)


def _parse_models(texts: list[str]) -> dict[str, Path]:
    """Returns the models by name; a path alone is named by its last part. Raises ConfigError for one name twice."""
    models: dict[str, Path] = {}
    errors = ErrorCollector("eval", ConfigError)
    for text in texts:
        name, equals, path = text.partition("=")
        path = Path(path if equals else text)
        name = name if equals else path.name
        if name in models or not name or "/" in name:
            errors.add(text, "a name of its own for each model: NAME=PATH", repr(name))
        models[name] = path
    errors.raise_if_any()
    return models
