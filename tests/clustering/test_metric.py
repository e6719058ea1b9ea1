"""Square roots of second moments, and what makes two of them agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.clustering import (
    balancing,
    in_metric_of,
    prefix_moments,
    second_moment,
    square_root,
)


def rows(*shape: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """Normal rows whose coordinates differ in size by factors up to `10 ** spread`."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-spread / 2, spread / 2, shape[-1], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(shape[-1], shape[-1], generator=g).double()).Q
    drawn: torch.Tensor = torch.randn(*shape, generator=g, dtype=torch.float64) * sizes @ turn
    return drawn


def test_the_second_moment_is_the_mean_of_outer_products() -> None:
    x = rows(2, 3, 7, 4)
    expected = torch.stack([torch.einsum("...i,...j->...ij", r, r) for r in x.unbind(2)]).mean(0)
    torch.testing.assert_close(second_moment(x), expected)
    assert second_moment(x.float()).dtype == torch.float64
    assert torch.equal(second_moment(x[:, :, :0]), torch.zeros(2, 3, 4, 4).double())


@pytest.mark.parametrize("dim", [1, 5, 64, 256])
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_the_root_squares_to_the_moment_and_its_inverse_undoes_it(dim: int, spread: float) -> None:
    moment = second_moment(rows(2, 4 * dim, dim, spread=spread))
    root, inverse = square_root(moment)
    values, vectors = torch.linalg.eigh(moment)
    expected = vectors @ torch.diag_embed(values.clamp(min=0).sqrt()) @ vectors.mT
    size = root.abs().amax()
    torch.testing.assert_close(root / size, expected / size, rtol=0, atol=2e-3)
    # by no more than eigenvalues are raised
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    raised = 1e-6 * mean + 2e-7 * torch.linalg.matrix_norm(moment)
    off = torch.linalg.matrix_norm(root @ root - moment, ord=2)
    assert bool((off <= 1.01 * raised + 1e-12 * size**2).all())
    torch.testing.assert_close(root @ inverse, torch.eye(dim).double().expand_as(root))


@pytest.mark.parametrize("dim", [3, 256])
def test_moments_without_an_inverse_have_roots_with_one(dim: int) -> None:
    one = torch.zeros(dim, dim, dtype=torch.float64)
    one[0, 0] = 1e-12  # a single direction, and tiny
    for moment in (one, torch.zeros_like(one)):
        root, inverse = square_root(moment)
        assert torch.isfinite(inverse).all()
        torch.testing.assert_close(root @ inverse, torch.eye(dim).double(), rtol=1e-6, atol=1e-6)
    # nothing known: the identity
    assert torch.allclose(root, torch.eye(dim).double(), rtol=1e-5)


@given(dim=st.integers(1, 12), seed=st.integers(0, 1000), spread=st.floats(0.0, 2.0))
def test_balancing_makes_moments_agree_and_keeps_products(
    dim: int, seed: int, spread: float
) -> None:
    query = rows(40, dim, seed=seed, spread=spread)
    key = 7 * rows(50, dim, seed=seed + 1, spread=spread)
    factor, inverse = balancing(second_moment(query), second_moment(key))
    torch.testing.assert_close(factor, factor.mT, rtol=1e-6, atol=1e-9)
    balanced_query, balanced_key = query @ factor, key @ inverse
    product = query @ key.mT
    # root and inverse undo each other to about the rounding of a condition number of 1e5
    atol = 1e-7 * float(product.abs().max())
    torch.testing.assert_close(balanced_query @ balanced_key.mT, product, rtol=0, atol=atol)
    one, two = second_moment(balanced_query), second_moment(balanced_key)
    atol = 0.01 * float(one.abs().max())
    torch.testing.assert_close(one, two, rtol=0, atol=atol)


def test_unbalanced_moments_do_not_agree() -> None:
    # the check above can fail: 2 orders of magnitude lie between the two
    one, two = second_moment(rows(40, 6)), second_moment(7 * rows(50, 6, seed=1))
    assert (one - two).abs().max() > 0.5 * two.abs().max()


def test_prefix_moments_are_those_of_each_prefix_and_of_nothing_behind_it() -> None:
    x, ends = rows(2, 3, 40, 5) + 3.0, [1, 4, 4, 16, 40]
    means, covariances = prefix_moments(x, ends)
    for end, mean, covariance in zip(ends, means, covariances, strict=True):
        part = x[:, :, :end]
        torch.testing.assert_close(mean, part.mean(dim=2))
        centred = part - part.mean(dim=2, keepdim=True)
        torch.testing.assert_close(covariance, second_moment(centred), rtol=1e-6, atol=1e-9)
    x[:, :, 16:] *= -5
    changed = prefix_moments(x, ends)
    assert torch.equal(means[:4], changed[0][:4])
    assert torch.equal(covariances[:4], changed[1][:4])
    assert not torch.equal(covariances[4], changed[1][4])


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_distances_in_the_metric_are_those_of_logits(key_heads: int) -> None:
    query, key = rows(2, 4, 30, 6, spread=1.5), rows(2, key_heads, 9, 6, seed=1)
    points = in_metric_of(query, key)
    grouped = query.reshape(2, key_heads, -1, 6)
    logits = grouped @ key.mT
    expected = (logits.unsqueeze(-1) - logits.unsqueeze(-2)).square().mean(dim=2)
    found = (points.unsqueeze(-2) - points.unsqueeze(-3)).square().sum(dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_points_are_in_float32_at_least(dtype: torch.dtype) -> None:
    key = rows(1, 1, 5, 4).to(dtype)
    assert in_metric_of(key, key).dtype == torch.promote_types(dtype, torch.float32)
    # without queries, the keys themselves
    torch.testing.assert_close(
        in_metric_of(key[:, :, :0], key).double(), key.double(), rtol=1e-5, atol=1e-6
    )


def test_a_moment_with_rounding_below_zero_has_a_finite_root() -> None:
    # what float32 products leave of heads of low rank: eigenvalues of -4e-6 beside 100
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=g, dtype=torch.float64)).Q
    values = torch.linspace(-1, 2, 64, dtype=torch.float64).pow(3) * 12
    values[values < 0.1] = -4e-6
    moment = (basis * values) @ basis.T
    root, inverse = square_root(moment)
    assert root.isfinite().all()
    assert inverse.isfinite().all()
    assert float((root @ root - moment).norm() / moment.norm()) < 1e-5
