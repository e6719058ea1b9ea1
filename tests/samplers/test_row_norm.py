"""Row-norm sampling: the weights of Lemma 2."""

from __future__ import annotations

import torch

from hyperframe.samplers.row_norm import RowNorm


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_weights_are_those_of_lemma_2() -> None:
    value = torch.randn(2, 3, 50, 8, generator=generator(), dtype=torch.float64)
    sample = RowNorm().sample(value, value, value, num_samples=40, generator=generator(1))
    squared = value.square().sum(-1)
    # ||V||_F^2 / (m ||V_l||^2)
    expected = squared.sum(-1, keepdim=True) / (40 * squared.gather(-1, sample.index))
    torch.testing.assert_close(sample.log_weight.exp().double(), expected, rtol=1e-5, atol=0)


def test_the_sampled_product_with_v_has_the_error_of_lemma_2() -> None:
    # Lemma 2's matrix S: E ||A S^T S V - A V||_F^2 <= ||A||_F^2 ||V||_F^2 / m, for any A. with p
    # of the squared row norms of V it holds for every A; the mean of 400 independent samples of a
    # quantity that is at most (about) its bound stays below twice that bound
    m, copies = 16, 400
    a = torch.randn(20, 60, generator=generator(), dtype=torch.float64)
    v = torch.randn(60, 4, generator=generator(1), dtype=torch.float64)
    v *= torch.linspace(0.3, 3, 60)[:, None]
    value = v.expand(copies, 1, -1, -1)
    sample = RowNorm().sample(value, value, value, num_samples=m, generator=generator(2))
    weight = sample.log_weight.double().exp()
    index = sample.index[:, 0]
    product = torch.einsum("rcm,cm,cmd->crd", a[:, index], weight[:, 0], v[index])
    error = (product - a @ v).square().sum((-1, -2))
    bound = a.square().sum() * v.square().sum() / m
    assert error.mean() <= 2 * bound
    assert error.mean() >= 0.05 * bound  # and it is a sample, not the product


def test_a_vanishing_value_counts_as_a_hundredth_of_the_mean_so_far() -> None:
    value = torch.ones(1, 1, 10, 4)
    value[:, :, 6] = 1e-8
    density = RowNorm().density(value, value, value)
    assert density is not None
    assert torch.equal(density[0, 0, :6], torch.full((6,), 4.0, dtype=torch.float64))
    mean = (6 * 4.0 + 4e-16) / 7
    torch.testing.assert_close(density[0, 0, 6].item(), 0.01 * mean)


def test_no_later_value_moves_the_density_of_a_key() -> None:
    value = torch.randn(1, 2, 30, 4, generator=generator())
    value[:, :, ::3] *= 1e-3
    other = value.clone()
    other[:, :, 12:] *= 100
    mine, its = (RowNorm().density(v, v, v) for v in (value, other))
    assert mine is not None
    assert its is not None
    assert torch.equal(mine[..., :12], its[..., :12])
    assert not torch.equal(mine[..., 12:], its[..., 12:])
