"""The cached order of the samples is used only as it was built."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ligo.data import megatron_dataset
from tests.data.test_data import open_pairs, pairs  # noqa: F401 - pairs: a fixture


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def zero(path: Path) -> None:
    np.save(path, np.zeros_like(np.load(path)))


def with_pickle(path: Path) -> None:
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("damage", [cut, zero, with_pickle, Path.unlink])
@pytest.mark.parametrize("pattern", ["*shuffle_index.npy", "*sample_index.npy", megatron_dataset.INDEX_RECORD])
def test_a_damaged_cache_is_built_again(pairs, tmp_path, caplog, damage, pattern):  # noqa: F811
    data = open_pairs(pairs, tmp_path)
    before, digests = data.train_batch(0, 8, 8, 1, 0)[0]["tokens"], data.index_digests
    damaged = sorted((tmp_path / "cache").glob(f"*/{pattern}"))
    assert damaged
    for path in damaged:
        (damage if path.suffix == ".npy" else Path.unlink)(path)
    again = open_pairs(pairs, tmp_path)
    assert torch.equal(before, again.train_batch(0, 8, 8, 1, 0)[0]["tokens"]) and again.index_digests == digests
    assert caplog.text.count("they are built again") == len({path.parent for path in damaged})
    assert open_pairs(pairs, tmp_path).index_digests == digests
    assert caplog.text.count("they are built again") == len({path.parent for path in damaged})
