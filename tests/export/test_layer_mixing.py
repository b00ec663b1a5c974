"""Depth maps that read every small layer: mixed for many large layers at once, with sums that do not depend on it."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from megatron_ligo.arch.spec import layer_index
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export import layer_mixing
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth.operator import Operator
from megatron_ligo.growth.validation import build_initial_operator
from tests.tiny_models import hf_llama, llama_config, memory_of

CPU = torch.device("cpu")
SMALL = llama_config(num_layers=3)
NUM_LARGE_LAYERS = 37


class LearnedDepth(Operator):
    """An operator whose depth maps a fit has changed: every large layer reads every small one."""

    def tensor(self, name: str) -> Tensor:
        tensor = self.start.tensor(name)
        if not name.startswith("depth"):
            return tensor
        return tensor + 0.1 * torch.rand(tensor.shape, generator=self.generator(name)) + 0.01


def learned_operator(**settings) -> LearnedDepth:
    large = LargeSection(num_layers=NUM_LARGE_LAYERS, hidden_size=30, ffn_size=40, num_heads=10, num_kv_heads=5)
    start = build_initial_operator(SMALL, large, OperatorSection(**settings))
    operator = LearnedDepth(start.small, start.large, start.settings)
    operator.start = start
    return operator


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float64])
def source(request):
    return memory_of(hf_llama(SMALL).to(request.param), SMALL)


def mix(operator: Operator, source, keys: list[str]) -> dict[str, Tensor]:
    mixer = layer_mixing.DepthMixer(operator, source, CPU)
    return {key: mixer.mix(key) for key in keys}


def all_keys(operator: Operator, source) -> list[str]:
    return list(GrownReader(operator, source).keys())


@pytest.mark.parametrize("settings", [{}, {"method": "ligo"}, {"method": "stack", "borrow": "next"}])
def test_mixed_tensors_are_those_of_one_key_alone(source, settings):
    operator = learned_operator(**settings)
    for key, tensor in mix(operator, source, all_keys(operator, source)).items():
        expected = operator.mix_layers(key, source.read)
        assert tensor.dtype is expected.dtype and tensor.shape == expected.shape
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7, msg=key)
    for key in () if settings.get("borrow") else ("layers.20.q", "layers.36.down"):
        torch.testing.assert_close(
            GrownReader(operator, source).read(key), operator.grow(key, operator.mix_layers(key, source.read)),
            rtol=1e-5, atol=1e-6,
        )  # fmt: skip


def test_no_order_and_no_number_of_layers_changes_a_bit(source, monkeypatch):
    """A restart, or another number of processes, reads other keys: the bytes of a hand-off stay the same."""
    operator = learned_operator()
    keys = all_keys(operator, source)
    expected = mix(operator, source, keys)
    orders = [keys[::-1], keys[1::2], random.Random(0).sample(keys, len(keys)), sorted(keys)]
    for order in orders:
        for key, tensor in mix(operator, source, order).items():
            assert torch.equal(tensor, expected[key]), key
    monkeypatch.setattr(layer_mixing, "WAITING_BYTES", 0)
    for order in (keys, *orders):
        assert all(torch.equal(tensor, expected[key]) for key, tensor in mix(operator, source, order).items())


def test_small_tensors_are_read_once_for_many_layers(monkeypatch):
    source, operator = memory_of(hf_llama(SMALL), SMALL), learned_operator()
    reads, read = Counter(), source.read
    monkeypatch.setattr(source, "read", lambda key: reads.update([key]) or read(key))
    mixer = layer_mixing.DepthMixer(operator, source, CPU)
    keys = all_keys(operator, source)
    layer_bytes = sum(read(key).nbytes for key in source.keys() if layer_index(key) == 0)  # noqa: SIM118 - no dict
    for key in keys:
        mixer.mix(key)
        waiting = [tensor.nbytes for layers in mixer._waiting.values() for tensor in layers.values()]
        assert sum(waiting) <= layer_bytes * layer_mixing.LAYERS_AT_ONCE
    assert not waiting
    matrices = [key for key in source.keys() if layer_index(key) is not None and len(source.info(key).shape) == 2]  # noqa: SIM118
    # 37 layers in three products.
    assert len(matrices) == 21 and {reads[key] for key in matrices} == {3}


def test_layers_of_another_process_do_not_pile_up():
    source, operator = memory_of(hf_llama(SMALL), SMALL), learned_operator()
    mixer = layer_mixing.DepthMixer(operator, source, CPU)
    for layer in range(0, NUM_LARGE_LAYERS, 3):
        mixer.mix(f"layers.{layer}.gate")
        assert len(mixer._waiting["layers.{}.gate"]) < layer_mixing.LAYERS_AT_ONCE


def test_layers_that_a_map_does_not_read_are_not_read(monkeypatch):
    source = memory_of(hf_llama(SMALL), SMALL)
    operator = build_initial_operator(SMALL, LargeSection(num_layers=6), OperatorSection(method="stack"))
    reads, read = [], source.read
    monkeypatch.setattr(source, "read", lambda key: reads.append(key) or read(key))
    assert torch.equal(layer_mixing.DepthMixer(operator, source, CPU).mix("layers.4.q"), read("layers.1.q"))
    assert reads == ["layers.1.q"]


def test_pieces_and_groups_cover_every_number(monkeypatch):
    """Tensors of many pieces, and more small layers than are in memory at once."""
    monkeypatch.setattr(layer_mixing, "COLUMNS", 100)
    monkeypatch.setattr(layer_mixing, "GROUP_BYTES", 1)
    monkeypatch.setattr(layer_mixing, "MIN_GROUP", 2)
    source, operator = memory_of(hf_llama(SMALL), SMALL), learned_operator()
    keys = all_keys(operator, source)
    for key, tensor in mix(operator, source, keys).items():
        torch.testing.assert_close(tensor, operator.mix_layers(key, source.read), rtol=1e-6, atol=1e-7, msg=key)
