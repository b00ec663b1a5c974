"""Token codes: what the tokens before and after a token say about it, without what an old embedding holds already.

    M = [PPMI(C), PPMI(C^T)]            C: counts of pairs (token, next token)
    codes = U sqrt(S), scaled           the leading left singular vectors of (I - Q Q^T) M

Q is a basis of the old embedding's columns and of the constant vector (centring). The decomposition is randomised, and
M stays sparse. Legend: V tokens, K codes, p random probes (K and a few more), n distinct pairs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.common.seeding import seeded_generator

OVERSAMPLING = 16
POWER_ITERATIONS = 2
# Columns of a dense matrix that meet the sparse one at once.
COLUMNS_AT_ONCE = 128


@dataclass(frozen=True)
class PairCounts:
    """Counts of pairs of neighbouring tokens. first, second: (n,) int64; count: (n,), as fp64; vocab_size: V."""

    first: Tensor
    second: Tensor
    count: Tensor
    vocab_size: int


@dataclass(frozen=True)
class TokenCodes:
    """codes: (V, K) fp32, of root mean square 1; flops: of the decomposition."""

    codes: Tensor
    flops: float


class _PpmiMatrix:
    """M = [P, P^T], (V, 2 V), with P the positive pointwise mutual information of the pairs, (V, V) sparse."""

    def __init__(self, pairs: PairCounts):
        size = pairs.vocab_size
        first = torch.zeros(size, dtype=torch.float64).index_add_(0, pairs.first, pairs.count)
        second = torch.zeros(size, dtype=torch.float64).index_add_(0, pairs.second, pairs.count)
        value = torch.log(pairs.count * pairs.count.sum() / (first[pairs.first] * second[pairs.second]))
        keep = value > 0
        self.size, self.entries = size, int(keep.sum())
        self.forward = _to_csr(pairs.first[keep], pairs.second[keep], value[keep].float(), size)
        self.backward = _to_csr(pairs.second[keep], pairs.first[keep], value[keep].float(), size)

    def multiply(self, x: Tensor) -> Tensor:
        """M x: (2 V, p) -> (V, p)."""
        upper, lower = x.split(self.size)
        return _product(self.forward, upper) + _product(self.backward, lower)

    def multiply_transposed(self, y: Tensor) -> Tensor:
        """M^T y: (V, p) -> (2 V, p)."""
        return torch.cat([_product(self.backward, y), _product(self.forward, y)])


def _to_csr(rows: Tensor, columns: Tensor, values: Tensor, size: int) -> Tensor:
    """Builds a (size, size) sparse matrix from entries (n,)."""
    order = torch.argsort(rows * size + columns)
    starts = torch.searchsorted(rows[order].contiguous(), torch.arange(size + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # sparse CSR tensors are "in beta state"
        return torch.sparse_csr_tensor(starts, columns[order], values[order], (size, size))


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """Returns matrix @ x, (V, V) sparse by (V, p), a few columns at a time."""
    return torch.cat([matrix @ part.contiguous() for part in x.split(COLUMNS_AT_ONCE, dim=1)], dim=1)


def token_codes(pairs: PairCounts, num_codes: int, seed: int, embedding: Tensor | None = None) -> TokenCodes:
    """Computes `num_codes` codes of each token. embedding: (V, D1), whose columns the codes are orthogonal to.

    ConfigError if so many orthogonal codes do not exist.
    """
    size = pairs.vocab_size
    known = torch.ones(size, 1) if embedding is None else torch.cat([torch.ones(size, 1), embedding.float()], dim=1)
    if num_codes + known.shape[1] > size:
        expected = f"at most {size - known.shape[1]} with a vocabulary of {size} and {known.shape[1] - 1} old features"
        raise ConfigError(Problem("the number of codes", expected, num_codes, "Grow hidden_size less."))
    basis = torch.linalg.qr(known)[0]
    probes = min(num_codes + OVERSAMPLING, size - known.shape[1])
    matrix = _PpmiMatrix(pairs)

    def without_known(y: Tensor) -> Tensor:
        return y - basis @ (basis.T @ y)

    generator = seeded_generator(seed, "codes")
    y = without_known(matrix.multiply(torch.randn(2 * size, probes, generator=generator)))
    for _ in range(POWER_ITERATIONS):
        y = torch.linalg.qr(y)[0]
        y = without_known(matrix.multiply(matrix.multiply_transposed(without_known(y))))
    y = without_known(torch.linalg.qr(y)[0])
    projected = matrix.multiply_transposed(y)
    squares, rotation = torch.linalg.eigh(projected.T @ projected)
    # In falling order of the singular values.
    codes = y @ rotation.flip(1)[:, :num_codes] * squares.flip(0)[:num_codes].clamp(min=0) ** 0.25
    largest = codes.gather(0, codes.abs().argmax(dim=0, keepdim=True))
    codes = codes * largest.sign() / codes.square().mean().sqrt()
    products = 2 + 2 * POWER_ITERATIONS
    dense = 4 * size * probes * (basis.shape[1] * (2 + 2 * POWER_ITERATIONS) + probes * (2 + POWER_ITERATIONS))
    return TokenCodes(codes, float(products * 4 * matrix.entries * probes + dense))
