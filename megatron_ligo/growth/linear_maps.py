"""The forms in which a width map is held, and its products in each. A map is (large x small): n x m, rank r.

    Full      every entry
    Kept      [I; C]: rows that copy small features and take no product, above learned ones
    Copies    one scaled small feature a row (or none): where a fit starts, mostly
    LowRank   start + U V, the start fixed

`push` takes (..., m) to (..., n), `pull` (..., n) to (..., m) by the transpose, `@` a matrix (m, k) or vector (m,) to
(n, k) or (n,). `cost` is the multiplications that one vector takes, either way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor


def full_cost(n: int, m: int) -> int:
    return n * m


def low_rank_cost(n: int, m: int, rank: int, start: int) -> int:
    """start: the cost of what U V is added to."""
    return start + rank * (n + m)


class LinearMap(ABC):
    shape: tuple[int, int]
    cost: int

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def apply_transposed(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def __matmul__(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def to(self, like: Tensor) -> LinearMap:
        """The same in another tensor's dtype."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Every entry (n, m)."""


class DenseMap(LinearMap):
    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.shape = tuple(tensor.shape)
        self.cost = full_cost(*self.shape)

    def apply(self, x):
        return F.linear(x, self.tensor)

    def apply_transposed(self, x):
        return x @ self.tensor

    def __matmul__(self, x):
        return self.tensor @ x

    def to(self, like):
        return DenseMap(self.tensor.to(like))

    def dense(self):
        return self.tensor


class FrozenIdentityMap(LinearMap):
    """tensor (n, m): its first `kept` rows are not looked at, but are the identity's, from column `first` on."""

    def __init__(self, tensor: Tensor, kept: int, first: int):
        self.whole = tensor
        self.kept, self.first = kept, first
        self.tensor = tensor[kept:]
        self.shape = tuple(tensor.shape)
        self.cost = full_cost(self.shape[0] - kept, self.shape[1])

    def _copied(self, x: Tensor, dim: int) -> Tensor:
        return x.narrow(dim, self.first, self.kept)

    def apply(self, x):
        return torch.cat([self._copied(x, -1), F.linear(x, self.tensor)], dim=-1)

    def apply_transposed(self, x):
        after = self.shape[1] - self.first - self.kept
        return F.pad(x[..., : self.kept], (self.first, after)) + x[..., self.kept :] @ self.tensor

    def __matmul__(self, x):
        return torch.cat([self._copied(x, 0), self.tensor @ x])

    def to(self, like):
        return FrozenIdentityMap(self.whole.to(like), self.kept, self.first)

    def dense(self):
        identity = torch.eye(self.shape[1], dtype=self.tensor.dtype, device=self.tensor.device)
        return torch.cat([self._copied(identity, 0), self.tensor])


class _Take(torch.autograd.Function):
    """x[..., source] * scale and its transpose, as gathers both ways: adding into scattered places is slow."""

    @staticmethod
    def forward(ctx, x: Tensor, copies: RowSelection, transposed: bool) -> Tensor:
        ctx.copies, ctx.transposed = copies, transposed
        return copies.gather_transposed(x) if transposed else copies.gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Take.apply(grad, ctx.copies, not ctx.transposed), None, None


class RowSelection(LinearMap):
    """Row i is scale[i] times small feature source[i]; a row without a feature has scale 0. Never learned."""

    cost = 0

    def __init__(self, source: Tensor, scale: Tensor, small: int, rounds: list[tuple[Tensor, Tensor]] | None = None):
        self.source = source
        self.scale = scale
        self.shape = (len(source), small)
        self.rounds = _rounds(source, scale, small) if rounds is None else rounds

    @staticmethod
    def from_matrix(matrix: Tensor) -> RowSelection | None:
        """A matrix in this form, or None where a row of it has more than one entry."""
        # Most that have such a row have it at the end, where what is learned stands.
        if any(bool(((rows != 0).sum(dim=1) > 1).any()) for rows in (matrix[-1:], matrix)):
            return None
        source = matrix.abs().argmax(dim=1)
        return RowSelection(source, matrix.gather(1, source[:, None]).squeeze(1), matrix.shape[1])

    def gather(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.source) * self.scale

    def gather_transposed(self, x: Tensor) -> Tensor:
        total = x.new_zeros(*x.shape[:-1], self.shape[1])
        for index, scale in self.rounds:
            total += x.index_select(-1, index) * scale
        return total

    def apply(self, x):
        return _Take.apply(x, self, False)

    def apply_transposed(self, x):
        return _Take.apply(x, self, True)

    def select(self, x: Tensor, dim: int) -> Tensor:
        """x with its dimension `dim`, of m, moved through the map."""
        return x.index_select(dim, self.source) * self.scale.reshape(-1, *[1] * (x.dim() - 1 - dim))

    def __matmul__(self, x):
        return self.select(x, 0)

    def to(self, like):
        rounds = [(index, scale.to(like)) for index, scale in self.rounds]
        return RowSelection(self.source, self.scale.to(like), self.shape[1], rounds)

    def dense(self):
        return self.scale.new_zeros(self.shape).scatter_(1, self.source[:, None], self.scale[:, None])


def cheapest_form(matrix: Tensor) -> LinearMap:
    """The cheapest form of a map (n, m) as it is stored. Products in any of them are the same numbers."""
    if matrix.requires_grad:
        # Entries that are zero have a gradient, too.
        return DenseMap(matrix)
    found = RowSelection.from_matrix(matrix)
    if found is not None:
        return found
    small = matrix.shape[1]
    if matrix.shape[0] > small and torch.equal(matrix[:small], torch.eye(small).to(matrix)):
        return FrozenIdentityMap(matrix, small, 0)
    return DenseMap(matrix)


def _rounds(source: Tensor, scale: Tensor, small: int) -> list[tuple[Tensor, Tensor]]:
    """The k-th copy of each small feature and its scale (0 where there is none), for k = 0, 1, ..."""
    order = torch.argsort(source, stable=True)
    order = order[scale[order] != 0]
    features = source[order]
    first = torch.searchsorted(features, torch.arange(small, device=source.device))
    nth = torch.arange(len(order), device=source.device) - first[features]
    rounds = []
    for k in range(int(nth.max()) + 1 if len(nth) else 0):
        rows = order[nth == k]
        index = torch.zeros(small, dtype=torch.int64, device=source.device)
        weight = torch.zeros(small, dtype=scale.dtype, device=source.device)
        index[source[rows]] = rows
        weight[source[rows]] = scale[rows]
        rounds.append((index, weight))
    return rounds


class LowRankMap(LinearMap):
    def __init__(self, start: LinearMap, u: Tensor, v: Tensor):
        self.start, self.u, self.v = start, u, v
        self.shape = start.shape
        self.cost = low_rank_cost(*self.shape, v.shape[0], start.cost)

    def apply(self, x):
        return self.start.apply(x) + F.linear(F.linear(x, self.v), self.u)

    def apply_transposed(self, x):
        # In this order: where x is made again for the backward pass, what follows its last use is not.
        low = (x @ self.u) @ self.v
        return low + self.start.apply_transposed(x)

    def __matmul__(self, x):
        return self.start @ x + self.u @ (self.v @ x)

    def to(self, like):
        return LowRankMap(self.start.to(like), self.u.to(like), self.v.to(like))

    def dense(self):
        return self.start.dense() + self.u @ self.v
