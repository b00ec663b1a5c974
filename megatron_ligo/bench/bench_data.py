"""Benchmarks the preparation of text against the way of Megatron-LM's tools/preprocess_data.py, on one JSON-lines file.

That tool gives a multiprocessing pool the lines, 32 at a time; a worker parses one and encodes it with transformers,
and the parent adds the ids to an IndexedDatasetBuilder. Both sides use the same tokenizer and as many workers, and
their .bin and .idx files must be equal.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path

from megatron_ligo.bench.timing import describe_machine, format_spread, run_in_new_process, summarise_repeats
from megatron_ligo.data.documents import DocumentSource
from megatron_ligo.data.prepare_text import TextRecipe, prepare_text

HELP = "data: rate of preparing text, over that of Megatron-LM's way with as many workers"
GOAL = 0.5
END_TOKEN = "<|endoftext|>"
# Lines that a worker of Megatron-LM's tool gets at a time.
PEER_CHUNK = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mb", type=float, default=50, help="size of the text (default: 50)")
    parser.add_argument("--vocab", type=int, default=8000, help="size of its byte-level BPE (default: 8000)")
    parser.add_argument("--document-bytes", type=int, default=2000, help="size of a document (default: 2000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each side, in turn (default: 3)")


def measure(args: argparse.Namespace, folder: Path) -> dict:
    text, tokenizer = folder / "text.jsonl", folder / "tokenizer"
    text_bytes = _write_text(text, int(args.mb * 1e6), args.document_bytes)
    run_in_new_process(_train_tokenizer, tokenizer, args.vocab)
    ours, peer = [], []
    for repeat in range(args.repeats):
        output = folder / f"ours_{repeat}"
        ours.append(run_in_new_process(_prepare, text, tokenizer, output, args.workers))
        peer.append(run_in_new_process(_prepare_as_megatron_lm, text, tokenizer, folder / "peer", args.workers))
        for suffix in (".bin", ".idx"):
            same = Path(f"{output}/train{suffix}").read_bytes() == Path(f"{folder}/peer{suffix}").read_bytes()
            assert same, f"the two sides' {suffix} files differ"
    return {
        "what": "data",
        "goal": GOAL,
        "text_bytes": text_bytes,
        "workers": args.workers,
        "document_bytes": args.document_bytes,
        "rate_over_peer": summarise_repeats([theirs / mine for mine, theirs in zip(ours, peer, strict=True)]),
        "bytes_per_second": summarise_repeats([text_bytes / seconds for seconds in ours]),
        "machine": describe_machine(),
    }


def format_text(results: dict) -> str:
    rate = {name: value / 1e6 for name, value in results["bytes_per_second"].items()}
    return (
        f"{results['text_bytes'] / 1e6:.0f} MB of text, {results['workers']} workers: {format_spread(rate)} MB/s, "
        f"{format_spread(results['rate_over_peer'])} times the rate of Megatron-LM's way (goal: {results['goal']})"
    )


def _write_text(path: Path, size: int, document_bytes: int) -> int:
    """Writes documents cut from Python's standard library; returns their bytes."""
    library = "\n".join(DocumentSource((), python_docs=True, max_bytes=size))
    written = 0
    with path.open("w") as stream:
        while written < size:
            start = written % len(library)
            # A number makes documents differ once the library is used up.
            document = f"{written}\n{library[start : start + document_bytes]}"
            stream.write(json.dumps({"text": document}) + "\n")
            written += len(document.encode())
    return written


def _train_tokenizer(folder: Path, vocab: int) -> None:
    import tokenizers

    inner = tokenizers.ByteLevelBPETokenizer()
    texts = DocumentSource((), python_docs=True, max_bytes=1_000_000)
    inner.train_from_iterator(iter(texts), vocab, special_tokens=[END_TOKEN], show_progress=False)
    folder.mkdir()
    inner.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_TOKEN}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _prepare(text: Path, tokenizer: Path, output: Path, workers: int) -> float:
    """Prepares the text with this package; returns the seconds."""
    start = time.perf_counter()
    prepare_text(TextRecipe(DocumentSource((text,)), str(tokenizer), valid_fraction=0), output, workers)
    return time.perf_counter() - start


def _prepare_as_megatron_lm(text: Path, tokenizer: Path, prefix: Path, workers: int) -> float:
    """Does the same with a pool, transformers and Megatron-core's builder; returns the seconds after the imports."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    vocab_size = _load_peer_tokenizer(tokenizer)
    start = time.perf_counter()
    context = multiprocessing.get_context("fork")
    with text.open(encoding="utf-8") as lines, context.Pool(workers, _load_peer_tokenizer, (tokenizer,)) as pool:
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
        for ids in pool.imap(_encode_peer_line, lines, PEER_CHUNK):
            builder.add_document(ids, [len(ids)])
        builder.finalize(f"{prefix}.idx")
    return time.perf_counter() - start


def _load_peer_tokenizer(folder: Path) -> int:
    global _peer_tokenizer
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _peer_tokenizer = AutoTokenizer.from_pretrained(folder)
    return len(_peer_tokenizer)


def _encode_peer_line(line: str) -> list[int]:
    ids = _peer_tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids
    return [*ids, _peer_tokenizer.eos_token_id]
