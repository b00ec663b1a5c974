"""Worker processes that encode text."""

from __future__ import annotations

import multiprocessing.util
import os
import signal
from pathlib import Path

import pytest
import tokenizers

from megatron_ligo.common.errors import DataError
from megatron_ligo.data.corpus.encoding_pool import ChunkEncoder, EncodingPool
from megatron_ligo.data.documents import DocumentSource
from megatron_ligo.data.tokenizer import load_tokenizer


def make_pool(folder: Path, json_key: str) -> EncodingPool:
    inner = tokenizers.ByteLevelBPETokenizer()
    inner.train_from_iterator(["good files"], 300, special_tokens=["<|endoftext|>"], show_progress=False)
    inner.save(f"{folder / 'tokenizer.json'}")
    (folder / "text.txt").write_text("good files")
    source = DocumentSource((folder / "text.txt",)).cut("<|endoftext|>", (), held_out=False)
    return EncodingPool(ChunkEncoder(load_tokenizer(folder), json_key, 0.0), source.read_chunks(), 2, folder)


def test_the_workers_encode_what_one_process_does(tmp_path):
    pool = make_pool(tmp_path, "text")
    (_, encoded), *others = pool
    assert not others and encoded.ids[:-1].tolist() == pool.encoder.tokenizer.encode("good files")
    assert not pool.file.exists()


def test_a_worker_that_is_killed_as_it_starts_is_told(tmp_path, monkeypatch):
    """However much a worker is given, no more than its pipe holds is written before it reads."""
    spawn = multiprocessing.util.spawnv_passfds

    def spawn_and_kill(path, args, fds):
        child = spawn(path, args, fds)
        if "--multiprocessing-fork" in args:
            os.kill(child, signal.SIGKILL)
        return child

    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", spawn_and_kill)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for ever"))
    signal.alarm(90)
    try:
        with pytest.raises(DataError, match="a tokenizer worker: expected token ids, found an abrupt exit"):
            list(make_pool(tmp_path, "k" * 200_000))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not (tmp_path / ".encoder").exists()
