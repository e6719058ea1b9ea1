"""Sample sizes of the lemmas."""

from __future__ import annotations

import math

import pytest
import torch

from hyperframe.diagnostics import sample_size, softmax_stable_rank, value_sample_size
from hyperframe.errors import ArgumentError
from hyperframe.samplers import create
from tests.diagnostics import dense


def test_the_size_grows_as_lemma_1_says() -> None:
    base = 3.0 * math.log(1000) / 0.5**6
    assert sample_size(1.0, 1.0, 0.5, 1000, constant=3.0).item() == math.ceil(base)
    assert sample_size(10.0, 1.0, 0.5, 1000, constant=3.0).item() == math.ceil(100 * base)
    assert sample_size(1.0, 2.0, 0.5, 1000, constant=3.0).item() == math.ceil(128 * base)
    assert sample_size(1.0, 1.0, 0.25, 1000, constant=3.0).item() == math.ceil(64 * base)


def test_and_that_of_value_rows_as_lemma_2_says() -> None:
    assert value_sample_size(2.0, 64, 0.5, failure=0.1).item() == 5120.0
    found = value_sample_size(torch.tensor([0.0, 1.5]), 3, 1.0, failure=0.5)
    assert found.tolist() == [1.0, 9.0]


def test_tensors_of_heads_are_welcome_and_too_much_is_infinite() -> None:
    alpha, kappa = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1e100]]).double()
    found = sample_size(alpha, kappa, 1.0, 100)
    assert found.shape == (1, 2)
    assert found.tolist() == [[5.0, math.inf]]
    assert sample_size(0.0, 1.0, 1.0, 1).item() == 1.0


def test_sizes_of_impossible_parameters_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"kappa: holds 0\.5, but it is at least 1"):
        sample_size(1.0, 0.5, 0.5, 100)
    with pytest.raises(ArgumentError, match="alpha: holds nan"):
        sample_size(torch.tensor(float("nan")), 1.0, 0.5, 100)
    for epsilon in (0.0, 1.5):
        with pytest.raises(ArgumentError, match="epsilon"):
            sample_size(1.0, 1.0, epsilon, 100)
        with pytest.raises(ArgumentError, match="epsilon"):
            value_sample_size(1.0, 64, epsilon)
    with pytest.raises(ArgumentError, match="stable_rank: holds -1"):
        value_sample_size(-1.0, 64, 0.5)


@pytest.mark.statistical
@pytest.mark.parametrize("epsilon", [0.5, 1.0])
def test_that_many_value_rows_keep_the_promise_of_lemma_2(epsilon: float) -> None:
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 50, 4, generator=g).double() for _ in range(2))
    value = torch.randn(1, 1, 50, 3, generator=g).double()
    share = dense.softmax(query, key)
    failure = 0.2
    size = value_sample_size(softmax_stable_rank(query, key), 3, epsilon, failure=failure)
    limit = epsilon * dense.operator_norm(share) * dense.operator_norm(value)
    wrong = 0
    for _ in range(100):
        sample = create("row_norm").sample(
            query, key, value, num_samples=int(size.item()), generator=g
        )
        index = sample.index[0, 0]
        drawn = sample.log_weight[0, 0].double().exp().unsqueeze(-1) * value[0, 0, index]
        error = dense.operator_norm(share[0, 0][:, index] @ drawn - (share @ value)[0, 0])
        wrong += int(error.item() > limit.item())
    # at most 20 are expected; 45 or more have a probability below 1e-7. By Markov's inequality
    # the bound is loose, so that far fewer are seen
    assert wrong < 45
