"""The rows of what networks are made of: a linear, a norm, each with its bias, and where they live in a format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from megatron_ligo.arch.common_axes import RESIDUAL_BIAS, RESIDUAL_GAIN
from megatron_ligo.arch.spec import Axis, FormatLocation, Pack, ParamSpec, Role


def prefixed(prefix: str) -> Callable[[str], FormatLocation]:
    """Module's name -> the slot of a module whose full name begins with the prefix."""
    return lambda name: FormatLocation(prefix + name)


def grouped_qkv(slot: FormatLocation, part: int) -> FormatLocation:
    """The slot of q, k or v (part 0, 1, 2) in a matrix that holds the three head by head."""
    return replace(slot, pack=Pack.GROUPED, part=part, num_parts=3)


def linear_params(
    key: str, role: Role, axes: tuple[Axis, Axis], split: int | None, hf: FormatLocation, mcore: FormatLocation, **more
) -> Iterator[ParamSpec]:
    """Weight and bias, which tensor parallelism cuts where it cuts the outputs. hf, mcore: slots of the module."""
    yield ParamSpec(key, role, axes, split, _tensor(hf, mcore, "weight"), **more)
    yield ParamSpec(
        f"{key}_bias", role, axes[:1], 0 if split == 0 else None, _tensor(hf, mcore, "bias"), is_bias=True, **more
    )


def norm_params(
    key: str,
    role: Role,
    hf: FormatLocation,
    mcore: FormatLocation,
    axes: tuple[Axis, Axis] = (RESIDUAL_GAIN, RESIDUAL_BIAS),
    **more,
) -> Iterator[ParamSpec]:
    """A LayerNorm's gain and bias. hf, mcore: slots of the module; axes: the gain's and the bias's."""
    gain_axis, bias_axis = axes
    yield ParamSpec(key, role, (gain_axis,), None, _tensor(hf, mcore, "weight"), **more)
    yield ParamSpec(f"{key}_bias", role, (bias_axis,), None, _tensor(hf, mcore, "bias"), is_bias=True, **more)


def _tensor(hf: FormatLocation, mcore: FormatLocation, kind: str) -> dict[str, FormatLocation]:
    return {"hf": _of(hf, kind), "mcore": _of(mcore, kind)}


def _of(slot: FormatLocation, kind: str) -> FormatLocation:
    return replace(slot, name=f"{slot.name}.{kind}", transposed=slot.transposed and kind == "weight")
