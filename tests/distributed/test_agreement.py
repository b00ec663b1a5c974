"""An error of one rank is raised by all of them; a bug stays on its rank. Ranks are threads: no process group."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from megatron_ligo.common.errors import CheckpointError, DataError, MachineError
from megatron_ligo.distributed.agreement import SINGLE_RANK, RankGroup

WORLD = 3


def run_ranks(work):
    """Runs `work(ranks)` on every rank; returns results or exceptions in rank order."""
    values, barrier = [None] * WORLD, Barrier(WORLD, timeout=30)

    def run(rank):
        def all_gather(value):
            values[rank] = value
            barrier.wait()
            gathered = list(values)
            barrier.wait()
            return gathered

        try:
            return work(RankGroup(rank, WORLD, all_gather))
        except Exception as error:
            return error

    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(run, range(WORLD)))


def failing(errors):
    def work(ranks):
        with ranks.agree():
            if ranks.rank in errors:
                raise errors[ranks.rank]
        return ranks.rank

    return work


def test_without_an_error_every_rank_keeps_its_result():
    assert run_ranks(failing({})) == [0, 1, 2]
    assert run_ranks(lambda ranks: ranks.run_on_all(lambda: ranks.rank)) == [0, 1, 2]


def test_all_ranks_raise_the_error_of_the_lowest_rank():
    results = run_ranks(failing({1: DataError("one"), 2: CheckpointError("two")}))
    assert [(type(error), str(error), error.agreed) for error in results] == [(DataError, "rank 1: one", True)] * WORLD
    results = run_ranks(failing({0: DataError("zero")}))
    assert [str(error) for error in results] == ["zero"] * WORLD


def test_a_full_disk_is_a_machine_error_on_all_ranks():
    results = run_ranks(failing({2: OSError(28, "No space left on device", "x")}))
    assert all(isinstance(error, MachineError) and error.agreed for error in results)


def test_rank_0_works_alone_and_shares_its_error():
    def work(ranks):
        workers.append(ranks.rank)
        raise DataError("wrong")

    workers = []
    results = run_ranks(lambda ranks: ranks.run_on_rank_0(lambda: work(ranks)))
    assert workers == [0] and [str(error) for error in results] == ["wrong"] * WORLD


def test_a_single_rank_raises_its_own_error():
    error = DataError("wrong")
    with pytest.raises(DataError) as caught, SINGLE_RANK.agree():
        raise error
    assert caught.value is error and not error.agreed
    with pytest.raises(KeyError), SINGLE_RANK.agree():
        raise KeyError("a bug")
