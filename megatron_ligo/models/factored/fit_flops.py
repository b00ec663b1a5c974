"""FLOPs of a fit step, counted from the shapes, and the choice of the cheaper form for each linear.

Multiplications and additions count separately (2 m n k for a product), forward and backward, for one process. Small
products that tensor-parallel ranks repeat do not count.
"""

from __future__ import annotations

from math import prod

from megatron_ligo.arch.flops import forward_flops
from megatron_ligo.arch.spec import Pack, ParamSpec, Role, Use, axis_size
from megatron_ligo.growth.experts import absent_block
from megatron_ligo.growth.linear_maps import full_cost, low_rank_cost
from megatron_ligo.growth.operator import Operator
from megatron_ligo.growth.random_init import has_added_rows, num_new_features
from megatron_ligo.growth.width_maps import LiftedMap

# Parameters of which each row scores a token.
SCORES = (Role.ROUTER, Role.SHARED_EXPERT_WEIGHT)
# Products of a weight: forward, gradient of the input and, if it is learned, gradient of the weight.
LEARNED, FROZEN = 3, 2


def factors_are_cheaper(tokens: int, shape: tuple[int, int], other: int, cost: int) -> bool:
    """True if applying map and weight in turn takes fewer multiplications than building and applying their product.

    shape: the map's, (n, m). The weight is (m, other), the product (n, other). cost: the multiplications of the map
    by a vector. Forward and backward passes give the same comparison.
    """
    n, m = shape
    return tokens * (cost + m * other) < other * cost + tokens * n * other


def is_factored(
    spec: ParamSpec,
    lift: LiftedMap,
    tokens: int,
    shape: tuple[int, int],
    other: int,
    cost: int,
    has_random_rows: bool = False,
) -> bool:
    """True if a weight's inner map and its depth-mixed small weight are applied in turn.

    The map must act on single features, the weight must not be packed by KV group, no random rows may be added between
    the two, and it must be cheaper (see `factors_are_cheaper` for the arguments after lift).
    """
    if not lift.is_plain or spec.locations["mcore"].pack is Pack.GROUPED or has_random_rows:
        return False
    return factors_are_cheaper(tokens, shape, other, cost)


def fit_step_flops(
    operator: Operator, tokens: int, seq_length: int, distilled: bool = False, lagged: bool = False
) -> int:
    """Returns the FLOPs of one fit step over `tokens` tokens in sequences of `seq_length`.

    distilled: the small model runs forward as the teacher. lagged: the frozen weights that training has added to the
    grown ones multiply every token too.
    """
    small, large = operator.small, operator.large
    absent = absent_block(small, operator.settings)
    matrices = [
        param for param in operator.arch.layer_params(large) if len(param.axes) == 2 and param.role not in absent
    ]
    # Each linear module maps once between the large and the small residual space.
    scores = [param for param in matrices if param.role in SCORES]
    matrices = [param for param in matrices if param.role not in SCORES]
    reads_by_module = {param.locations["mcore"].name: param.tp_dim == 0 for param in matrices}
    residual_projections = sum(MapUse(operator, "residual", reads).flops(tokens) for reads in reads_by_module.values())
    attention = LEARNED * 2 * 2 * tokens * seq_length * large.num_heads * large.head_dim
    per_layer = sum(_weight_flops(operator, param, tokens) for param in matrices) + residual_projections + attention
    per_layer += sum(_score_flops(operator, param, tokens) for param in scores)
    per_layer += _dropped_flops(operator, tokens)
    # The small embedding and the small head are frozen.
    embedding = FROZEN * 2 * tokens * MapUse(operator, "residual", False).cost
    arch = operator.arch
    num_predictions = tokens // seq_length if arch.reads_images else tokens
    head_space = arch.space(arch.get(Role.HEAD).axes[1], large)
    head = MapUse(operator, head_space, not large.tied).flops(num_predictions)
    head += FROZEN * 2 * num_predictions * small.hidden_size * large.vocab_size
    head *= 1 + arch.has(Role.PATCH_HEAD)
    transform = arch.find(Role.HEAD_TRANSFORM)
    if transform is not None:
        # Maps into the small space and back.
        written = arch.space(transform.axes[0], large)
        head += MapUse(operator, "residual", True).flops(tokens) + MapUse(operator, written, False).flops(tokens)
        head += FROZEN * 2 * tokens * prod(transform.shape(small))
    if large.tied:
        head += FROZEN * 2 * num_predictions * num_new_features(operator) * large.vocab_size
    teacher = forward_flops(small, tokens, seq_length) if distilled else 0
    lag = _lag_flops(operator, tokens) if lagged else 0
    return large.num_layers * per_layer + embedding + head + teacher + lag


def _lag_flops(operator: Operator, tokens: int) -> int:
    """Returns the FLOPs of the frozen weights that a lag's training has added."""
    arch, large = operator.arch, operator.large
    layer = sum(prod(param.shape(large)) for param in arch.layer_params(large) if len(param.axes) == 2)
    return FROZEN * 2 * tokens * (large.num_layers * layer + prod(arch.get(Role.HEAD).shape(large)))


class MapUse:
    """Multiplications of a map by a vector, split into those of learned and of fixed entries."""

    def __init__(self, operator: Operator, name: str, reads: bool, parts: int = 1):
        """reads: the map is used on the input side of the space; parts: the number of ranks that share its rows."""
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


def _score_flops(operator: Operator, param: ParamSpec, tokens: int) -> int:
    """Returns the FLOPs of a router or a shared expert's weight.

    It has the large model's width if it is learned itself, else the small one's.
    """
    small, large = operator.small, operator.large
    is_router = param.role is Role.ROUTER
    if is_router and operator.draws_routers:
        return LEARNED * 2 * tokens * prod(param.shape(large))
    mixing = FROZEN * 2 * small.num_layers * prod(param.shape(small))
    grown = LEARNED * 2 * large.num_experts * prod(param.shape(small)) if is_router else 0
    return mixing + grown + LEARNED * 2 * tokens * param.shape(large)[0] * small.hidden_size


def _dropped_flops(operator: Operator, tokens: int) -> int:
    """Returns the FLOPs of the experts' neurons that start anew, whose weights are fixed and have the large width."""
    large = operator.large
    neurons = round((operator.settings.expert_drop or 0) * large.ffn_size) if large.num_experts else 0
    matrices = sum(param.in_expert for param in operator.arch.layer_params(large))
    return FROZEN * 2 * tokens * large.top_k * matrices * neurons * large.hidden_size


def _expert_flops(operator: Operator, param: ParamSpec, tokens: int) -> int:
    """Returns the FLOPs of one matrix of all experts: mixing, its products with the ffn's map, sums over the small
    experts, and the products with the tokens, each of which has top_k experts."""
    small, large = operator.small, operator.large
    inner = 0 if param.tp_dim == 0 else 1
    use = MapUse(operator, operator.space_maps.lift(param.axes[inner]).map_name, param.axes[inner].use is Use.INPUT)
    mixing = FROZEN * 2 * small.num_layers * small.num_experts * prod(param.shape(small))
    products = small.num_experts * use.flops(small.hidden_size)
    size = large.ffn_size * small.hidden_size
    sums = 0 if small.num_experts == 1 else LEARNED * 2 * large.num_experts * small.num_experts * size
    return mixing + products + sums + LEARNED * 2 * tokens * large.top_k * size


def _weight_flops(operator: Operator, param: ParamSpec, tokens: int) -> int:
    """Returns the FLOPs of mixing a weight, and of its products with the map of its inner axis and with the tokens."""
    if param.in_expert:
        return _expert_flops(operator, param, tokens)
    inner = 0 if param.tp_dim == 0 else 1
    lift = operator.space_maps.lift(param.axes[inner])
    spec = operator.maps[lift.map_name]
    use = MapUse(operator, lift.map_name, param.axes[inner].use is Use.INPUT)
    width = lift.unit * lift.repeat
    # Fixed rows of new residual features multiply beside the small weight's.
    other = operator.small.hidden_size
    if param.tp_dim == 1 and has_added_rows(operator, param):
        other += num_new_features(operator)
    large = axis_size(param.axes[inner], operator.large)
    mixing = FROZEN * 2 * operator.small.num_layers * prod(param.shape(operator.small))
    has_random_rows = has_added_rows(operator, param) and param.tp_dim == 0
    if is_factored(param, lift, tokens, (spec.large, spec.small), other, use.cost, has_random_rows):
        return mixing + use.flops(tokens) + LEARNED * 2 * tokens * spec.small * other
    # A changed head size: a fixed matrix maps the features within each head.
    inner_map = 0 if lift.inner is None else FROZEN * 2 * large * lift.inner.shape[1] * other
    return mixing + use.flops(width * other) + inner_map + LEARNED * 2 * tokens * large * other
