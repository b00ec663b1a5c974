"""Which part of a job this process does, where several do it together; and how all of them fail alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_ligo.common.errors import LigoError, MachineError, user_message


@dataclass(frozen=True)
class Share:
    """gathered: every process's value, by rank, on each of them."""

    rank: int = 0
    world: int = 1
    gathered: Callable[[object], list] = lambda value: [value]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Around work at whose end all processes meet: a fault of one is raised by all, so that one may tell it.

        A mistake of ours is raised where it is: the others hear of it as of any process that ends.
        """
        error = None
        try:
            yield
        except Exception as caught:
            if self.world == 1 or user_message(caught) is None:
                raise
            error = caught
        if self.world == 1:
            return
        kind = type(error) if isinstance(error, LigoError) else MachineError
        for rank, found in enumerate(self.gathered((kind, user_message(error)) if error else None)):
            if found:
                kind, text = found
                shared = kind(text if rank == 0 else f"rank {rank}: {text}")
                shared.agreed = True
                raise shared from error


ALONE = Share()
