import json
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ligo.common.errors import DataError, LayoutError
from megatron_ligo.config.run_config import DataSection
from megatron_ligo.data import indexed_dataset, megatron_dataset
from megatron_ligo.data.text_dataset import TextDataset, open_text_dataset

S = 16


def make_pair(prefix: Path, documents: int, seed: int = 0, vocab: int = 50, dtype=np.uint16) -> str:
    """A pair written by Megatron-core's own builder; lengths 1 to 60."""
    random = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for _ in range(documents):
        ids = random.integers(0, vocab, random.integers(1, 61))
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture
def pairs(tmp_path):
    return {name: make_pair(tmp_path / name, 200, seed) for seed, name in enumerate(("a", "b", "valid"))}


def opened(pairs, tmp_path, train=None, num_train=400, num_valid=16, **changes) -> TextDataset:
    section = DataSection(train=train or (pairs["a"],), valid=(pairs["valid"],), **changes)
    return open_text_dataset(section, S, num_train, num_valid, section.seed, tmp_path / "cache")


def fails(tmp_path, *train, num_train=10, num_valid=0, **changes) -> str:
    with pytest.raises(DataError) as caught:
        section = DataSection(train=train, **changes)
        open_text_dataset(section, S, num_train, num_valid, section.seed, tmp_path / "cache")
    return str(caught.value)


def test_a_micro_batch(pairs, tmp_path):
    (batch,) = opened(pairs, tmp_path).train_batch(0, 4, 4, 1, 0)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "tokens": (torch.int64, (4, S)),
        "labels": (torch.int64, (4, S)),
        "loss_mask": (torch.float32, (4, S)),
    }
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert batch["loss_mask"].min() == 1


def test_a_run_may_begin_behind_the_samples_of_another(pairs, tmp_path):
    section = DataSection(train=(pairs["a"],))
    later = open_text_dataset(section, S, 16, 0, section.seed, tmp_path / "cache", first=24)
    # The order is that of the whole corpus, whatever part of it is asked for.
    all_of_it = opened(pairs, tmp_path, num_train=200)
    assert torch.equal(later.train_batch(1, 8, 8, 1, 0)[0]["tokens"], all_of_it.train_batch(4, 8, 8, 1, 0)[0]["tokens"])


def test_the_layout_does_not_change_what_a_step_reads(pairs, tmp_path):
    data = opened(pairs, tmp_path)
    whole = data.train_batch(3, 8, 8, 1, 0)[0]["tokens"]
    for micro, dp in ((1, 1), (2, 1), (1, 2), (2, 2), (1, 8), (4, 2)):
        ranks = [data.train_batch(3, 8, micro, dp, rank) for rank in range(dp)]
        assert all(len(batches) == 8 // (micro * dp) for batches in ranks)
        # Micro-batch a of all ranks is the next micro x dp samples: Megatron's order.
        dealt = torch.cat([ranks[rank][a]["tokens"] for a in range(len(ranks[0])) for rank in range(dp)])
        assert torch.equal(dealt, whole), (micro, dp)


@settings(deadline=None, max_examples=30)
@given(step=st.integers(0, 9), micro=st.integers(1, 3), dp=st.integers(1, 3), count=st.integers(1, 3))
def test_a_global_batch_is_consecutive_samples(step, micro, dp, count):
    size = micro * dp * count
    rows = [{key: torch.tensor([index]) for key in ("tokens", "labels", "loss_mask")} for index in range(10 * size)]
    data = TextDataset(rows, None, [])
    read = [data.train_batch(step, size, micro, dp, rank) for rank in range(dp)]
    found = sorted(int(value) for batches in read for batch in batches for value in batch["tokens"].flatten())
    assert found == list(range(step * size, (step + 1) * size))


def test_a_step_reads_the_same_after_a_restart(pairs, tmp_path):
    first = opened(pairs, tmp_path).train_batch(17, 8, 2, 1, 0)
    again = opened(pairs, tmp_path).train_batch(17, 8, 2, 1, 0)
    elsewhere = opened(pairs, tmp_path / "other").train_batch(17, 8, 2, 1, 0)
    other_seed = opened(pairs, tmp_path, seed=5).train_batch(17, 8, 2, 1, 0)
    for a, b, c in zip(first, again, elsewhere, strict=True):
        assert torch.equal(a["tokens"], b["tokens"]) and torch.equal(a["tokens"], c["tokens"])
    assert not torch.equal(first[0]["tokens"], other_seed[0]["tokens"])


def test_a_longer_run_begins_alike_within_an_epoch(pairs, tmp_path):
    short, long = (opened(pairs, tmp_path, num_train=count) for count in (40, 80))
    assert torch.equal(short.train_batch(2, 8, 8, 1, 0)[0]["tokens"], long.train_batch(2, 8, 8, 1, 0)[0]["tokens"])


@pytest.mark.parametrize("kind", ["single", "repeated", "weighted", "unweighted"])
def test_the_order_is_that_of_megatrons_builder(pairs, tmp_path, kind):
    listed = {
        "weighted": (0.3, pairs["a"], 0.7, pairs["b"]),
        "unweighted": (pairs["a"], pairs["b"]),
    }.get(kind, (pairs["a"],))
    count = 2000 if kind == "repeated" else 300
    ours = opened(pairs, tmp_path, train=listed, num_train=count)
    prefixes = [entry for entry in listed if isinstance(entry, str)]
    weights = [entry for entry in listed if not isinstance(entry, str)] or None
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=S,
        blend_per_split=[(prefixes, weights), None, None],
        path_to_cache=str(tmp_path / "theirs"),
        tokenizer=megatron_dataset.PlaceholderTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    theirs, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [count, 0, 0], lambda: True, config).build()
    assert len(theirs) >= count
    found = ours.train_batch(0, count, count, 1, 0)[0]
    for index in range(count):
        assert torch.equal(found["tokens"][index], theirs[index]["tokens"]), index


def test_evaluation(pairs, tmp_path):
    data = opened(pairs, tmp_path)
    (whole,) = data.eval_batch(8, 8, 1, 0)
    halves = [data.eval_batch(8, 4, 2, rank)[0]["tokens"] for rank in range(2)]
    assert torch.equal(torch.cat(halves), whole["tokens"])
    assert data.eval_digest(8) == opened(pairs, tmp_path / "x").eval_digest(8) != data.eval_digest(4)
    section = DataSection(train=(pairs["a"],))
    with pytest.raises(DataError, match=r"data\.valid"):
        open_text_dataset(section, S, 10, 0, 0, tmp_path / "cache").eval_batch(1, 1, 1, 0)
    assert "data.valid" in fails(tmp_path, pairs["a"], num_valid=1)


def test_a_short_corpus_is_repeated_and_the_log_says_so(pairs, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        data = opened(pairs, tmp_path, num_train=2000)
    assert "repeated" in caplog.text
    assert len(data.train_batch(249, 8, 8, 1, 0)[0]["tokens"]) == 8


def test_what_cannot_be_dealt_is_refused(pairs, tmp_path):
    data = opened(pairs, tmp_path, num_train=40)
    with pytest.raises(LayoutError, match=r"multiple of micro_batch_size x dp = 2 x 3"):
        data.train_batch(0, 8, 2, 3, 0)
    with pytest.raises(DataError, match="train samples: expected at least"):
        data.train_batch(1000, 8, 1, 1, 0)


# Damaged input


def test_all_missing_files_in_one_error(pairs, tmp_path):
    text = fails(tmp_path, "no/such", pairs["b"] + ".bin", valid=("nor/this",), num_valid=1)
    assert "6 problems" in text and "without .bin or .idx" in text and "this.idx" in text
    assert "data.train" in fails(tmp_path)


def rewrite(path: str, change) -> None:
    raw = bytearray(Path(path).read_bytes())
    changed = change(raw)
    Path(path).write_bytes(raw if changed is None else changed)


def put(offset: int, form: str, value: int):
    return lambda raw: struct.pack_into(form, raw, offset, value)


@pytest.mark.parametrize(
    ("kind", "change", "part"),
    [
        ("bin", lambda raw: raw[:-2], "bytes by its index"),
        ("bin", lambda raw: raw[:-1], "bytes by its index"),
        ("bin", lambda raw: b"", "bytes by its index"),
        ("bin", lambda raw: raw + b"\0\0", "bytes by its index"),
        ("idx", lambda raw: raw[:20], "at least 34 bytes"),
        ("idx", lambda raw: raw[:-1], "The file is cut"),
        ("idx", lambda raw: b"X" + raw[1:], "a Megatron-core index"),
        ("idx", put(9, "<Q", 2), "version 2"),
        ("idx", put(17, "<B", 7), "whole-number token type"),
        ("idx", put(17, "<B", 4), "bytes by its index"),
        ("idx", put(18, "<Q", 1 << 60), "bytes for"),
        ("idx", put(34, "<i", -5), "no negative length"),
        ("idx", put(34 + 4 * 200, "<q", -2), "sequences within"),
        ("idx", put(34 + 12 * 200, "<q", 3), "document ends that rise"),
    ],
)
def test_damaged_pairs(pairs, tmp_path, kind, change, part):
    rewrite(f"{pairs['a']}.{kind}", change)
    assert part in fails(tmp_path, pairs["a"])


def test_too_little_text(pairs, tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "tiny.bin"), dtype=np.uint16)
    builder.add_document(np.arange(S), [S])
    builder.finalize(str(tmp_path / "tiny.idx"))
    assert f"more than seq_length = {S} tokens" in fails(tmp_path, str(tmp_path / "tiny"))
    assert "a weight" in fails(tmp_path, pairs["a"], pairs["b"], num_train=10_000)


def test_token_ids_the_model_does_not_have(pairs, tmp_path):
    data = opened(pairs, tmp_path)
    data.check_vocab(50)
    with pytest.raises(DataError, match=r"2 problems[\s\S]*token ids from 0 to 48, as the model has, found 49"):
        data.check_vocab(49)


def test_ids_are_checked_as_they_are_read(pairs, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("megatron_ligo.data.text_dataset.SCAN_BYTES", 0)
    data = opened(pairs, tmp_path)
    with caplog.at_level(logging.INFO):
        data.check_vocab(20)
    assert "as they are read" in caplog.text
    with pytest.raises(DataError, match="train samples 0 to 7"):
        data.train_batch(0, 8, 8, 1, 0)


def write_record(prefix: str, **changes) -> None:
    sizes = {
        "idx_digest": indexed_dataset.digest_file(f"{prefix}.idx"),
        "bin_bytes": Path(f"{prefix}.bin").stat().st_size,
    }
    Path(f"{prefix}.json").write_text(json.dumps({**sizes, "max_token": 49, "tokenizer": "t", **changes}))


def test_records(pairs, tmp_path):
    write_record(pairs["a"], max_token=77)
    with pytest.raises(DataError, match="found 77"):
        opened(pairs, tmp_path).check_vocab(60)
    write_record(pairs["a"], bin_bytes=3)
    assert "the record of this pair" in fails(tmp_path, pairs["a"])
    Path(pairs["a"] + ".json").write_text("{")
    assert "the record of a prepared pair" in fails(tmp_path, pairs["a"])


def test_tokenizers_must_agree(pairs, tmp_path):
    write_record(pairs["a"])
    write_record(pairs["valid"], tokenizer="u")
    assert "expected tokenizer t, found u" in fails(tmp_path, pairs["a"], valid=(pairs["valid"],), num_valid=1)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    assert "neither" in fails(tmp_path, pairs["a"], tokenizer=str(folder))
    (folder / "tokenizer.json").write_text("{}")
    assert "Prepare it with the same tokenizer" in fails(tmp_path, pairs["a"], tokenizer=str(folder))


def test_data_made_again_are_not_read_through_old_indices(pairs, tmp_path):
    before = opened(pairs, tmp_path).train_batch(0, 8, 8, 1, 0)[0]["tokens"]
    make_pair(tmp_path / "a", 150, seed=9)
    after = opened(pairs, tmp_path).train_batch(0, 8, 8, 1, 0)[0]["tokens"]
    assert not torch.equal(before, after)


def test_a_damaged_cache_is_named(pairs, tmp_path):
    opened(pairs, tmp_path)
    for path in (tmp_path / "cache").glob("*/*shuffle_index.npy"):
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="Remove the folder"):
        opened(pairs, tmp_path)


def test_indices_left_by_a_killed_run_are_not_taken(pairs, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            opened(pairs, tmp_path)
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
    opened(pairs, tmp_path)


# Several processes


def opened_by_ranks(a: str, b: str, valid: str, cache: str, vocab: int) -> list:
    """What each of the ranks found: digest and tokens, or what it was told."""
    try:
        data = open_text_dataset(DataSection(train=(0.5, a, 0.5, b), valid=(valid,)), 16, 400, 16, 1, cache)
        data.check_vocab(vocab)
        said = data.eval_digest(16), data.train_batch(7, 8, 2, 1, 0)[0]["tokens"].sum().item()
    except DataError as error:
        said = str(error)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, said)
    return everyone


def test_ranks_build_once_and_read_alike(pools, pairs, tmp_path):
    one, other = pools(2).run(opened_by_ranks, cache=str(tmp_path / "cache"), vocab=50, **pairs)
    assert one == other and not isinstance(one, str), one
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("fault", ["cache", "vocab"])
def test_a_fault_of_rank_0_is_told_to_all(pools, pairs, tmp_path, fault):
    (tmp_path / "file").write_text("in the way")
    cache, vocab = (tmp_path / "file" / "cache", 50) if fault == "cache" else (tmp_path / "cache", 49)
    one, other = pools(2).run(opened_by_ranks, cache=str(cache), vocab=vocab, **pairs)
    assert one == other
    assert ("sample indices" if fault == "cache" else "as the model has") in one
