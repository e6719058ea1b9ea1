"""Row-norm sampling: the weights of Lemma 2."""

from __future__ import annotations

import pytest
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


def test_a_vanishing_value_counts_as_a_hundredth_of_the_mean() -> None:
    value = torch.ones(1, 1, 10, 4)
    value[:, :, 0] = 0
    sample = RowNorm().sample(value, value, value, num_samples=4000, generator=generator())
    mean = 9 * 4.0 / 10
    total = 9 * 4.0 + 0.01 * mean
    at_zero = sample.index == 0
    expected = torch.where(at_zero, total / (0.01 * mean), total / 4.0) / 4000
    torch.testing.assert_close(sample.log_weight.exp(), expected.float())
    # drawn with probability 0.001: absent from 4,000 draws with a chance of 2 %, so count instead
    # over 20 seeds (80 expected; below 20 with a chance under 1e-12)
    draws = [
        RowNorm().sample(value, value, value, num_samples=4000, generator=generator(seed)).index
        for seed in range(20)
    ]
    assert sum(int((index == 0).sum()) for index in draws) >= 20


@pytest.mark.statistical
def test_an_early_key_with_a_vanishing_value_is_drawn_from_prefixes() -> None:
    copies, m = 4000, 256
    value = torch.ones(1, 1, 512, 4)
    value[:, :, 0] = 0
    value = value.expand(copies, 1, 512, 4)
    sample = RowNorm().sample_prefixes(
        value, value, value, num_samples=m, prefixes=torch.tensor([480, 512]), generator=generator()
    )
    weight = (sample.log_weight.exp() * (sample.index == 0)).sum(-1)[:, 0, 1].double()
    # all rows of the second tile see 480 keys: key 0 has the probability 0.01 / 512 and the weight
    # 512 / (256 * 0.01) = 200; 20 draws are expected, none has a chance of 2e-9; the mean is 1 with
    # the standard error sqrt(200 / 4000) = 0.22, above 1 + 7 of them with a chance below 1e-6
    assert 0 < weight.mean() <= 1 + 7 * 0.23
    assert float(sample.log_weight.exp().max()) <= 200.1


def test_values_of_zero_alone_are_drawn_uniformly() -> None:
    value = torch.zeros(1, 1, 64, 4)
    sample = RowNorm().sample(value, value, value, num_samples=8, generator=generator())
    torch.testing.assert_close(sample.log_weight.exp(), torch.full((1, 1, 8), 8.0))
    prefixes = RowNorm().sample_prefixes(
        value, value, value, num_samples=8, prefixes=torch.tensor([32, 64]), generator=generator()
    )
    expected = torch.tensor([4.0, 8.0]).view(1, 1, 2, 1).expand(1, 1, 2, 8)
    torch.testing.assert_close(prefixes.log_weight.exp(), expected)


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
