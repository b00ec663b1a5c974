"""Representations of a map against its dense matrix: products, transposes, gradients and cost."""

from __future__ import annotations

import pytest
import torch

from megatron_ligo.growth.linear_maps import DenseMap, FrozenIdentityMap, LowRankMap, RowSelection

N, M, RANK = 7, 4, 2


def one_entry() -> torch.Tensor:
    """Returns rows with one scaled entry: a feature without a copy, one with three copies, and an empty row."""
    matrix = torch.zeros(N, M, dtype=torch.float64)
    for row, (column, scale) in enumerate([(0, 1.0), (2, 0.5), (3, -2.0), (0, 0.25), (0, 3.0), (2, 1.5)]):
        matrix[row, column] = scale
    return matrix


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def with_identity_rows(first: int, num_rows: int) -> torch.Tensor:
    matrix = drawn(N, M)
    matrix[:num_rows] = torch.eye(M, dtype=torch.float64)[first : first + num_rows]
    return matrix


U, V = drawn(N, RANK), drawn(RANK, M)
FORMS = {
    "dense": (lambda: DenseMap(drawn(N, M)), drawn(N, M), N * M),
    "identity rows": (lambda: FrozenIdentityMap(drawn(N, M), 4, 0), with_identity_rows(0, 4), (N - 4) * M),
    "one rank's identity rows": (lambda: FrozenIdentityMap(drawn(N, M), 2, 1), with_identity_rows(1, 2), (N - 2) * M),
    "selection": (lambda: RowSelection.from_matrix(one_entry()), one_entry(), 0),
    "low rank on a selection": (
        lambda: LowRankMap(RowSelection.from_matrix(one_entry()), U, V),
        one_entry() + U @ V,
        RANK * (N + M),
    ),
    "low rank on dense": (lambda: LowRankMap(DenseMap(drawn(N, M)), U, V), drawn(N, M) + U @ V, N * M + RANK * (N + M)),
}


@pytest.mark.parametrize("kind", FORMS)
def test_products_and_gradients_are_those_of_the_dense_matrix(kind):
    make, dense, cost = FORMS[kind]
    form = make()
    assert form.shape == (N, M)
    assert form.cost == cost
    torch.testing.assert_close(form.dense(), dense)
    pairs = [
        (form.apply, lambda x: x @ dense.t(), drawn(3, 2, M)),
        (form.apply_transposed, lambda x: x @ dense, drawn(3, 2, N)),
        (form.__matmul__, lambda x: dense @ x, drawn(M, 5)),
        (form.__matmul__, lambda x: dense @ x, drawn(M)),
        (form.to(drawn(1)).apply, lambda x: x @ dense.t(), drawn(2, M)),
    ]
    for product, expected, x in pairs:
        x, reference_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, truth = product(x), expected(reference_x)
        torch.testing.assert_close(out, truth)
        weight = drawn(*truth.shape)
        (out * weight).sum().backward()
        (truth * weight).sum().backward()
        torch.testing.assert_close(x.grad, reference_x.grad)


def test_a_dense_matrix_is_no_selection():
    assert RowSelection.from_matrix(drawn(N, M)) is None
