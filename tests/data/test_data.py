import json
import logging
import struct
from collections.abc import Callable
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

from megatron_ligo.common.errors import DataError, LayoutError, Problem
from megatron_ligo.config.run_config import DataSection
from megatron_ligo.data import indexed_dataset, megatron_dataset
from megatron_ligo.data.text_dataset import TextDataset, open_text_dataset

S = 16


def make_pair(prefix: Path, documents: int, seed: int = 0, vocab: int = 50, dtype=np.uint16) -> str:
    """Writes a .bin/.idx pair with Megatron-core's builder; documents have 1 to 60 tokens."""
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


def open_pairs(pairs, tmp_path, train=None, num_train=400, num_valid=16, **changes) -> TextDataset:
    section = DataSection(train=train or (pairs["a"],), valid=(pairs["valid"],), **changes)
    return open_text_dataset(section, S, num_train, num_valid, section.seed, tmp_path / "cache")


def open_problems(tmp_path, *train, num_train=10, num_valid=0, **changes) -> dict[str, Problem]:
    """Opens data that must be refused; returns the problems by location."""
    with pytest.raises(DataError) as error:
        section = DataSection(train=train, **changes)
        open_text_dataset(section, S, num_train, num_valid, section.seed, tmp_path / "cache")
    return {problem.where: problem for problem in error.value.problems}


def test_a_micro_batch(pairs, tmp_path):
    (batch,) = open_pairs(pairs, tmp_path).train_batch(0, 4, 4, 1, 0)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "tokens": (torch.int64, (4, S)),
        "labels": (torch.int64, (4, S)),
        "loss_mask": (torch.float32, (4, S)),
    }
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert batch["loss_mask"].min() == 1


def test_a_run_may_start_after_another_runs_samples(pairs, tmp_path):
    section = DataSection(train=(pairs["a"],))
    later = open_text_dataset(section, S, 16, 0, section.seed, tmp_path / "cache", first_sample=24)
    # The order is that of the whole corpus, whichever part a run reads.
    whole = open_pairs(pairs, tmp_path, num_train=200)
    assert torch.equal(later.train_batch(1, 8, 8, 1, 0)[0]["tokens"], whole.train_batch(4, 8, 8, 1, 0)[0]["tokens"])


def test_the_layout_does_not_change_what_a_step_reads(pairs, tmp_path):
    data = open_pairs(pairs, tmp_path)
    whole = data.train_batch(3, 8, 8, 1, 0)[0]["tokens"]
    for micro, dp in ((1, 1), (2, 1), (1, 2), (2, 2), (1, 8), (4, 2)):
        ranks = [data.train_batch(3, 8, micro, dp, rank) for rank in range(dp)]
        assert all(len(batches) == 8 // (micro * dp) for batches in ranks)
        # Micro-batch a of all ranks together is the next micro x dp samples, as in Megatron.
        dealt = torch.cat([ranks[rank][a]["tokens"] for a in range(len(ranks[0])) for rank in range(dp)])
        assert torch.equal(dealt, whole), (micro, dp)


@settings(deadline=None, max_examples=30)
@given(step=st.integers(0, 9), micro=st.integers(1, 3), dp=st.integers(1, 3), count=st.integers(1, 3))
def test_a_global_batch_is_consecutive_samples(step, micro, dp, count):
    size = micro * dp * count
    rows = [{key: torch.tensor([index]) for key in ("tokens", "labels", "loss_mask")} for index in range(10 * size)]
    data = TextDataset(rows, None, [])
    ranks = [data.train_batch(step, size, micro, dp, rank) for rank in range(dp)]
    indices = sorted(int(value) for batches in ranks for batch in batches for value in batch["tokens"].flatten())
    assert indices == list(range(step * size, (step + 1) * size))


def test_a_step_reads_the_same_after_a_restart(pairs, tmp_path):
    first = open_pairs(pairs, tmp_path).train_batch(17, 8, 2, 1, 0)
    again = open_pairs(pairs, tmp_path).train_batch(17, 8, 2, 1, 0)
    elsewhere = open_pairs(pairs, tmp_path / "other").train_batch(17, 8, 2, 1, 0)
    other_seed = open_pairs(pairs, tmp_path, seed=5).train_batch(17, 8, 2, 1, 0)
    for a, b, c in zip(first, again, elsewhere, strict=True):
        assert torch.equal(a["tokens"], b["tokens"]) and torch.equal(a["tokens"], c["tokens"])
    assert not torch.equal(first[0]["tokens"], other_seed[0]["tokens"])


def test_a_longer_run_starts_with_the_same_samples_within_an_epoch(pairs, tmp_path):
    short, long = (open_pairs(pairs, tmp_path, num_train=count) for count in (40, 80))
    assert torch.equal(short.train_batch(2, 8, 8, 1, 0)[0]["tokens"], long.train_batch(2, 8, 8, 1, 0)[0]["tokens"])


@pytest.mark.parametrize("kind", ["single", "repeated", "weighted", "unweighted"])
def test_the_sample_order_is_that_of_megatrons_builder(pairs, tmp_path, kind):
    entries = {
        "weighted": (0.3, pairs["a"], 0.7, pairs["b"]),
        "unweighted": (pairs["a"], pairs["b"]),
    }.get(kind, (pairs["a"],))
    count = 2000 if kind == "repeated" else 300
    ours = open_pairs(pairs, tmp_path, train=entries, num_train=count)
    prefixes = [entry for entry in entries if isinstance(entry, str)]
    weights = [entry for entry in entries if not isinstance(entry, str)] or None
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
    (batch,) = ours.train_batch(0, count, count, 1, 0)
    for index in range(count):
        assert torch.equal(batch["tokens"][index], theirs[index]["tokens"]), index


def test_evaluation(pairs, tmp_path):
    data = open_pairs(pairs, tmp_path)
    ((count, (whole,)),) = data.eval_parts(8, 8, 1, 0)
    assert count == 8
    halves = [data.eval_parts(8, 4, 2, rank)[0][1][0]["tokens"] for rank in range(2)]
    assert torch.equal(torch.cat(halves), whole["tokens"])
    # 8 = 2 ranks x 3 micro-batches of 1 and 2 more that both ranks read; 4 does not divide 7.
    for samples, ranks, sizes in ((8, 3, [6, 2]), (7, 2, [6, 1]), (2, 4, [2])):
        parts = [data.eval_parts(samples, 1, ranks, rank) for rank in range(ranks)]
        assert all([count for count, _ in own] == sizes for own in parts)
        *shared, rest = zip(*([batches for _, batches in own] for own in parts), strict=True)
        read = [
            batch["tokens"]
            for batches in (*zip(*(shared[0] if shared else ()), strict=True), rest[0])
            for batch in batches
        ]
        assert torch.equal(torch.cat(read), whole["tokens"][:samples])
        assert all(len(own) == len(rest[0]) for own in rest)
    assert data.eval_digest(8) == open_pairs(pairs, tmp_path / "x").eval_digest(8) != data.eval_digest(4)
    section = DataSection(train=(pairs["a"],))
    with pytest.raises(DataError) as error:
        open_text_dataset(section, S, 10, 0, 0, tmp_path / "cache").eval_parts(1, 1, 1, 0)
    assert error.value.problems[0].where == "data.valid"
    assert list(open_problems(tmp_path, pairs["a"], num_valid=1)) == ["data.valid"]


def test_a_short_corpus_is_repeated_and_the_log_says_so(pairs, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        data = open_pairs(pairs, tmp_path, num_train=2000)
    assert "repeated" in caplog.text
    assert len(data.train_batch(249, 8, 8, 1, 0)[0]["tokens"]) == 8


def test_indivisible_batches_and_missing_samples_are_refused(pairs, tmp_path):
    data = open_pairs(pairs, tmp_path, num_train=40)
    with pytest.raises(LayoutError) as indivisible:
        data.train_batch(0, 8, 2, 3, 0)
    assert "2 x 3" in indivisible.value.problems[0].expected and indivisible.value.problems[0].found == "8"
    with pytest.raises(DataError) as exhausted:
        data.train_batch(1000, 8, 1, 1, 0)
    assert exhausted.value.problems[0].where == "train samples" and "8008" in exhausted.value.problems[0].expected


# Damaged input


def test_all_missing_files_are_reported_at_once(pairs, tmp_path):
    problems = open_problems(tmp_path, "no/such", pairs["b"] + ".bin", valid=("nor/this",), num_valid=1)
    prefixes = [Path("no/such").resolve(), pairs["b"] + ".bin", Path("nor/this").resolve()]
    assert set(problems) == {f"{prefix}.{suffix}" for prefix in prefixes for suffix in ("bin", "idx")}
    assert "without .bin or .idx" in problems[f"{pairs['b']}.bin.bin"].hint
    assert list(open_problems(tmp_path)) == ["data.train"]
    (tmp_path / "a.txt").write_text("a text")
    assert {p.hint for p in open_problems(tmp_path, str(tmp_path / "a.txt")).values()} == {
        "Make data of the text first: ligo prepare."
    }
    folder = Path(pairs["b"]).parent
    (hint,) = {problem.hint for problem in open_problems(tmp_path, str(folder)).values()}
    assert hint.startswith("Give a prefix in that folder: ") and Path(pairs["b"]).name in hint


def rewrite(path: str, change: Callable[[bytearray], bytes | None]) -> None:
    """Applies a change to a file's content: in place, or by returning the new content."""
    raw = bytearray(Path(path).read_bytes())
    changed = change(raw)
    Path(path).write_bytes(raw if changed is None else changed)


def put(offset: int, layout: str, value: int) -> Callable[[bytearray], None]:
    return lambda raw: struct.pack_into(layout, raw, offset, value)


@pytest.mark.parametrize(
    ("suffix", "change", "where", "expected", "found"),
    [
        ("bin", lambda raw: raw[:-2], "bin", "bytes", ""),
        ("bin", lambda raw: raw[:-1], "bin", "bytes", ""),
        ("bin", lambda raw: b"", "bin", "bytes", "0"),
        ("bin", lambda raw: raw + b"\0\0", "bin", "bytes", ""),
        ("idx", lambda raw: raw[:20], "idx", "34 bytes", "20"),
        ("idx", lambda raw: raw[:-1], "idx", "200 sequences", ""),
        ("idx", lambda raw: b"X" + raw[1:], "idx", "version 1", "XMIDIDX"),
        ("idx", put(9, "<Q", 2), "idx", "version 1", "version 2"),
        ("idx", put(17, "<B", 7), "idx", "[1, 2, 3, 4, 5, 8]", "code 7"),
        ("idx", put(17, "<B", 4), "bin", "bytes", ""),
        ("idx", put(18, "<Q", 1 << 60), "idx", f"{1 << 60} sequences", ""),
        ("idx", put(34, "<i", -5), "bin", "length", "-5"),
        ("idx", put(34 + 4 * 200, "<q", -2), "bin", "sequences within", "-2"),
        ("idx", put(34 + 12 * 200, "<q", 3), "bin", "0 to 200", "[3, "),
    ],
)
def test_damaged_pairs(pairs, tmp_path, suffix, change, where, expected, found):
    rewrite(f"{pairs['a']}.{suffix}", change)
    problems = open_problems(tmp_path, pairs["a"])
    assert list(problems) == [f"{pairs['a']}.{where}"]
    (problem,) = problems.values()
    assert expected in problem.expected and found in problem.found


def test_too_little_text(pairs, tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "tiny.bin"), dtype=np.uint16)
    builder.add_document(np.arange(S), [S])
    builder.finalize(str(tmp_path / "tiny.idx"))
    problem = open_problems(tmp_path, str(tmp_path / "tiny"))[f"{tmp_path}/tiny.bin"]
    assert f"seq_length = {S}" in problem.expected and problem.found == f"{S}"
    problems = open_problems(tmp_path, pairs["a"], pairs["b"], num_train=10_000)
    assert "10000 samples" in problems["data.train"].expected and "weight" in problems["data.train"].hint


def test_token_ids_outside_the_vocabulary(pairs, tmp_path):
    data = open_pairs(pairs, tmp_path)
    data.check_vocab(50)
    with pytest.raises(DataError) as error:
        data.check_vocab(49)
    assert {problem.where for problem in error.value.problems} == {f"{pairs[name]}.bin" for name in ("a", "valid")}
    assert all("0 to 48" in problem.expected and problem.found == "49" for problem in error.value.problems)


def test_token_ids_of_large_data_are_checked_in_each_batch(pairs, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("megatron_ligo.data.text_dataset.SCAN_BYTES", 0)
    data = open_pairs(pairs, tmp_path)
    with caplog.at_level(logging.INFO):
        data.check_vocab(20)
    assert f"{pairs['a']} has no record" in caplog.text
    with pytest.raises(DataError) as error:
        data.train_batch(0, 8, 8, 1, 0)
    assert error.value.problems[0].where == "train samples 0 to 7"


def write_record(prefix: str, **changes) -> None:
    sizes = {
        "idx_digest": indexed_dataset.digest_file(f"{prefix}.idx"),
        "bin_bytes": Path(f"{prefix}.bin").stat().st_size,
    }
    Path(f"{prefix}.json").write_text(json.dumps({**sizes, "max_token": 49, "tokenizer": "t", **changes}))


def test_records(pairs, tmp_path):
    write_record(pairs["a"], max_token=77)
    with pytest.raises(DataError) as error:
        open_pairs(pairs, tmp_path).check_vocab(60)
    assert error.value.problems[0].found == "77"
    write_record(pairs["a"], bin_bytes=3)
    path = Path(pairs["a"] + ".json")
    assert ".idx digest" in open_problems(tmp_path, pairs["a"])[str(path)].expected
    for changes in ({"tokenizer": {}}, {"max_token": "49"}, {"max_token": True}):
        write_record(pairs["a"], **changes)
        assert "tokenizer no text" in open_problems(tmp_path, pairs["a"])[str(path)].found
    path.write_text("{")
    assert "JSONDecodeError" in open_problems(tmp_path, pairs["a"])[str(path)].found


def test_tokenizers_must_agree(pairs, tmp_path):
    write_record(pairs["a"])
    write_record(pairs["valid"], tokenizer="u")
    problem = open_problems(tmp_path, pairs["a"], valid=(pairs["valid"],), num_valid=1)[f"{pairs['valid']}.json"]
    assert problem.expected == "tokenizer t" and problem.found == "u"
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    assert list(open_problems(tmp_path, pairs["a"], tokenizer=str(folder))) == [str(folder)]
    (folder / "tokenizer.json").write_text("{}")
    assert list(open_problems(tmp_path, pairs["a"], tokenizer=str(folder))) == [f"{pairs['a']}.json"]


def test_data_that_were_prepared_again_get_new_indices(pairs, tmp_path):
    before = open_pairs(pairs, tmp_path).train_batch(0, 8, 8, 1, 0)[0]["tokens"]
    make_pair(tmp_path / "a", 150, seed=9)
    after = open_pairs(pairs, tmp_path).train_batch(0, 8, 8, 1, 0)[0]["tokens"]
    assert not torch.equal(before, after)


def test_partial_indices_of_a_killed_run_are_not_used(pairs, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            open_pairs(pairs, tmp_path)
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
    open_pairs(pairs, tmp_path)


# Several ranks


def open_on_ranks(a: str, b: str, valid: str, cache: str, vocab: int) -> list:
    """Gathers what each rank reads (digest of the evaluation batch, sum of tokens), or the error it gets."""
    try:
        data = open_text_dataset(DataSection(train=(0.5, a, 0.5, b), valid=(valid,)), 16, 400, 16, 1, cache)
        data.check_vocab(vocab)
        result = data.eval_digest(16), data.train_batch(7, 8, 2, 1, 0)[0]["tokens"].sum().item()
    except DataError as error:
        result = str(error)
    results = [None] * dist.get_world_size()
    dist.all_gather_object(results, result)
    return results


def test_indices_are_built_once_and_read_by_all_ranks(pools, pairs, tmp_path):
    first, second = pools(2).run(open_on_ranks, cache=str(tmp_path / "cache"), vocab=50, **pairs)
    assert first == second and not isinstance(first, str), first
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("fault", ["cache", "vocab"])
def test_all_ranks_raise_rank_0s_error(pools, pairs, tmp_path, fault):
    (tmp_path / "file").write_text("not a folder")
    cache, vocab = (tmp_path / "file" / "cache", 50) if fault == "cache" else (tmp_path / "cache", 49)
    first, second = pools(2).run(open_on_ranks, cache=str(cache), vocab=vocab, **pairs)
    assert first == second
    assert (str(cache) if fault == "cache" else "0 to 48") in first
