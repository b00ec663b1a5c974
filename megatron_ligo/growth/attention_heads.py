"""Heads that change more than their number: another ratio of query heads to KV heads, another head size.

Legend: G groups of KV heads, r query heads a group, d head size; 1 small, 2 large.

Ratio: a large group copies a small group, and the copies of a group share out its query heads in turn (more than one
turn where there is room): each query head of the small model is somewhere, beside its own keys and values, and o reads
each copy by its share. That is exact; where a group's copies have fewer places than it has query heads, it cannot be.
Fewer KV heads (width_init `mean`, never exact): a large group's keys and values are the mean of several small ones,
and its query heads are theirs (arXiv 2305.13245).

Size: rotary pair j must keep its angle. Where d2 is a multiple of d1 the base stays and pair j becomes pair j d2 / d1;
elsewhere the base becomes base^(d2 / d1), and pair j stays pair j (base^(-2j / d) is the same for both). New features
of q copy old ones, those of k are zero, so that they add nothing to a score but learn; q is multiplied by
sqrt(d2 / d1), for the large model divides scores by sqrt(d2). New features of v copy old ones and o reads each by its
share.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.rope import SIZE_INDEPENDENT_KINDS, scaling_kind
from megatron_ligo.common.errors import ErrorCollector


def large_rope_base(small: ModelConfig, head_dim: int) -> float | None:
    """The large model's base: each pair of the small one finds its frequency among the large one's."""
    if small.rope_base is None or head_dim % small.head_dim == 0:
        return small.rope_base
    return small.rope_base ** (head_dim / small.head_dim)


@cache
def head_feature_map(part: str, small: int, large: int, rotary: bool) -> Tensor:
    """How one head's features grow, (d2, d1), fp64. part: q, k, v, or o (o reads: its transpose is a left inverse)."""
    place = _places(small, large, rotary and part in "qk")
    kept = torch.zeros(large, small, dtype=torch.float64)
    kept[place, torch.arange(small)] = 1
    if part == "k":
        return kept
    free = [i for i in range(large) if i not in set(place.tolist())]
    copies = torch.zeros_like(kept)
    copies[free, torch.arange(len(free)) % small] = 1
    if part == "q":
        return kept * (large / small) ** 0.5 + copies
    whole = kept + copies
    return whole if part == "v" else whole / whole.sum(dim=0)


@cache
def dual_head_feature_map(part: str, small: int, large: int, rotary: bool) -> Tensor:
    """The same for gradients: through what reads the features, and for o, which reads, through what writes them."""
    if part in "vo":
        return head_feature_map("o" if part == "v" else "v", small, large, rotary)
    kept = head_feature_map("k", small, large, rotary)
    if part == "q":
        # k's new features are zero: nothing reaches those of q.
        return kept / (large / small) ** 0.5
    if rotary:
        # q's new features turn by other angles than those that they copy.
        return kept
    return kept + (head_feature_map("v", small, large, rotary) - kept) * (small / large) ** 0.5


def _places(small: int, large: int, rotary: bool) -> Tensor:
    """The large feature that each small one becomes. Pairs are (i, i + d / 2)."""
    if not rotary:
        return torch.arange(small)
    step = large // small if large % small == 0 else 1
    first = torch.arange(small // 2) * step
    return torch.cat([first, first + large // 2])


def query_head_sources(groups: Tensor, small: ModelConfig, large: ModelConfig) -> Tensor:
    """The small query head that each large one copies: of the small groups that its group is made of, each in turn.

    groups: (G2, G1), what each large group's keys and values are made of.
    """
    taken: dict[tuple[int, ...], int] = {}
    found = []
    for row in groups:
        origins = tuple(row.nonzero().flatten().tolist())
        pool = [group * small.heads_per_group + head for group in origins for head in range(small.heads_per_group)]
        for _ in range(large.heads_per_group):
            turn = taken.get(origins, 0)
            found.append(pool[turn % len(pool)])
            taken[origins] = turn + 1
    return torch.tensor(found)


def check_query_heads_fit(groups: Tensor, small: ModelConfig, large: ModelConfig, errors: ErrorCollector) -> None:
    """Adds a fault where a query head of the small model would be nowhere."""
    lost = sorted(set(range(small.num_heads)) - set(query_head_sources(groups, small, large).tolist()))
    if lost:
        expected = f"room for all {small.num_heads} query heads beside their keys and values"
        found = f"{large.num_heads} / {large.num_kv_heads}: none for query head {lost[0]}"
        hint = "Keep the ratio, or take as many query heads for each KV head, or a multiple of the small KV heads."
        errors.add("large.num_heads / large.num_kv_heads", expected, found, hint)


def check_rotary_angles(small: ModelConfig, large: ModelConfig, errors: ErrorCollector) -> None:
    """Adds a fault where rotary angles cannot be kept at another head size."""
    if large.head_dim != small.head_dim and small.rotary_fraction != 1:
        hint = "Which of the new features turn would not be the same part of them: keep head_dim."
        expected = f"{small.head_dim} with rotary_fraction = {small.rotary_fraction}"
        errors.add("large.head_dim", expected, large.head_dim, hint)
    kind = scaling_kind(small.rope_scaling)
    if large.head_dim != small.head_dim and kind not in SIZE_INDEPENDENT_KINDS:
        hint = "Its angles depend on the head size: keep head_dim."
        errors.add("large.head_dim", f"{small.head_dim} with rope_scaling {kind!r}", large.head_dim, hint)
