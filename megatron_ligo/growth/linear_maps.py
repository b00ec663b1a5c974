"""Representations of a width map, and their products.

    DenseMap             every entry
    FrozenIdentityMap    [I; C]: identity rows, which need no product, above learned rows
    RowSelection         at most one entry per row: most starts of a fit
    LowRankMap           start + U V, with a fixed start

Legend: n large features, m small features, r rank, k columns. A map is (n, m). `apply` maps (..., m) to (..., n),
`apply_transposed` maps (..., n) to (..., m), and `@` maps a matrix (m, k) or a vector (m,) to (n, k) or (n,).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor


def full_cost(n: int, m: int) -> int:
    """Returns the multiplications of a dense (n, m) map by a vector."""
    return n * m


def low_rank_cost(n: int, m: int, rank: int, start: int) -> int:
    """Returns the multiplications of start + U V by a vector. start: those of the start."""
    return start + rank * (n + m)


class LinearMap(ABC):
    """A width map (n, m). cost: multiplications of the map, or of its transpose, by a vector."""

    shape: tuple[int, int]
    cost: int

    @property
    def nbytes(self) -> int:
        """Bytes of the map's own tensors."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """(..., m) -> (..., n)."""

    @abstractmethod
    def apply_transposed(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)."""

    @abstractmethod
    def __matmul__(self, x: Tensor) -> Tensor:
        """(m, k) -> (n, k), or (m,) -> (n,)."""

    @abstractmethod
    def to(self, like: Tensor) -> LinearMap:
        """Returns the map in the dtype and on the device of another tensor."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Returns every entry, (n, m)."""


class DenseMap(LinearMap):
    """A map stored entry by entry, (n, m)."""

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
    """[I; C], (n, m): row i < num_copied copies feature first + i; the entries stored for it are ignored."""

    def __init__(self, tensor: Tensor, num_copied: int, first: int):
        self.stored = tensor
        self.num_copied, self.first = num_copied, first
        self.learned = tensor[num_copied:]
        self.shape = tuple(tensor.shape)
        self.cost = full_cost(self.shape[0] - num_copied, self.shape[1])

    def _copy(self, x: Tensor, dim: int) -> Tensor:
        return x.narrow(dim, self.first, self.num_copied)

    def apply(self, x):
        return torch.cat([self._copy(x, -1), F.linear(x, self.learned)], dim=-1)

    def apply_transposed(self, x):
        num_after = self.shape[1] - self.first - self.num_copied
        copied = F.pad(x[..., : self.num_copied], (self.first, num_after))
        return copied + x[..., self.num_copied :] @ self.learned

    def __matmul__(self, x):
        return torch.cat([self._copy(x, 0), self.learned @ x])

    def to(self, like):
        return FrozenIdentityMap(self.stored.to(like), self.num_copied, self.first)

    def dense(self):
        identity = torch.eye(self.shape[1], dtype=self.learned.dtype, device=self.learned.device)
        return torch.cat([self._copy(identity, 0), self.learned])


class _SelectRows(torch.autograd.Function):
    """A row selection or its transpose. Both passes use gathers, as scatter-adds are slow."""

    @staticmethod
    def forward(ctx, x: Tensor, selection: RowSelection, transposed: bool) -> Tensor:
        ctx.selection, ctx.transposed = selection, transposed
        return selection.gather_transposed(x) if transposed else selection.gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _SelectRows.apply(grad, ctx.selection, not ctx.transposed), None, None


class RowSelection(LinearMap):
    """Row i is scale[i] times small feature source[i]. Empty rows have scale 0. Never learned."""

    cost = 0

    def __init__(self, source: Tensor, scale: Tensor, small: int, copies: list[tuple[Tensor, Tensor]] | None = None):
        """source: (n,), int64; scale: (n,); small: m; copies: the result of `_index_copies`, if known."""
        self.source = source
        self.scale = scale
        self.shape = (len(source), small)
        self.copies = _index_copies(source, scale, small) if copies is None else copies

    @staticmethod
    def from_matrix(matrix: Tensor) -> RowSelection | None:
        """Returns a matrix (n, m) as a selection; None if some row has several entries."""
        # Learned rows come last: testing the last row first rejects most matrices early.
        if any(bool(((rows != 0).sum(dim=1) > 1).any()) for rows in (matrix[-1:], matrix)):
            return None
        source = matrix.abs().argmax(dim=1)
        return RowSelection(source, matrix.gather(1, source[:, None]).squeeze(1), matrix.shape[1])

    def gather(self, x: Tensor) -> Tensor:
        """(..., m) -> (..., n). `apply` has the faster backward pass."""
        return x.index_select(-1, self.source) * self.scale

    def gather_transposed(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m). `apply_transposed` has the faster backward pass."""
        total = x.new_zeros(*x.shape[:-1], self.shape[1])
        for index, scale in self.copies:
            total += x.index_select(-1, index) * scale
        return total

    def apply(self, x):
        return _SelectRows.apply(x, self, False)

    def apply_transposed(self, x):
        return _SelectRows.apply(x, self, True)

    def select(self, x: Tensor, dim: int) -> Tensor:
        """Maps dim `dim` of a tensor: (..., m, ...) -> (..., n, ...)."""
        return x.index_select(dim, self.source) * self.scale.reshape(-1, *[1] * (x.dim() - 1 - dim))

    def __matmul__(self, x):
        return self.select(x, 0)

    def to(self, like):
        copies = [(index.to(like.device), scale.to(like)) for index, scale in self.copies]
        return RowSelection(self.source.to(like.device), self.scale.to(like), self.shape[1], copies)

    def dense(self):
        return self.scale.new_zeros(self.shape).scatter_(1, self.source[:, None], self.scale[:, None])


def _index_copies(source: Tensor, scale: Tensor, small: int) -> list[tuple[Tensor, Tensor]]:
    """Returns, for k = 0, 1, ..., the row of the k-th copy of each small feature, (m,), and its scale, (m,).

    The scale is 0 for features with fewer copies.
    """
    order = torch.argsort(source, stable=True)
    order = order[scale[order] != 0]
    features = source[order]
    first = torch.searchsorted(features, torch.arange(small, device=source.device))
    copy_number = torch.arange(len(order), device=source.device) - first[features]
    copies = []
    for k in range(int(copy_number.max()) + 1 if len(copy_number) else 0):
        rows = order[copy_number == k]
        index = torch.zeros(small, dtype=torch.int64, device=source.device)
        weight = torch.zeros(small, dtype=scale.dtype, device=source.device)
        index[source[rows]] = rows
        weight[source[rows]] = scale[rows]
        copies.append((index, weight))
    return copies


class LowRankMap(LinearMap):
    """start + U V: start (n, m), u (n, r), v (r, m)."""

    def __init__(self, start: LinearMap, u: Tensor, v: Tensor):
        self.start, self.u, self.v = start, u, v
        self.shape = start.shape
        self.cost = low_rank_cost(*self.shape, v.shape[0], start.cost)

    def apply(self, x):
        return self.start.apply(x) + F.linear(F.linear(x, self.v), self.u)

    def apply_transposed(self, x):
        # U V first: recomputation stops after the last saved tensor, so it skips the start.
        low_rank = (x @ self.u) @ self.v
        return low_rank + self.start.apply_transposed(x)

    def __matmul__(self, x):
        return self.start @ x + self.u @ (self.v @ x)

    def to(self, like):
        return LowRankMap(self.start.to(like), self.u.to(like), self.v.to(like))

    def dense(self):
        return self.start.dense() + self.u @ self.v


def cheapest_form(matrix: Tensor) -> LinearMap:
    """Returns the cheapest representation of a matrix (n, m). All representations give the same products."""
    if matrix.requires_grad:
        # Zero entries have gradients, too.
        return DenseMap(matrix)
    selection = RowSelection.from_matrix(matrix)
    if selection is not None:
        return selection
    small = matrix.shape[1]
    if matrix.shape[0] > small and torch.equal(matrix[:small], torch.eye(small).to(matrix)):
        return FrozenIdentityMap(matrix, small, 0)
    return DenseMap(matrix)
