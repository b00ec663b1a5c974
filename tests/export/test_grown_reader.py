"""A grown model computes its tensors from the small one's, on the device that has the products."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth.validation import build_initial_operator
from tests.tiny_models import hf_llama, llama_config, memory_of


class DeviceWithoutNumbers(TorchDispatchMode):
    """Lets the meta device stand for a GPU: what is copied from it holds zeros. Mixed devices are torch's own error.

    products: products of two matrices on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs["device"].type == "cpu":
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        out = operator(*args, **kwargs)
        self.products += operator is torch.ops.aten.mm.default and not out.is_meta and min(out.shape) > 1
        return out


@pytest.mark.parametrize("settings", [{"method": "ligo"}, {"method": "ligo", "noise": 0.1}, {"method": "corner"}])
def test_products_run_on_the_device_and_results_return(settings):
    small = llama_config(num_layers=2)
    operator = build_initial_operator(
        small,
        LargeSection(num_layers=3, hidden_size=30, ffn_size=40, num_heads=10, num_kv_heads=5, vocab_size=80),
        OperatorSection(**settings),
    )
    source = memory_of(hf_llama(small), small)
    on_cpu = GrownReader(operator, source)
    expected = {key: on_cpu.read(key) for key in on_cpu.keys()}  # noqa: SIM118 - no dict
    on_device = GrownReader(operator, source, device=torch.device("meta"))
    with DeviceWithoutNumbers() as device:
        for key, tensor in expected.items():
            grown = on_device.read(key)
            assert grown.device.type == "cpu" and grown.shape == tensor.shape and grown.dtype == tensor.dtype
            assert tensor.dim() == 2 or torch.equal(grown, tensor), key
    assert device.products == 0
    assert on_device.fingerprint() is None or on_device.fingerprint() != on_cpu.fingerprint()
