"""What a fit step costs, counted from the shapes, and the choice of the cheaper form for each linear.

Multiplications and additions are counted apart (2 m n k for a product), forward and backward, for one process
that does it all: the redundant small products of tensor-parallel ranks are a layout's cost, not the method's.
"""

from __future__ import annotations

from math import prod

from megatron_ligo.arch.rows import Row
from megatron_ligo.growth.maps import Lift, lift_of
from megatron_ligo.growth.operator import Operator

LEARNED, FROZEN = 3, 2  # products a weight takes part in: forward, gradient of the input, gradient of the weight


def factors_are_cheaper(tokens: int, matrix: tuple[int, ...], other: int) -> bool:
    """Whether applying map (n x m) and weight (m x other) one after the other to so many tokens takes fewer
    multiplications than building their product (n x other) once and applying that (forward and backward alike)."""
    n, m = matrix
    return tokens * m * (n + other) < n * m * other + tokens * n * other


def fit_step_flops(operator: Operator, tokens: int, seq_length: int) -> int:
    """FLOPs of one fit step over `tokens` tokens in sequences of `seq_length`."""
    small, large = operator.small, operator.large
    d1, d2 = small.hidden_size, large.hidden_size
    per_layer = sum(_row(operator, row, tokens) for row in operator.arch.layer_rows(large) if len(row.axes) == 2)
    modules = {row.slots["mcore"].name for row in operator.arch.layer_rows(large) if len(row.axes) == 2}
    # One crossing between the large and the small residual space for each linear of the layer.
    per_layer += len(modules) * LEARNED * 2 * tokens * d1 * d2
    attention = LEARNED * 2 * 2 * tokens * seq_length * large.num_heads * large.head_dim
    embedding = FROZEN * 2 * tokens * d1 * d2
    head = LEARNED * 2 * tokens * d1 * d2 + FROZEN * 2 * tokens * d1 * large.vocab_size
    return large.num_layers * (per_layer + attention) + embedding + head


def _row(operator: Operator, row: Row, tokens: int) -> int:
    """A weight's mixing, and its product with the map of its inner axis and with the tokens."""
    inner = 0 if row.split == 0 else 1
    lift = lift_of(row.axes[inner], operator.large, operator.structure)
    spec = operator.maps[lift.map]
    width = lift.unit * lift.repeat
    other = operator.small.hidden_size
    mixing = FROZEN * 2 * operator.small.num_layers * prod(row.shape(operator.small))
    if _plain(lift) and factors_are_cheaper(tokens, (spec.large, spec.small), other):
        return mixing + LEARNED * 2 * tokens * spec.small * (spec.large + other)
    built = LEARNED * 2 * spec.large * spec.small * width * other
    return mixing + built + LEARNED * 2 * tokens * spec.large * width * other


def _plain(lift: Lift) -> bool:
    return lift.unit == 1 and lift.repeat == 1
