"""The parallel axes of a job: their sizes, the order in which ranks run through them, and how a checkpoint states them.

A new axis (context) is added here first. This module needs no process group, Megatron-core or DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from megatron_ligo.common.errors import LayoutError, Problem


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the tensor, pipeline, data and expert axes. The expert axis divides the data axis: ep neighbouring
    data-parallel ranks share a layer's experts, and dp / ep ranks hold the same ones."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1

    @classmethod
    def divide(cls, world_size: int, tp: int, pp: int, ep: int = 1) -> ParallelDims:
        """Divides a job's ranks into tp x pp x dp, where dp is the quotient, a multiple of ep.

        Raises LayoutError for a remainder.
        """
        if world_size % (tp * pp * ep):
            axes = {"tp": tp, "pp": pp} | ({"ep": ep} if ep > 1 else {})
            hint = f"Start that many processes, or change {' and '.join(axes)}."
            sizes = " x ".join(map(str, axes.values()))
            expected = f"a multiple of {' x '.join(axes)} = {sizes} = {tp * pp * ep}"
            raise LayoutError(Problem("processes", expected, world_size, hint))
        return cls(tp, pp, world_size // (tp * pp), ep)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def global_rank(self, tp_rank: int, pp_rank: int, dp_rank: int = 0) -> int:
        """Returns the rank at these coordinates: tp varies fastest, then dp, then pp (Megatron-core's order)."""
        return (pp_rank * self.dp + dp_rank) * self.tp + tp_rank

    def to_json(self) -> dict[str, int]:
        """Returns the sizes by name; that of the expert axis only if it divides anything."""
        return {name: size for name, size in asdict(self).items() if name != "ep" or size > 1}


@dataclass(frozen=True)
class EngineLayout:
    """The layout of a DeepSpeed engine's checkpoint files: the parallel axes and the ZeRO stage."""

    dims: ParallelDims
    zero: int

    @classmethod
    def from_json(cls, table: Mapping[str, object]) -> EngineLayout:
        """Parses the output of `to_json`. Raises KeyError, TypeError, ValueError or OverflowError otherwise."""
        tp, pp, dp, zero = (int(table[name]) for name in ("tp", "pp", "dp", "zero"))
        ep = int(table.get("ep", 1))
        if min(tp, pp, dp, ep, zero) < 1 or dp % ep:
            raise ValueError(f"layout {dict(table)}")
        return cls(ParallelDims(tp, pp, dp, ep), zero)

    def to_json(self) -> dict[str, int]:
        return {**self.dims.to_json(), "zero": self.zero}

    def __str__(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in self.to_json().items())
