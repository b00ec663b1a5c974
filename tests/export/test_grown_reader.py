"""A grown model computes its tensors from the small one's, of which it keeps a bounded number."""

from __future__ import annotations

import torch

from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export import grown_reader
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth.validation import build_initial_operator
from tests.tiny_models import hf_llama, llama_config, memory_of


def test_dense_depth_keeps_a_bounded_part_of_the_small_model(monkeypatch):
    small = llama_config(num_layers=3)
    operator = build_initial_operator(small, LargeSection(num_layers=5), OperatorSection(method="stack"))
    source = memory_of(hf_llama(small), small)
    # As if every large layer combined all small ones.
    monkeypatch.setattr(GrownReader, "_mixes_layers", lambda self, key: self.arch.param(key).in_layer)
    grown = {}
    for limit in (10_000, 0, 1 << 30):
        monkeypatch.setattr(grown_reader, "CACHE_BYTES", limit)
        reader = GrownReader(operator, source)
        grown[limit] = {key: reader.read(key) for key in reader.keys()}  # noqa: SIM118 - no dict
        kept = sum(tensor.nbytes for tensor in reader._cached.values())
        assert kept <= limit and (kept > 0) == (limit > 0)
    for limit in (0, 10_000):
        assert all(torch.equal(tensor, grown[1 << 30][key]) for key, tensor in grown[limit].items())
