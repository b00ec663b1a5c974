"""Text to Megatron-core's indexed datasets (.bin/.idx), with a tokenizer of the small model's or a new one."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_ligo import cli
from megatron_ligo.common.errors import ConfigError, Problem

EXAMPLE = """
python tools/prepare_data.py --python-docs --tokenizer models/small --output data
python tools/prepare_data.py texts/ more.jsonl --train-sentencepiece 8000 --output data
"""


def parser() -> cli.CommandParser:
    made = cli.build_parser(__doc__, EXAMPLE, output="folder for train and valid (.bin, .idx, .json) and tokenizer/")
    add = made.add_argument
    add("inputs", nargs="*", metavar="TEXT", help="files or folders: .txt, .md, .py (a document each), .jsonl (a line)")
    add("--python-docs", action="store_true", help="Python's own sources and documentation strings (on every machine)")
    add("--tokenizer", default="", metavar="PATH", help="folder with tokenizer.json or tokenizer.model, or such a file")
    add("--train-sentencepiece", type=int, default=0, metavar="SIZE", help="train a tokenizer with so many tokens")
    add("--eod", default="", metavar="TOKEN", help="the token that ends a document (default: the tokenizer's own)")
    add("--valid-fraction", type=float, default=0.05, help="part of the documents that is held out (default: 0.05)")
    add("--max-bytes", type=int, default=0, metavar="N", help="read no more text than this (default: all)")
    add("--json-key", default="text", help="where a .jsonl line has its text (default: text)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    return made


def main() -> None:
    args = parser().parse_args()
    if not args.inputs and not args.python_docs:
        raise ConfigError(Problem("inputs", "files, folders or --python-docs", "none"))
    if bool(args.tokenizer) == bool(args.train_sentencepiece):
        raise ConfigError(Problem("tokenizer", "one of --tokenizer and --train-sentencepiece", "none or both"))
    if not 0 <= args.valid_fraction < 1:
        raise ConfigError(Problem("--valid-fraction", "at least 0 and less than 1", args.valid_fraction))
    # Imported here: each worker process runs this file's head again.
    from megatron_ligo.data.documents import DocumentSource, find_text_files
    from megatron_ligo.data.prepare_text import TextRecipe, prepare_text

    texts = DocumentSource(find_text_files(args.inputs), args.python_docs, args.json_key, args.max_bytes)
    recipe = TextRecipe(texts, args.tokenizer, args.train_sentencepiece, args.eod, args.valid_fraction)
    splits = prepare_text(recipe, Path(args.output), args.workers)
    for name, record in splits.items():
        per_token = record["text_bytes"] / record["tokens"]
        print(
            f"{args.output}/{name}: {record['documents']} documents, {record['tokens']} tokens, "
            f"{per_token:.2f} bytes per token"
        )


if __name__ == "__main__":
    cli.run_command(main)
