"""The parallel axes of a job: their sizes, the order in which ranks run through them, and how a checkpoint states them.

A new axis is added here first. This module needs no process group, Megatron-core or DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod

from megatron_ligo.common.errors import LayoutError, Problem


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the tensor, pipeline, data, expert and context axes.

    The expert axis divides the data axis: ep neighbouring data-parallel ranks share a layer's experts, and dp / ep
    ranks hold the same ones. Context-parallel ranks hold parts of the same sequences; to DeepSpeed they are further
    data-parallel ranks.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1

    @classmethod
    def divide(cls, world_size: int, tp: int, pp: int, ep: int = 1, cp: int = 1) -> ParallelDims:
        """Divides a job's ranks over the axes, where dp is the quotient, a multiple of ep.

        Raises LayoutError for a remainder.
        """
        axes = {"tp": tp, "pp": pp} | {name: size for name, size in (("cp", cp), ("ep", ep)) if size > 1}
        if world_size % (divisor := prod(axes.values())):
            hint = f"Start that many processes, or change {' and '.join(axes)}."
            sizes = " x ".join(map(str, axes.values()))
            expected = f"a multiple of {' x '.join(axes)} = {sizes} = {divisor}"
            raise LayoutError(Problem("processes", expected, world_size, hint))
        return cls(tp, pp, world_size // (tp * pp * cp), ep, cp)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters but for experts: the data- and context-parallel ones."""
        return self.dp * self.cp

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.replicas

    def global_rank(self, tp_rank: int, pp_rank: int, dp_rank: int = 0, cp_rank: int = 0) -> int:
        """Returns the rank at these coordinates: tp varies fastest, then cp, dp, pp (Megatron-core's order)."""
        return ((pp_rank * self.dp + dp_rank) * self.cp + cp_rank) * self.tp + tp_rank

    def to_json(self) -> dict[str, int]:
        """Returns the sizes by name; those of the expert and context axes only if they divide anything."""
        return {name: size for name, size in asdict(self).items() if name not in ("ep", "cp") or size > 1}


@dataclass(frozen=True)
class EngineLayout:
    """The layout of a DeepSpeed engine's checkpoint files: the parallel axes and the ZeRO stage."""

    dims: ParallelDims
    zero: int

    @classmethod
    def from_json(cls, table: Mapping[str, object]) -> EngineLayout:
        """Parses the output of `to_json`. Raises KeyError, TypeError, ValueError or OverflowError otherwise."""
        tp, pp, dp, zero = (int(table[name]) for name in ("tp", "pp", "dp", "zero"))
        # Records of earlier versions state neither.
        ep, cp = (int(table.get(name, 1)) for name in ("ep", "cp"))
        if min(tp, pp, dp, ep, cp, zero) < 1 or dp % ep:
            raise ValueError(f"layout {dict(table)}")
        return cls(ParallelDims(tp, pp, dp, ep, cp), zero)

    def has_files_of(self, other: EngineLayout) -> bool:
        """True if the files of the other layout can be loaded as they are."""
        dims, others = self.dims, other.dims
        axes = (dims.tp, dims.pp, dims.ep, dims.replicas, self.zero)
        return axes == (others.tp, others.pp, others.ep, others.replicas, other.zero)

    def to_json(self) -> dict[str, int]:
        return {**self.dims.to_json(), "zero": self.zero}

    def __str__(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in self.to_json().items())
