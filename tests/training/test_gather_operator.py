"""The operator reaches rank 0 once, whatever the number of ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.models.factored import fit_cases


def numbers_received(**arguments) -> tuple[int, int] | None:
    """Fits a step; rank 0 returns how many numbers it received while gathering, and how many the operator has."""
    receive, received = dist.recv, []

    def count(tensor: torch.Tensor, *rest, **options):
        received.append(tensor.numel())
        return receive(tensor, *rest, **options)

    dist.recv = count
    result = fit_cases.fit(steps=1, **arguments)
    if result is None:
        return None
    return sum(received), sum(tensor.numel() for tensor in result[2].values())


@pytest.mark.parametrize("world, layout", [(2, {"tp": 2}), (2, {"pp": 2}), (4, {"tp": 2, "zero": 3}), (2, {"zero": 3})])
def test_rank_0_receives_no_number_twice(pools, world, layout):
    received, total = pools(world).run(numbers_received, **layout)
    if set(layout) == {"zero"}:
        assert received == 0, "data-parallel ranks hold what rank 0 holds"
    else:
        assert 0 < received < total
