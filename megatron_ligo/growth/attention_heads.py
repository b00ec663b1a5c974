"""Growth of heads when the ratio of query heads to KV heads, or the head size, changes.

Legend: G groups of KV heads, r query heads a group, d head size; 1 small, 2 large.

Ratio. A large group copies a small group. The query heads of a small group are dealt to its copies in turn, more than
once if there is room: each query head keeps its own keys and values, and o weights each copy by its share. This is
exact. It is impossible if the copies of a group have fewer query heads than the group. With fewer KV heads (width_init
`mean`, never exact) the keys and values of a large group are the mean over several small groups, and its query heads
are those of all of them (arXiv 2305.13245).

Size. Rotary pair j must keep its angle. If d2 is a multiple of d1, the base stays and pair j becomes pair j d2 / d1.
Otherwise the base becomes base^(d2 / d1), and pair j stays pair j, as base^(-2j / d) is then the same for both. If a
part of each head rotates, d is the size of that part, and the other features follow it. New features of q copy old
ones. Those of k are zero: they add nothing to a score, but they learn. q is multiplied by sqrt(d2 / d1), as the large
model divides scores by sqrt(d2). New features of v copy old ones, and o weights each copy by its share.

Size, with norms of q and k. Their mean square must stay, for eps does: the m copies of a feature of q are divided by
sqrt(m), so that their squares sum to the old one's, and q and k are multiplied by sqrt(d2 / d1). The gains undo it,
sqrt(m d1 / d2) for q and sqrt(d1 / d2) for k, and the gain of q takes the factor sqrt(d2 / d1) of the scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.rope_frequencies import rotary_frequencies
from megatron_ligo.arch.rope_scaling import LISTS, ORIGINAL_LENGTH, scaling_kind
from megatron_ligo.common.errors import ConfigError, ErrorCollector, Problem

# Relative difference of two frequencies that are equal but for rounding.
CLOSE = 1e-5


@dataclass(frozen=True)
class HeadGrowth:
    """The features of a head in both models.

    small, large: their number. small_rotated, large_rotated: how many of them rotate. score_factor: the small model's
    factor of the attention scores over the large one's. is_normalised: queries and keys are.
    """

    small: int
    large: int
    small_rotated: int
    large_rotated: int
    score_factor: float = 1.0
    is_normalised: bool = False

    @staticmethod
    def between(small: ModelConfig, large: ModelConfig, is_normalised: bool = False) -> HeadGrowth:
        """Returns the growth of a model's heads."""
        rotated = [0 if config.rope_base is None else config.num_rotated for config in (small, large)]
        factor = small.score_scale / large.score_scale
        return HeadGrowth(small.head_dim, large.head_dim, *rotated, factor, is_normalised)

    def positions(self) -> Tensor:
        """Returns the index of each feature of q and k in the large head, (d1,), int64.

        Rotary pairs are (i, i + d / 2) of the features that rotate, which come first.
        """
        small, large = self.small_rotated, self.large_rotated
        step = large // small if small and large % small == 0 else 1
        first = torch.arange(small // 2) * step
        return torch.cat([first, first + large // 2, torch.arange(small, self.small) + large - small])


def large_rope_base(small: ModelConfig, head_dim: int) -> float | None:
    """Returns the rotary base with which the large model keeps every frequency of the small one."""
    before, after = small.num_rotated, replace(small, rope_base=None, rope_scaling=None, head_dim=head_dim).num_rotated
    if small.rope_base is None or after % before == 0:
        return small.rope_base
    return small.rope_base ** (after / before)


def _copies(part: str, head: HeadGrowth) -> tuple[Tensor, Tensor]:
    """Returns one-hot rows (d2, d1): of the features that keep their place in q, k, v or o, and of their copies."""
    positions = head.positions() if part in "qk" else torch.arange(head.small)
    kept = torch.zeros(head.large, head.small, dtype=torch.float64)
    kept[positions, torch.arange(head.small)] = 1
    free = [i for i in range(head.large) if i not in set(positions.tolist())]
    added = torch.zeros_like(kept)
    added[free, torch.arange(len(free)) % head.small] = 1
    return kept, added


@cache
def head_feature_map(part: str, head: HeadGrowth) -> Tensor:
    """Returns the map of one head's features, (d2, d1), fp64.

    part: q, k, v or o. The transpose of o's map is a left inverse of v's.
    """
    kept, added = _copies(part, head)
    whole = kept + added
    if part in "vo":
        return whole if part == "v" else whole / whole.sum(dim=0)
    if not head.is_normalised:
        return kept if part == "k" else kept * head.score_factor + added
    root = (head.large / head.small) ** 0.5
    return root * (kept if part == "k" else whole / whole.sum(dim=0).sqrt())


@cache
def head_gain_map(part: str, head: HeadGrowth) -> Tensor:
    """Returns the map of the gains of a norm of q or k (the part), (d2, d1), fp64: one entry in each row."""
    kept, added = _copies(part, head)
    root = (head.small / head.large) ** 0.5
    if part == "k":
        return root * (kept + added)
    return root * (kept * head.score_factor + added) * (kept + added).sum(dim=0).sqrt()


@cache
def dual_head_gain_map(part: str, head: HeadGrowth) -> Tensor:
    """Returns the map of the gradients of such gains, (d2, d1), fp64.

    A kept feature's gain times its gradient is the small one's. No gradient reaches the others: those of k are zero.
    """
    kept, _ = _copies(part, head)
    return kept / head_gain_map(part, head).where(kept > 0, 1)


@cache
def dual_head_feature_map(part: str, head: HeadGrowth) -> Tensor:
    """Returns the map of the gradients of one head's features, (d2, d1), fp64.

    Gradients of q, k and v grow by the map of the features' reader, those of o by the map of v. With norms, the
    gradients of q's copies are not determined: the least-squares solution, an estimate.
    """
    if part in "vo":
        return head_feature_map("o" if part == "v" else "v", head)
    if head.is_normalised:
        return head_feature_map(part, head) * (head.small / head.large)
    kept, _ = _copies(part, head)
    if part == "q":
        # The new features of k are zero, so no gradient reaches those of q.
        return kept / head.score_factor
    if head.small_rotated:
        # The new features of q rotate by other angles than the features that they copy.
        return kept
    return kept + (head_feature_map("v", head) - kept) / head.score_factor


def query_head_sources(groups: Tensor, small: ModelConfig, large: ModelConfig) -> Tensor:
    """Returns the small query head that each large one copies, (G2 r2,), int64.

    groups: (G2, G1), nonzero for the small groups that a large group's keys and values come from. Large groups of the
    same origin take its query heads in turn.
    """
    num_taken: dict[tuple[int, ...], int] = {}
    sources = []
    for weights in groups:
        origin = tuple(weights.nonzero().flatten().tolist())
        heads = [group * small.heads_per_group + head for group in origin for head in range(small.heads_per_group)]
        for _ in range(large.heads_per_group):
            turn = num_taken.get(origin, 0)
            sources.append(heads[turn % len(heads)])
            num_taken[origin] = turn + 1
    return torch.tensor(sources)


def check_query_heads_fit(groups: Tensor, small: ModelConfig, large: ModelConfig, errors: ErrorCollector) -> None:
    """Adds an error if some small query head has no copy in the large model. groups: (G2, G1)."""
    lost = sorted(set(range(small.num_heads)) - set(query_head_sources(groups, small, large).tolist()))
    if lost:
        expected = f"room for all {small.num_heads} query heads with their keys and values"
        found = f"{large.num_heads} / {large.num_kv_heads}: none for query head {lost[0]}"
        hint = "Keep the ratio, or take as many query heads for each KV head, or a multiple of the small KV heads."
        errors.add("large.num_heads / large.num_kv_heads", expected, found, hint)


def check_rotary_angles(small: ModelConfig, large: ModelConfig, errors: ErrorCollector) -> None:
    """Adds an error if the large model's head size cannot preserve the rotary angles."""
    if large.head_dim == small.head_dim:
        return
    if small.rope_scaling and large.head_dim > small.head_dim and not _keeps_angles(small, large):
        kind = scaling_kind(small.rope_scaling)
        hint = "Its angles depend on the head size: keep head_dim."
        errors.add("large.head_dim", f"{small.head_dim} with rope_scaling {kind!r}", large.head_dim, hint)


def check_pair_lists(small: ModelConfig, head_dim: int) -> None:
    """Raises ConfigError if another head size has another number of rotary pairs than the scaling has divisors."""
    if head_dim != small.head_dim and any(key in (small.rope_scaling or {}) for key in LISTS):
        expected = f"{small.head_dim} with rope_scaling {scaling_kind(small.rope_scaling)!r}"
        hint = "It has a divisor for each rotary pair: keep head_dim."
        raise ConfigError(Problem("large.head_dim", expected, head_dim, hint))


def _keeps_angles(small: ModelConfig, large: ModelConfig) -> bool:
    """True if each rotary pair keeps its frequency in sequences of any length."""
    pairs = HeadGrowth.between(small, large).positions()[: small.num_rotated // 2]
    original = int(small.rope_scaling.get(ORIGINAL_LENGTH, 1))
    for length in (1, original + 1, 2 * small.max_positions):
        before, after = rotary_frequencies(small, length), rotary_frequencies(large, length)
        if not torch.allclose(after[pairs], before, rtol=CLOSE, atol=0):
            return False
    return True
