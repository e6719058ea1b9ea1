"""Uniform columns: the residual of the published method."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..component import check_bool
from .base import AbstractSampler

__all__ = ["Uniform"]


@dataclass(frozen=True, kw_only=True)
class Uniform(AbstractSampler):
    """Keys drawn uniformly; every draw stands for `n / m` keys.

    Without replacement the draws are a simple random sample: no key twice, every set of `m` keys
    equally likely. Its variance is `(n - m) / (n - 1)` of that of independent draws, nothing at
    `m = n`. The paper's draws are independent.

    Args:
        replacement: whether draws are independent, so that a key can be drawn again.

    Cost: O(m) time and memory for a list of draws, O(m log m) time without replacement. Random.
    Source: HyperAttention, Algorithm 2, line 4; sampling without replacement: Cochran, Sampling
    Techniques, chapter 2, by the shuffle of Fisher and Yates.

    Example:
        >>> q = k = v = torch.zeros(1, 1, 8, 4)
        >>> Uniform().sample(q, k, v, num_samples=2).log_weight.exp().tolist()
        [[[4.0, 4.0]]]
    """

    replacement: bool = True

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_bool(self, "replacement", self.replacement)

    def density(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        scale: float | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Return None: uniform."""
        return None
