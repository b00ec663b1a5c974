"""Token codes: pair counts against a dictionary, the decomposition against a dense one, and their use in starts."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from megatron_ligo.checkpoint import formats
from megatron_ligo.common.errors import ConfigError, DataError, ErrorCollector, LigoError
from megatron_ligo.config.run_config import OperatorSection, RunConfig
from megatron_ligo.data import pair_counts
from megatron_ligo.data.indexed_dataset import open_indexed_files
from megatron_ligo.data.pair_counts import count_pairs
from megatron_ligo.data.token_codes import build_codes
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth.codes.codes_file import read_codes
from megatron_ligo.growth.codes.spectral_codes import PairCounts, token_codes
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.models.full.parameters import build_initial_weights
from megatron_ligo.training.initial_weights import scratch_model_config
from tests.tiny_models import hf_llama, llama_config
from tests.training.test_pretrain import make_pair

SMALL = llama_config(tied=True)


def stored(prefix):
    errors = ErrorCollector("data", DataError)
    file = open_indexed_files(str(prefix), errors)
    errors.raise_if_any()
    return file, np.fromfile(f"{prefix}.bin", dtype=file.dtype).astype(int).tolist()


@pytest.fixture
def base(tmp_path):
    make_pair(tmp_path / "train", 0)
    hf_llama(SMALL).save_pretrained(tmp_path / "small")
    return tmp_path


def config_of(base, **operator) -> RunConfig:
    table = RunConfig().to_dict()
    table["small"]["path"] = str(base / "small")
    table["large"] |= {"hidden_size": 32, "ffn_size": 40}
    table["data"] |= {"train": [str(base / "train")]}
    table["operator"] |= operator
    return RunConfig.from_dict(table)


def test_pairs_are_counted_across_chunks_and_threads(base, monkeypatch):
    file, tokens = stored(base / "train")
    monkeypatch.setattr(pair_counts, "CHUNK_TOKENS", 100)
    pairs, seen = count_pairs([file], SMALL.vocab_size, 0, threads=3)
    expected = Counter(pairwise(tokens))
    counted = zip(pairs.first.tolist(), pairs.second.tolist(), pairs.count.tolist(), strict=True)
    assert {(a, b): n for a, b, n in counted} == expected and seen == len(tokens)
    part, seen = count_pairs([file], SMALL.vocab_size, 300, threads=2)
    assert seen == 300 and float(part.count.sum()) == 300
    # The memory is bounded: what was seen once goes first.
    few, _ = count_pairs([file], SMALL.vocab_size, 0, threads=1, max_pairs=200)
    assert len(few.count) < len(pairs.count) and float(few.count.max()) > 1


def test_a_token_outside_the_vocabulary_is_an_error(base):
    file, tokens = stored(base / "train")
    with pytest.raises(DataError, match="token ids from 0"):
        count_pairs([file], max(tokens), 0, threads=1)


def test_codes_span_the_leading_singular_vectors():
    """Against a dense decomposition, without what the old embedding and the constant hold."""
    drawn, size = torch.Generator().manual_seed(0), 60
    topics = torch.randn(size, 3, generator=drawn)
    table = torch.poisson((topics @ torch.randn(3, size, generator=drawn)).exp().clamp(max=200), generator=drawn)
    first, second = table.nonzero().unbind(1)
    old = torch.randn(size, 5, generator=drawn)
    result = token_codes(PairCounts(first, second, table[first, second].double(), size), 8, 1, old).codes

    chance = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / table.sum()
    ppmi = (table / chance).log().clamp(min=0).nan_to_num(0)
    known = torch.linalg.qr(torch.cat([torch.ones(size, 1), old], dim=1))[0]
    both = torch.cat([ppmi, ppmi.T], dim=1)
    vectors, values, _ = torch.linalg.svd(both - known @ (known.T @ both), full_matrices=False)
    assert float((known.T @ result).abs().max()) < 1e-3
    assert float(result.square().mean()) == pytest.approx(1, rel=1e-4)
    expected = vectors[:, :8] * values[:8].sqrt()
    expected /= expected.square().mean().sqrt()
    agreement = torch.linalg.svdvals(torch.linalg.qr(expected[:, :3])[0].T @ torch.linalg.qr(result[:, :3])[0])
    assert float(agreement.min()) > 0.999
    assert torch.allclose(result[:, :3].abs(), expected[:, :3].abs(), atol=0.05)


def test_codes_start_a_growth_and_scratch(base):
    config = config_of(base, method="corner", codes=str(base / "codes"))
    large, source = scratch_model_config(config), formats.open_small(config.small)
    record = build_codes(config, large, base / "codes", source, 0)
    assert record["codes"] == 32 - SMALL.hidden_size and record["flops"] > 0
    again = build_codes(config, large, base / "again", source, 0)
    assert (base / "again" / "codes.safetensors").read_bytes() == (base / "codes" / "codes.safetensors").read_bytes()
    assert again["tensors_digest"] == record["tensors_digest"]

    grown = GrownReader(build_initial_operator(SMALL, config.large, config.operator), source)
    embed, codes = grown.read("embed"), read_codes(base / "codes", SMALL.vocab_size, record["codes"])
    assert torch.equal(embed[:, : SMALL.hidden_size], source.read("embed"))
    assert torch.allclose(embed[:, SMALL.hidden_size :], codes * 32**-0.5)
    plain = GrownReader(build_initial_operator(SMALL, config.large, OperatorSection(method="corner")), source)
    assert torch.equal(grown.read("layers.0.down"), plain.read("layers.0.down"))
    assert grown.fingerprint() != plain.fingerprint()

    build_codes(config, large, base / "scratch", None, 0)
    embed = build_initial_weights(large, 1, str(base / "scratch"))("embed")
    assert float(embed.square().mean()) == pytest.approx(1 / 32, rel=1e-3)
    assert torch.equal(
        build_initial_weights(large, 1)("layers.0.q"), build_initial_weights(large, 1, "x")("layers.0.q")
    )


def test_unusable_codes_are_refused(base):
    config = config_of(base, method="corner", codes=str(base / "nothing"))
    source = formats.open_small(config.small)
    grown = GrownReader(build_initial_operator(SMALL, config.large, config.operator), source)
    with pytest.raises(LigoError, match="token codes"):
        grown.read("embed")
    large = scratch_model_config(config)
    build_codes(config, large, base / "nothing", source, 0)
    with pytest.raises(LigoError, match="codes of 9 tokens"):
        read_codes(base / "nothing", 9, 8)
    with pytest.raises(ConfigError, match="the number of codes"):
        token_codes(PairCounts(torch.tensor([0]), torch.tensor([1]), torch.ones(1).double(), 5), 5, 1)
    with pytest.raises(ConfigError, match="a new folder"):
        build_codes(config, large, base / "small", source, 0)
