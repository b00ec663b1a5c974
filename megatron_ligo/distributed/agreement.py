"""Shared failures: an error on one rank is raised by all ranks at the same point.

This module needs no process group, Megatron-core or DeepSpeed: a `RankGroup` is given its rank and its collective.
`distributed.mesh.all_ranks` gives the group of a running job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from megatron_ligo.common.errors import LigoError, MachineError, user_message

T = TypeVar("T")


@dataclass(frozen=True)
class RankGroup:
    """The ranks that do a job together, seen from one of them.

    all_gather: takes this rank's value and returns every rank's, in rank order, on each rank.
    """

    rank: int = 0
    world_size: int = 1
    all_gather: Callable[[T], list[T]] = lambda value: [value]

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Synchronizes the ranks after the wrapped work. Every rank raises the error of the lowest rank that failed.

        The shared error is marked `agreed`, so that one rank can report it for all. Only errors with a message for
        the user are shared; any other exception (a bug) propagates on its rank alone. Collective.
        """
        error = None
        try:
            yield
        except Exception as caught:
            if self.world_size == 1 or user_message(caught) is None:
                raise
            error = caught
        if self.world_size == 1:
            return
        error_type = type(error) if isinstance(error, LigoError) else MachineError
        for rank, failure in enumerate(self.all_gather((error_type, user_message(error)) if error else None)):
            if failure:
                error_type, text = failure
                shared = error_type(text if rank == 0 else f"rank {rank}: {text}")
                shared.agreed = True
                raise shared from error

    def run_on_all(self, work: Callable[[], T]) -> T:
        """Runs `work` on every rank and returns this rank's result; all ranks share its errors. Collective."""
        with self.agree():
            return work()

    def run_on_rank_0(self, work: Callable[[], object]) -> None:
        """Runs `work` on rank 0 alone; the other ranks wait for it and share its errors. Collective."""
        with self.agree():
            if self.rank == 0:
                work()


SINGLE_RANK = RankGroup()
