"""A growth on a real GPU, against the same growth on the CPU."""

from __future__ import annotations

import pytest
import torch

from megatron_ligo.checkpoint import formats
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth.validation import build_initial_operator

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("method", "tolerance"), [("lossless", 0), ("corner", 0), ("ligo", 1e-6)])
def test_a_growth_is_that_of_the_cpu(folder, method, tolerance):
    source = formats.open(folder / "small")
    large = LargeSection(num_layers=4, hidden_size=80, ffn_size=120, num_heads=8, num_kv_heads=4)
    operator = build_initial_operator(source.model_config, large, OperatorSection(method=method))
    on_cpu, on_gpu = GrownReader(operator, source), GrownReader(operator, source, device=torch.device("cuda"))
    for key in on_cpu.keys():  # noqa: SIM118 - no dict
        torch.testing.assert_close(on_gpu.read(key), on_cpu.read(key), rtol=tolerance, atol=tolerance)
