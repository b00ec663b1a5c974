"""How far replicas may be apart where kernels add in another order on each rank."""

from __future__ import annotations

import pytest
import torch

from megatron_ligo.training.replica_check import _find_odd, _summarise


@pytest.mark.parametrize("numel", [7, 64, 1000])
@pytest.mark.parametrize("change, tolerance, odd", [(1e-6, 0.0, True), (1e-6, 1e-4, False), (1e-2, 1e-4, True)])
def test_replicas_within_the_tolerance_are_equal(numel, change, tolerance, odd):
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    other = tensor + change * tensor.norm() / numel**0.5 * torch.sign(tensor)
    summaries = torch.stack([_summarise(each) for each in (tensor, tensor, other)])
    assert _find_odd(summaries, tolerance) == [False, False, odd]
    assert _find_odd(torch.stack([_summarise(tensor), _summarise(tensor * torch.nan)]), 1.0) == [False, True]
