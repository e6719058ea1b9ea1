"""Uniform columns: every draw stands for n / m keys."""

from __future__ import annotations

import math

import pytest
import torch

from hyperframe.samplers.uniform import Uniform


@pytest.mark.parametrize("num_samples", [1, 8, 200])
def test_every_draw_stands_for_n_over_m_keys(num_samples: int) -> None:
    x = torch.zeros(2, 3, 50, 4)
    sample = Uniform().sample(x, x, x, num_samples=num_samples)
    expected = torch.full((2, 3, num_samples), math.log(50 / num_samples))
    torch.testing.assert_close(sample.log_weight, expected)


def test_every_draw_of_a_prefix_stands_for_its_length_over_m_keys() -> None:
    x = torch.zeros(2, 3, 50, 4)
    sample = Uniform().sample_prefixes(x, x, x, num_samples=4, prefixes=torch.tensor([10, 37]))
    torch.testing.assert_close(sample.log_weight[:, :, 0], torch.full((2, 3, 4), math.log(10 / 4)))
    torch.testing.assert_close(sample.log_weight[:, :, 1], torch.full((2, 3, 4), math.log(37 / 4)))


def test_queries_keys_and_values_are_not_read() -> None:
    x = torch.zeros(2, 3, 50, 4)
    nan = torch.full_like(x, float("nan"))
    g, h = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    mine = Uniform().sample(x, x, x, num_samples=9, generator=g)
    its = Uniform().sample(nan, nan, nan, num_samples=9, generator=h)
    assert torch.equal(mine.index, its.index)
