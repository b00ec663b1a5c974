"""Random weights for entries without a source in the small model. They depend on the seed and the key only.

Noise that is drawn for each weight (`operator.noise_draw`) is here too; that of the maps is in initial_operator.py.

Random numbers fill the entries that width and depth maps with the start `pad` leave empty, in matrices only (new biases
are zero).

    fresh = "writers"   rows of new heads, neurons and layers, (large out, small in), added between a weight's two maps:
                        they read the residual stream as the small model does. The weights that read them are zero.
    fresh = "corner"    the same rows, and the rows of o and down that write new residual features; besides, the new
                        features of the tables that begin the residual stream (or `operator.codes` for the tokens').
                        The weights that read new features are zero.
    fresh = "all"       every entry of the large matrix outside the small one's block

The root mean square of `writers` and `all` is that of the small weight of the same key, in the layer that the large
layer copies or follows. That of `corner` follows from the large model's sizes alone:

    new heads and neurons        1 / sqrt(fan_in)
    new residual features        1 / sqrt(2 L fan_in), L large layers
    new features of the tables   1 / sqrt(D2), D2 large hidden size

each times `operator.fresh_scale` of the space that is written (the tables': "embedding").
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.arch.spec import Axis, ParamSpec, Role, Use, axis_size, layer_index
from megatron_ligo.config.run_config import EMBEDDING, value_for_space
from megatron_ligo.growth import initializers
from megatron_ligo.growth.codes.codes_file import read_codes
from megatron_ligo.growth.experts import shard_rows
from megatron_ligo.growth.operator import Operator, short_key
from megatron_ligo.growth.width_maps import apply_map

# Rules whose numbers do not depend on the small weights.
BY_SIZE = ("none", "corner")


def scale_source_key(operator: Operator, key: str) -> str:
    """Returns the small key whose weight sets the scale of a large key's random numbers."""
    layer = layer_index(key)
    if layer is None:
        return key
    return operator.arch.param(key).key.format(layer * operator.small.num_layers // operator.large.num_layers, 0)


def has_added_rows(operator: Operator, param: ParamSpec) -> bool:
    """True if a layer's matrix can have random rows between its two maps."""
    if not param.in_layer or len(param.axes) < 2 or param.axes[0].use is not Use.OUTPUT:
        return False
    return operator.settings.fresh == "corner" or (operator.settings.fresh == "writers" and not param.writes_residual)


def added_rows(operator: Operator, key: str, rms: float) -> Tensor | None:
    """Returns the random rows to add between a matrix's two maps, (large out, small in), fp32; None if there are none.

    rms: root mean square of the numbers of `writers`.
    """
    param, layer = operator.arch.param(key), layer_index(key)
    if not has_added_rows(operator, param) or (_writes_stream(param) and is_idle_layer(operator, param, layer)):
        return None
    num_kept = 0 if is_random_layer(operator, param, layer) else num_kept_features(operator, param.axes[0])
    shape = axis_size(param.axes[0], operator.large), *(axis_size(axis, operator.small) for axis in param.axes[1:])
    if num_kept == shape[0]:
        return None
    if operator.settings.fresh == "corner":
        rms = _corner_scale(operator, param)
    drawn = _draw(operator, key, shape, rms)
    drawn[:num_kept] = 0
    return drawn


def new_features(operator: Operator, param: ParamSpec) -> Tensor | None:
    """Returns the new features of a table that begins the residual stream, fp32; None if they are zero.

    (..., D2 - D1, ...): the table's large shape, with the new residual features only.
    """
    dims = [dim for dim, axis in enumerate(param.axes) if axis.space == "residual" and axis.use is Use.OUTPUT]
    if operator.settings.fresh != "corner" or param.in_layer or param.is_bias or not dims:
        return None
    num_kept = num_kept_features(operator, param.axes[dims[0]])
    shape = list(param.shape(operator.large))
    shape[dims[0]] -= num_kept
    if not shape[dims[0]]:
        return None
    scale = _corner_scale(operator, param)
    if operator.settings.codes and param.role is Role.WORD_EMBEDDING:
        return read_codes(Path(operator.settings.codes), *shape) * scale
    return _draw(operator, param.key, tuple(shape), scale)


def added_block(operator: Operator, key: str, rms: float) -> Tensor | None:
    """Returns the random numbers to add to a grown weight, in its shape, fp32; None if there are none.

    They are zero in the block that holds the small weight. rms: root mean square of the numbers of `all`.
    """
    param = operator.arch.param(key)
    features = new_features(operator, param)
    if features is not None:
        block = torch.zeros(param.shape(operator.large))
        block[tuple(slice(-size, None) for size in features.shape)] = features
        return block
    if operator.settings.fresh != "all" or len(param.axes) < 2:
        return None
    drawn = _draw(operator, key, param.shape(operator.large), rms)
    if not is_random_layer(operator, param, layer_index(key)):
        drawn[tuple(slice(num_kept_features(operator, axis)) for axis in param.axes)] = 0
    return drawn


def weight_noise(operator: Operator, key: str, grown: Tensor) -> Tensor | None:
    """Returns a weight's own noise, (large out, large in), fp32, which the copies of each input feature cancel.

    grown: the weight without it. Its root mean square is `operator.noise` times the weight's. None without noise.
    """
    param, layer = operator.arch.param(key), layer_index(key)
    if operator.settings.noise_draw != "weight" or len(param.axes) != 2 or param.axes[1].use is not Use.INPUT:
        return None
    lift = operator.space_maps.lift(param.axes[1])
    noise = 0.0 if lift is None else operator.setting("noise", lift.map_name)
    if not noise or grown.shape[1] == axis_size(param.axes[1], operator.small):
        return None
    if lift.map_name == "ffn" and shard_rows(key, operator.small, operator.large) is not None:
        # The copies of a neuron are in different experts, each of which a token weighs on its own.
        return None
    matrix = operator.matrix(layer)
    drawn = torch.empty(grown.shape).normal_(generator=operator.generator(f"noise.{key}"))
    seen = apply_map(drawn, 1, matrix(lift, Use.OUTPUT).t(), lift)
    cancelling = drawn - apply_map(seen, 1, matrix(lift, Use.INPUT), lift)
    return cancelling * (noise * root_mean_square(grown) / root_mean_square(cancelling))


def is_random_layer(operator: Operator, param: ParamSpec, layer: int | None) -> bool:
    """True if a parameter of a large layer has no source in the small model."""
    return _is_later_copy(operator, param, layer, ("pad",))


def is_idle_layer(operator: Operator, param: ParamSpec, layer: int | None) -> bool:
    """True if a large layer starts by writing nothing."""
    return _is_later_copy(operator, param, layer, ("pad", "lossless"))


def _is_later_copy(operator: Operator, param: ParamSpec, layer: int | None, inits: tuple[str, ...]) -> bool:
    if layer is None or operator.setting("depth_init", short_key(param)) not in inits:
        return False
    return bool(initializers.later_copy_mask(operator.small.num_layers, operator.large.num_layers)[layer])


def num_kept_features(operator: Operator, axis: Axis) -> int:
    """Returns the number of leading features of a large axis that are grown; the others are random."""
    lift = operator.space_maps.lift(axis)
    is_padded = lift is not None and operator.setting("width_init", lift.map_name) == "pad"
    return axis_size(axis, operator.small if is_padded else operator.large)


def num_new_features(operator: Operator) -> int:
    """Returns the number of features of the residual stream that start from random numbers; 0 unless `corner`."""
    is_padded = operator.setting("width_init", "residual") == "pad" and operator.settings.fresh == "corner"
    return operator.large.hidden_size - operator.small.hidden_size if is_padded else 0


def root_mean_square(tensor: Tensor) -> float:
    """Returns the root mean square of a tensor of any shape, computed in fp64."""
    return float(tensor.double().square().mean().sqrt())


def _writes_stream(param: ParamSpec) -> bool:
    """True for a layer's matrix into the residual stream, whether or not a norm comes between."""
    return param.in_layer and param.axes[0].space == "residual" and param.axes[0].use is Use.OUTPUT


def _corner_scale(operator: Operator, param: ParamSpec) -> float:
    """Returns the root mean square of a parameter's random numbers under `corner`."""
    large, scales = operator.large, operator.settings.fresh_scale
    fan_in = prod(axis_size(axis, large) for axis in param.axes if axis.use is Use.INPUT)
    if not param.in_layer:
        return value_for_space(scales, EMBEDDING) * (large.hidden_size * fan_in) ** -0.5
    if _writes_stream(param):
        return value_for_space(scales, "residual") * (2 * large.num_layers * fan_in) ** -0.5
    return value_for_space(scales, operator.space_maps.lift(param.axes[0]).map_name) * fan_in**-0.5


def _draw(operator: Operator, key: str, shape: tuple[int, ...], rms: float) -> Tensor:
    return torch.empty(shape).normal_(0.0, 1.0, generator=operator.generator(f"fresh.{key}")) * rms
