"""The parallel axes of a job: their sizes, the order in which ranks run through them, and how a checkpoint states them.

A new axis (context, expert) is added here first. This module needs no process group, Megatron-core or DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from megatron_ligo.common.errors import LayoutError, Problem


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the tensor, pipeline and data axes."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    @classmethod
    def divide(cls, world_size: int, tp: int, pp: int) -> ParallelDims:
        """Divides a job's ranks into tp x pp x dp, where dp is the quotient. Raises LayoutError for a remainder."""
        if world_size % (tp * pp):
            hint = "Start that many processes, or change tp and pp."
            expected = f"a multiple of tp x pp = {tp} x {pp} = {tp * pp}"
            raise LayoutError(Problem("processes", expected, world_size, hint))
        return cls(tp, pp, world_size // (tp * pp))

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def global_rank(self, tp_rank: int, pp_rank: int, dp_rank: int = 0) -> int:
        """Returns the rank at these coordinates: tp varies fastest, then dp, then pp (Megatron-core's order)."""
        return (pp_rank * self.dp + dp_rank) * self.tp + tp_rank


@dataclass(frozen=True)
class EngineLayout:
    """The layout of a DeepSpeed engine's checkpoint files: the parallel axes and the ZeRO stage."""

    dims: ParallelDims
    zero: int

    @classmethod
    def from_json(cls, table: Mapping[str, object]) -> EngineLayout:
        """Parses the output of `to_json`. Raises KeyError, TypeError, ValueError or OverflowError otherwise."""
        tp, pp, dp, zero = (int(table[name]) for name in ("tp", "pp", "dp", "zero"))
        if min(tp, pp, dp, zero) < 1:
            raise ValueError(f"layout {dict(table)}")
        return cls(ParallelDims(tp, pp, dp), zero)

    def to_json(self) -> dict[str, int]:
        return {**asdict(self.dims), "zero": self.zero}

    def __str__(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in self.to_json().items())
