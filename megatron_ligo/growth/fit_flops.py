"""What a fit step costs, counted from the shapes, and the choice of the cheaper form for each linear.

Multiplications and additions are counted apart (2 m n k for a product), forward and backward, for one process
that does it all: the redundant small products of tensor-parallel ranks are a layout's cost, not the method's.
"""

from __future__ import annotations

from math import prod

from megatron_ligo.arch.architecture import Task
from megatron_ligo.arch.flops import forward_flops
from megatron_ligo.arch.spec import Pack, ParamSpec, Use, axis_size
from megatron_ligo.growth.linear_maps import full_cost, low_rank_cost
from megatron_ligo.growth.operator import Operator
from megatron_ligo.growth.width_maps import LiftedMap

LEARNED, FROZEN = 3, 2  # products a weight takes part in: forward, gradient of the input, gradient of the weight


def factors_are_cheaper(tokens: int, shape: tuple[int, int], other: int, cost: int) -> bool:
    """Whether applying map (n x m) and weight (m x other) one after the other to so many tokens takes fewer
    multiplications than building their product (n x other) once and applying that (forward and backward alike).
    cost: the multiplications of the map with one vector."""
    n, m = shape
    return tokens * (cost + m * other) < other * cost + tokens * n * other


def is_factored(
    spec: ParamSpec,
    lift: LiftedMap,
    tokens: int,
    shape: tuple[int, int],
    other: int,
    cost: int,
    has_fresh_rows: bool = False,
) -> bool:
    """True where a weight's inner map and its mixed small weight are applied one after the other: it is cheaper
    (`factors_are_cheaper`, whose arguments follow lift), the map moves single features, the weight is no part of a
    fused one, and no fresh rows are added between the two."""
    if not lift.is_plain or spec.locations["mcore"].pack is Pack.GROUPED or has_fresh_rows:
        return False
    return factors_are_cheaper(tokens, shape, other, cost)


def fit_step_flops(
    operator: Operator, tokens: int, seq_length: int, distilled: bool = False, lagged: bool = False
) -> int:
    """FLOPs of one fit step over `tokens` tokens in sequences of `seq_length`; distilled: the small model's own pass
    is one of them; lagged: products with what training has added, as large as the model, which learns nothing."""
    small, large = operator.small, operator.large
    matrices = [param for param in operator.arch.layer_params(large) if len(param.axes) == 2]
    # One crossing between the large and the small residual space for each linear module of the layer.
    modules = {param.locations["mcore"].name: param.tp_dim == 0 for param in matrices}
    crossings = sum(MapUse(operator, "residual", reads).flops(tokens) for reads in modules.values())
    attention = LEARNED * 2 * 2 * tokens * seq_length * large.num_heads * large.head_dim
    per_layer = sum(_row(operator, param, tokens) for param in matrices) + crossings + attention
    # The small embedding asks for no gradient, the small head for none of its own.
    embedding = FROZEN * 2 * tokens * MapUse(operator, "residual", False).cost
    arch = operator.arch
    told = tokens // seq_length if arch.task is Task.LABEL else tokens
    head = MapUse(operator, arch.space(arch.param("head").axes[1], large), not large.tied).flops(told)
    head += FROZEN * 2 * told * small.hidden_size * large.vocab_size
    if "head_dense" in arch.params_by_key:
        # A masked-LM head's transform: into the small space and out again.
        written = arch.space(arch.param("head_dense").axes[0], large)
        head += MapUse(operator, "residual", True).flops(tokens) + MapUse(operator, written, False).flops(tokens)
        head += FROZEN * 2 * tokens * prod(arch.param("head_dense").shape(small))
    teacher = forward_flops(small, tokens, seq_length) if distilled else 0
    return large.num_layers * per_layer + embedding + head + teacher + (_added(operator, tokens) if lagged else 0)


def _added(operator: Operator, tokens: int) -> int:
    """What a lag's training has added: a product for the output and one for the gradient of the input."""
    arch, large = operator.arch, operator.large
    layer = sum(prod(param.shape(large)) for param in arch.layer_params(large) if len(param.axes) == 2)
    return FROZEN * 2 * tokens * (large.num_layers * layer + prod(arch.param("head").shape(large)))


class MapUse:
    """A map as it is applied: the multiplications of one vector with what is learned of it, and with what is not.

    parts: how many ranks have its rows.
    """

    def __init__(self, operator: Operator, name: str, reads: bool, parts: int = 1):
        spec = operator.maps[name]
        large = spec.large // parts
        whole, rank = full_cost(large, spec.small), operator.rank(name)
        side = "contract" if reads and operator.has_contract(name) else "expand"
        frozen = side == "expand" and operator.setting("identity", name) == "frozen"
        self.fixed = 0
        if rank:
            self.learned = low_rank_cost(large, spec.small, rank, 0)
            self.fixed = 0 if operator.starts_as_selection(name, side) else whole
        else:
            self.learned = full_cost((spec.large - spec.small) // parts, spec.small) if frozen else whole
        self.cost = self.learned + self.fixed

    def flops(self, vectors: int) -> int:
        return 2 * vectors * (LEARNED * self.learned + FROZEN * self.fixed)


def _row(operator: Operator, param: ParamSpec, tokens: int) -> int:
    """A weight's mixing, and its product with the map of its inner axis and with the tokens."""
    inner = 0 if param.tp_dim == 0 else 1
    lift = operator.space_maps.lift(param.axes[inner])
    spec = operator.maps[lift.map_name]
    use = MapUse(operator, lift.map_name, param.axes[inner].use is Use.INPUT)
    width = lift.unit * lift.repeat
    other = operator.small.hidden_size
    large = axis_size(param.axes[inner], operator.large)
    mixing = FROZEN * 2 * operator.small.num_layers * prod(param.shape(operator.small))
    joined = operator.settings.fresh == "writers" and param.tp_dim == 0  # fresh rows join the product only
    if is_factored(param, lift, tokens, (spec.large, spec.small), other, use.cost, has_fresh_rows=joined):
        return mixing + use.flops(tokens) + LEARNED * 2 * tokens * spec.small * other
    # Another head size: the features of each head go through a matrix that learns nothing.
    within = 0 if lift.inner is None else FROZEN * 2 * large * lift.inner.shape[1] * other
    return mixing + use.flops(width * other) + within + LEARNED * 2 * tokens * large * other
