"""Uniform columns: the residual of the published method."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import AbstractSampler

__all__ = ["Uniform"]


@dataclass(frozen=True, kw_only=True)
class Uniform(AbstractSampler):
    """Keys drawn uniformly and independently; every draw stands for `n / m` keys.

    Cost: O(m) time and memory for a head. Random. Source: HyperAttention, Algorithm 2, line 4.

    Example:
        >>> q = k = v = torch.zeros(1, 1, 8, 4)
        >>> Uniform().sample(q, k, v, num_samples=2).log_weight.exp().tolist()
        [[[4.0, 4.0]]]
    """

    def density(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        scale: float | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Return None: uniform."""
        return None
