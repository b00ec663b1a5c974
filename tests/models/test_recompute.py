"""Recomputed layers: the backward pass holds the activations of one layer, and stops where it has all that it needs."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from megatron_ligo.distributed import mesh as meshes
from megatron_ligo.models.factored.context import FactoredContext
from megatron_ligo.models.factored.factored_model import FactoredModel
from megatron_ligo.models.factored.small_weights import SmallWeights
from megatron_ligo.models.full.gpt import FullGPT
from megatron_ligo.models.mcore import layer_calls
from megatron_ligo.models.mcore.layer_spec import BuildOptions
from tests.layer_norm_models import memory_of, model_of
from tests.models.factored import fit_cases
from tests.models.factored.fit_reference import make_operator
from tests.tiny_models import llama_config

LAYERS, BATCH, LENGTH = 10, 4, 64


class PeakBytes(TorchDispatchMode):
    """Tracks the bytes of the tensors that are made inside and still alive."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.storages = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.storages:
                storage = tensor.untyped_storage()
                self.storages[storage] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._release, storage.nbytes())
        return out

    def _release(self, count: int) -> None:
        self.live -= count


def _build_full(recompute: bool) -> tuple[nn.Module, int]:
    config = llama_config(num_layers=LAYERS, max_positions=LENGTH)
    model = FullGPT(config, BuildOptions(), meshes.build_mesh(1, 1), recompute)
    for parameter in model.parameters():
        nn.init.normal_(parameter.data, std=0.02)
    return model, config.vocab_size


def _build_factored(recompute: bool) -> tuple[nn.Module, int]:
    small = fit_cases.small_dims({"max_positions": LENGTH})
    operator = make_operator(small, {**fit_cases.LARGE, "num_layers": LAYERS}, {})
    mesh = meshes.build_mesh(1, 1)
    weights = SmallWeights(operator, memory_of(model_of(small), small), mesh, 1, False)
    context = FactoredContext(operator, weights, mesh, torch.float32, tokens_per_step=8192, recompute=recompute)
    return FactoredModel(context), operator.large.vocab_size


def _peak(build, recompute: bool) -> float:
    """Returns the peak of a forward and backward pass over the size of one layer's input."""
    model, vocab_size = build(recompute)
    model.train()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (BATCH, LENGTH + 1), generator=draw)
    with PeakBytes() as bytes_:
        model(ids[:, :-1], ids[:, 1:], torch.ones(BATCH, LENGTH)).backward()
    return bytes_.peak


@pytest.mark.parametrize("build", [_build_full, _build_factored])
def test_the_backward_pass_holds_one_layers_activations(monkeypatch, build):
    meshes.init_distributed()
    peak, without = _peak(build, recompute=True), _peak(build, recompute=False)
    # The reference runs each layer to its end, which keeps nothing, but would run ZeRO 3's hooks once too often.
    monkeypatch.setattr(layer_calls, "checkpoint", partial(_checkpoint_to_the_end, layer_calls.checkpoint))
    complete = _peak(build, recompute=True)
    assert complete < 0.8 * without, "the model is too small for recomputation to matter"
    assert peak <= 1.05 * complete


def _checkpoint_to_the_end(checkpoint, *arguments, **options):
    return checkpoint(*arguments, **{**options, "early_stop": False})


def test_the_recomputation_stops_at_the_last_tensor_that_is_needed():
    ends = []

    def layer(h: Tensor) -> Tensor:
        out = torch.tanh(h)
        ends.append(1)
        return out * 1.0

    layer_calls.checkpointed(layer, torch.randn(3, requires_grad=True)).sum().backward()
    assert len(ends) == 1
