"""The rows of what networks are made of: a linear, a norm, each with its bias, and where they live in a format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from megatron_ligo.arch.common_axes import GAIN, SHIFT
from megatron_ligo.arch.spec import Axis, Pack, Row, Slot


def under(prefix: str) -> Callable[[str], Slot]:
    """Module's name -> the slot of a module whose full name begins with the prefix."""
    return lambda name: Slot(prefix + name)


def grouped(slot: Slot, part: int) -> Slot:
    """The slot of q, k or v (part 0, 1, 2) in a matrix that holds the three head by head."""
    return replace(slot, pack=Pack.GROUPED, part=part, of=3)


def linear(key: str, axes: tuple[Axis, Axis], split: int | None, hf: Slot, mcore: Slot, **more) -> Iterator[Row]:
    """Weight and bias, which tensor parallelism cuts where it cuts the outputs. hf, mcore: slots of the module."""
    yield Row(key, axes, split, _tensor(hf, mcore, "weight"), **more)
    yield Row(f"{key}_bias", axes[:1], 0 if split == 0 else None, _tensor(hf, mcore, "bias"), **more)


def norm(key: str, hf: Slot, mcore: Slot, axes: tuple[Axis, Axis] = (GAIN, SHIFT), **more) -> Iterator[Row]:
    """A LayerNorm's gain and bias. hf, mcore: slots of the module; axes: the gain's and the bias's."""
    for kind, suffix, axis in zip(("weight", "bias"), ("", "_bias"), axes, strict=True):
        yield Row(f"{key}{suffix}", (axis,), None, _tensor(hf, mcore, kind), **more)


def _tensor(hf: Slot, mcore: Slot, kind: str) -> dict[str, Slot]:
    return {"hf": _of(hf, kind), "mcore": _of(mcore, kind)}


def _of(slot: Slot, kind: str) -> Slot:
    return replace(slot, name=f"{slot.name}.{kind}", transposed=slot.transposed and kind == "weight")
