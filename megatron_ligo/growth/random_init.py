"""Fresh numbers where the small model has none: drawn from the seed and the key alone, the same at any layout.

They stand where a map or a depth map is `pad`, in matrices only (a fresh bias is zero), and have the root mean
square of the small model's row that they join: of the layer that the large one is, or is beside.

    fresh = "writers"   rows of new heads, neurons and layers, (large out, small in): they join a row between its two
                        maps, so that they read the residual stream as the small model does. What reads them is zero.
    fresh = "all"       whatever block of the large matrix is not the small one's, readers included
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ligo.arch.spec import Axis, ParamSpec, Use, axis_size, layer_index
from megatron_ligo.growth import initializers
from megatron_ligo.growth.operator import Operator, short_key, writes_residual


def scale_source_key(operator: Operator, key: str) -> str:
    """The small model's key whose scale a large key's fresh numbers take."""
    layer = layer_index(key)
    if layer is None:
        return key
    return operator.arch.param(key).key.format(layer * operator.small.num_layers // operator.large.num_layers)


def added_rows(operator: Operator, key: str, rms: float) -> Tensor | None:
    """What joins a matrix between its two maps, (large out, small in), fp32; None where nothing does."""
    param = operator.arch.param(key)
    inner = param.in_layer and len(param.axes) == 2 and param.axes[0].use is Use.OUTPUT and not writes_residual(param)
    if operator.settings.fresh != "writers" or not inner:
        return None
    kept = 0 if is_random_layer(operator, param, layer_index(key)) else num_kept_features(operator, param.axes[0])
    shape = axis_size(param.axes[0], operator.large), axis_size(param.axes[1], operator.small)
    if kept == shape[0]:
        return None
    drawn = _draw(operator, key, shape, rms)
    drawn[:kept] = 0
    return drawn


def added_block(operator: Operator, key: str, rms: float) -> Tensor | None:
    """What is added to a grown matrix (or a map of patches), zero in the small one's corner, fp32; None where nothing
    is."""
    param = operator.arch.param(key)
    if operator.settings.fresh != "all" or len(param.axes) < 2:
        return None
    drawn = _draw(operator, key, param.shape(operator.large), rms)
    if not is_random_layer(operator, param, layer_index(key)):
        drawn[tuple(slice(num_kept_features(operator, axis)) for axis in param.axes)] = 0
    return drawn


def is_random_layer(operator: Operator, param: ParamSpec, layer: int | None) -> bool:
    """True where a row of a large layer holds nothing of the small model's."""
    if layer is None or operator.setting("depth_init", short_key(param)) != "pad":
        return False
    return bool(initializers.later_copy_mask(operator.small.num_layers, operator.large.num_layers)[layer])


def num_kept_features(operator: Operator, axis: Axis) -> int:
    """How many of a large axis's features, from the first on, are not fresh."""
    lift = operator.space_maps.lift(axis)
    padded = lift is not None and operator.setting("width_init", lift.map_name) == "pad"
    return axis_size(axis, operator.small if padded else operator.large)


def root_mean_square(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def _draw(operator: Operator, key: str, shape: tuple[int, ...], rms: float) -> Tensor:
    return torch.empty(shape).normal_(0.0, 1.0, generator=operator.generator(f"fresh.{key}")) * rms
