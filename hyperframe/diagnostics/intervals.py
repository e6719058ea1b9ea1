"""Estimates with confidence limits that hold at any sample size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..component import check_fraction

__all__ = ["Estimate", "failure_of", "mean_estimate", "mean_limits"]

_HALVINGS = 40


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number estimated from sampled rows, and where it may lie.

    Args:
        value: float64 `[batch, query_heads]`.
        low: likewise; below the true number with probability `(1 + confidence) / 2` at least.
        high: likewise above. So both hold together with probability `confidence` at least.
        confidence: as asked for; it holds for each head by itself.
    """

    value: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    confidence: float

    def exp(self) -> Estimate:
        """Return the estimate of the exponential."""
        return replace(self, value=self.value.exp(), low=self.low.exp(), high=self.high.exp())


def failure_of(confidence: object) -> float:
    """Return the probability with which one of the two limits may be wrong."""
    return (1 - check_fraction("estimate", "confidence", confidence, include_one=False)) / 2


def mean_estimate(
    per_row: torch.Tensor, largest: float, *, is_exact: bool, confidence: float
) -> Estimate:
    """Return the mean of a sample `[batch, query_heads, R]` of numbers in `[0, largest]`.

    Args:
        per_row: the sample.
        largest: no number of the population is above.
        is_exact: whether the sample is the population.
        confidence: of the limits.
    """
    failure = failure_of(confidence)
    value = per_row.mean(dim=-1)
    if is_exact or largest == 0:
        return Estimate(value=value, low=value, high=value, confidence=confidence)
    low, high = mean_limits(value / largest, per_row.shape[-1], failure=failure)
    return Estimate(value=value, low=largest * low, high=largest * high, confidence=confidence)


def mean_limits(
    mean: torch.Tensor, num_samples: int, *, failure: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return limits of the mean of a population of numbers in [0, 1], from a sample's mean.

    Inverts Chernoff's bound `P(sample mean >= u) <= exp(-m kl(u, mean))` and its mirror image: no
    assumption on the population, no asymptotics. It also holds without replacement.

    Args:
        mean: float64, the sample's mean.
        num_samples: m.
        failure: probability with which each of the limits may be wrong.

    Returns:
        A lower and an upper limit.

    Source: Hoeffding, Probability inequalities for sums of bounded random variables (1963),
    Theorems 1 and 4.

    Example:
        >>> low, high = mean_limits(torch.tensor([0.0, 0.5]).double(), 100, failure=0.025)
        >>> low.round(decimals=3).tolist(), high.round(decimals=3).tolist()
        ([0.0, 0.367], [0.036, 0.633])
    """
    mean = mean.clamp(0.0, 1.0)
    return 1 - _upper(1 - mean, num_samples, failure), _upper(mean, num_samples, failure)


def _upper(mean: torch.Tensor, num_samples: int, failure: float) -> torch.Tensor:
    """Return the largest `u >= mean` with `m kl(mean, u) <= log(1 / failure)`, by bisection."""
    largest = math.log(1 / failure) / num_samples
    inside, outside = mean, torch.ones_like(mean)
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        is_inside = _divergence(mean, middle) <= largest
        inside = torch.where(is_inside, middle, inside)
        outside = torch.where(is_inside, outside, middle)
    return outside


def _divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Relative entropy of two coins, in nats."""
    divergence: torch.Tensor = torch.xlogy(p, p / q) + torch.xlogy(1 - p, (1 - p) / (1 - q))
    return divergence
