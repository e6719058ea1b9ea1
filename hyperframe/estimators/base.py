"""What an estimator is: how the row sums `D~` come from a mask and a sample (ApproxD)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..component import AbstractComponent
from ..masks import HeavyMask
from ..rowsums import RowSumRule, RowSums

__all__ = ["AbstractEstimator"]


@dataclass(frozen=True, kw_only=True)
class AbstractEstimator(AbstractComponent):
    """Base of every estimator: a frozen dataclass with two methods.

    `row_sums` is the estimate by itself; `rule` is what the attention of the same mask needs to
    know so that its normaliser is that estimate, made with the columns it samples anyway.
    """

    kind: ClassVar[str] = "estimator"

    @abstractmethod
    def row_sums(
        self, query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, *,
        scale: float | None = None, num_samples: int = 256,
        generator: torch.Generator | None = None,
    ) -> RowSums:  # fmt: skip
        """Estimate the row sums of `A = exp(scale * Q K^T)` under the mask's causality.

        Args:
            query: `[batch, query_heads, n_q, d]`.
            key: `[batch, key_heads, n_k, d]`.
            mask: the entries computed exactly.
            scale: factor of the logits; None is `1 / sqrt(d)`.
            num_samples: columns sampled for the rest.
            generator: source of the draws.

        Returns:
            `log_sum` `[batch, query_heads, n_q]`, natural logarithm.
        """

    def rule(
        self, query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, *, scale: float,
        num_samples: int, generator: torch.Generator | None = None,
    ) -> RowSumRule:  # fmt: skip
        """Return how the attention normalises; by default with the plan's own row sums."""
        return RowSumRule()
