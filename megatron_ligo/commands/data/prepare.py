"""Tokenizes text into Megatron-core's indexed datasets (.bin/.idx), with an existing or a new tokenizer."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_ligo import cli
from megatron_ligo.commands.data import print_next_of_data
from megatron_ligo.common.errors import ConfigError, Problem

EXAMPLE = """
ligo prepare --python-docs --tokenizer models/small --output data
ligo prepare texts/ more.jsonl.gz data/train-*.parquet --train-sentencepiece 8000 --output data
ligo prepare stories.txt --separator "<|endoftext|>" --tokenizer models/small --output data
"""

EPILOG = """
texts:
  .txt .md .py        one document a file, unless --separator cuts it
  .jsonl .json        one JSON object a line, or one array of objects; the text is under --json-key
  .parquet .arrow     one document a row, in the column --json-key (needs pyarrow)
  .gz or .zst after one of the first two lines' suffixes (.zst needs pyarrow)
  In a folder, a README or licence beside data files, caches and settings are not text; hidden files are not read.
"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    parser = cli.build_parser(
        __doc__, EXAMPLE, output="folder for train and valid (.bin, .idx, .json) and tokenizer/", prog=prog
    )
    parser.epilog += f"\n{EPILOG}"
    add = parser.add_argument
    add("inputs", nargs="*", metavar="TEXT", help="files or folders; the kinds are below")
    add("--python-docs", action="store_true", help="add the sources and docstrings of Python's standard library")
    add(
        "--tokenizer",
        default="",
        metavar="PATH",
        help="tokenizer.json, tokenizer.model, vocab.txt, or vocab.json with merges.txt; or a folder with one",
    )
    add(
        "--train-sentencepiece",
        type=int,
        default=0,
        metavar="SIZE",
        help="train a sentencepiece tokenizer of this size",
    )
    add("--eod", default="", metavar="TOKEN", help="end-of-document token (default: the tokenizer's own)")
    add("--valid-fraction", type=float, default=0.05, help="fraction of documents to hold out (default: 0.05)")
    add("--max-bytes", type=int, default=0, metavar="N", help="limit on the text to read (default: none)")
    add("--json-key", default="text", help="key of the text in a JSON object, or a table's column (default: text)")
    add(
        "--separator",
        default="auto",
        metavar="TEXT",
        help="what separates the documents of a plain text file: blank-line, end-token (the tokenizer's), none, or a "
        "text of your own such as '<|endoftext|>' (\\n is a line break). auto (the default) cuts a file above 16 MiB, "
        "or the only one, at its end tokens, or else at blank lines",
    )
    add(
        "--on-bad-line",
        default="fail",
        choices=("fail", "skip"),
        help="a line or row without a text: fail with its number (default), or skip, count and record it",
    )
    add(
        "--allow-skipped",
        action="store_true",
        help="go on if the files of other kinds in a folder outweigh its text",
    )
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    return parser


def run(args: argparse.Namespace) -> None:
    if not args.inputs and not args.python_docs:
        raise ConfigError(Problem("inputs", "files, folders or --python-docs", "none"))
    if bool(args.tokenizer) == bool(args.train_sentencepiece):
        raise ConfigError(Problem("tokenizer", "exactly one of --tokenizer and --train-sentencepiece", "none or both"))
    if not 0 <= args.valid_fraction < 1:
        raise ConfigError(Problem("--valid-fraction", "at least 0 and less than 1", args.valid_fraction))
    if not args.separator:
        raise ConfigError(Problem("--separator", "a text, or blank-line, end-token, none or auto", "an empty text"))
    if any(Path(text).resolve() == Path(args.output).resolve() for text in args.inputs):
        hint = "The next call would read what this one has written."
        raise ConfigError(Problem(f"--output {args.output}", "another folder than that of the texts", "the same", hint))
    # Imported late, because each worker process imports this file again.
    from megatron_ligo.data.corpus.text_files import select_text_files
    from megatron_ligo.data.documents import DocumentSource
    from megatron_ligo.data.prepare_text import TextRecipe, prepare_text

    selection = select_text_files(args.inputs, args.json_key, args.allow_skipped)
    for note in selection.notes:
        print(note, flush=True)
    texts = DocumentSource(
        selection.files, args.python_docs, args.json_key, args.max_bytes, args.separator, args.on_bad_line,
        selection.notes,
    )  # fmt: skip
    recipe = TextRecipe(texts, args.tokenizer, args.train_sentencepiece, args.eod, args.valid_fraction)
    splits = prepare_text(recipe, Path(args.output), args.workers)
    for name, record in splits.items():
        bytes_per_token = record["text_bytes"] / record["tokens"]
        print(
            f"{args.output}/{name}: {record['documents']} documents, {record['tokens']} tokens, "
            f"{bytes_per_token:.2f} bytes per token"
        )
    small = args.tokenizer if args.tokenizer and Path(args.tokenizer, "config.json").is_file() else "SMALL"
    print_next_of_data(args.output, [f'data.{name}=["{args.output}/{name}"]' for name in splits], small)
