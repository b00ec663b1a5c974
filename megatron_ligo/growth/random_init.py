"""Random weights for entries without a source in the small model. They depend on the seed and the key only.

Random numbers fill the entries that width and depth maps with the start `pad` leave empty, in matrices only (new biases
are zero). Their root mean square is that of the small weight of the same key, in the layer that the large layer copies
or follows.

    fresh = "writers"   rows of new heads, neurons and layers, (large out, small in), added between a weight's two maps:
                        they read the residual stream as the small model does. The weights that read them are zero.
    fresh = "all"       every entry of the large matrix outside the small one's block
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ligo.arch.spec import Axis, ParamSpec, Use, axis_size, layer_index
from megatron_ligo.growth import initializers
from megatron_ligo.growth.operator import Operator, short_key


def scale_source_key(operator: Operator, key: str) -> str:
    """Returns the small key whose weight sets the scale of a large key's random numbers."""
    layer = layer_index(key)
    if layer is None:
        return key
    return operator.arch.param(key).key.format(layer * operator.small.num_layers // operator.large.num_layers)


def added_rows(operator: Operator, key: str, rms: float) -> Tensor | None:
    """Returns the random rows to add between a matrix's two maps, (large out, small in), fp32; None if there are none.

    rms: root mean square of the numbers.
    """
    param = operator.arch.param(key)
    writes_inside_layer = (
        param.in_layer and len(param.axes) == 2 and param.axes[0].use is Use.OUTPUT and not param.writes_residual
    )
    if operator.settings.fresh != "writers" or not writes_inside_layer:
        return None
    is_random = is_random_layer(operator, param, layer_index(key))
    num_kept = 0 if is_random else num_kept_features(operator, param.axes[0])
    shape = axis_size(param.axes[0], operator.large), axis_size(param.axes[1], operator.small)
    if num_kept == shape[0]:
        return None
    drawn = _draw(operator, key, shape, rms)
    drawn[:num_kept] = 0
    return drawn


def added_block(operator: Operator, key: str, rms: float) -> Tensor | None:
    """Returns the random numbers to add to a grown weight, in its shape, fp32; None if there are none.

    They are zero in the block that holds the small weight. rms: root mean square of the numbers.
    """
    param = operator.arch.param(key)
    if operator.settings.fresh != "all" or len(param.axes) < 2:
        return None
    drawn = _draw(operator, key, param.shape(operator.large), rms)
    if not is_random_layer(operator, param, layer_index(key)):
        drawn[tuple(slice(num_kept_features(operator, axis)) for axis in param.axes)] = 0
    return drawn


def is_random_layer(operator: Operator, param: ParamSpec, layer: int | None) -> bool:
    """True if a parameter of a large layer has no source in the small model."""
    if layer is None or operator.setting("depth_init", short_key(param)) != "pad":
        return False
    return bool(initializers.later_copy_mask(operator.small.num_layers, operator.large.num_layers)[layer])


def num_kept_features(operator: Operator, axis: Axis) -> int:
    """Returns the number of leading features of a large axis that are grown; the others are random."""
    lift = operator.space_maps.lift(axis)
    is_padded = lift is not None and operator.setting("width_init", lift.map_name) == "pad"
    return axis_size(axis, operator.small if is_padded else operator.large)


def root_mean_square(tensor: Tensor) -> float:
    """Returns the root mean square of a tensor of any shape, computed in fp64."""
    return float(tensor.double().square().mean().sqrt())


def _draw(operator: Operator, key: str, shape: tuple[int, ...], rms: float) -> Tensor:
    return torch.empty(shape).normal_(0.0, 1.0, generator=operator.generator(f"fresh.{key}")) * rms
