"""Rank order and checkpoint layouts."""

import pytest

from megatron_ligo.common.errors import LayoutError
from megatron_ligo.distributed.parallel_dims import EngineLayout, ParallelDims


def test_ranks_run_through_tp_then_dp_then_pp():
    dims = ParallelDims.divide(12, tp=2, pp=3)
    assert dims == ParallelDims(tp=2, pp=3, dp=2) and dims.world_size == 12
    ranks = [dims.global_rank(tp, pp, dp) for pp in range(3) for dp in range(2) for tp in range(2)]
    assert ranks == list(range(12))


def test_ranks_that_share_a_sequence_are_neighbours():
    dims = ParallelDims.divide(24, tp=2, pp=2, cp=3)
    assert dims == ParallelDims(tp=2, pp=2, dp=2, cp=3) and dims.replicas == 6
    places = [(tp, pp, dp, cp) for pp in range(2) for dp in range(2) for cp in range(3) for tp in range(2)]
    assert [dims.global_rank(*place) for place in places] == list(range(24))


def test_processes_that_do_not_divide_are_refused():
    with pytest.raises(LayoutError) as caught:
        ParallelDims.divide(6, tp=2, pp=2)
    assert caught.value.problems[0].where == "processes" and caught.value.problems[0].found == "6"


def test_a_layout_keeps_its_keys():
    layout = EngineLayout(ParallelDims(tp=2, pp=3, dp=4), zero=1)
    assert list(layout.to_json().items()) == [("tp", 2), ("pp", 3), ("dp", 4), ("zero", 1)]
    assert EngineLayout.from_json(layout.to_json()) == layout
    for wrong in ({"tp": 1}, {"tp": 0, "pp": 1, "dp": 1, "zero": 1}, []):
        with pytest.raises((KeyError, ValueError, TypeError)):
            EngineLayout.from_json(wrong)


def test_files_depend_on_replicas_and_not_on_what_they_share():
    data, context = (EngineLayout(ParallelDims(dp=dp, cp=cp), zero=3) for dp, cp in ((4, 1), (2, 2)))
    assert context != data and context.has_files_of(data)
    assert not EngineLayout(ParallelDims(dp=2), zero=3).has_files_of(data)
    # Records of earlier versions do not state cp.
    assert EngineLayout.from_json({"tp": 1, "pp": 1, "dp": 4, "zero": 3}) == data
