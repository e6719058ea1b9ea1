"""Exact row sums: the normaliser without error, at quadratic cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..detectors.base import default_scale
from ..kernels import exact_attention
from ..masks import HeavyMask
from ..rowsums import RowSums
from .base import AbstractEstimator

__all__ = ["Exact"]


@dataclass(frozen=True, kw_only=True)
class Exact(AbstractEstimator):
    """`D_ii` itself, so that only the numerator is approximate.

    Quadratic in time: a yardstick that separates the error of the row sums from that of the
    matrix product, not a way to save work.

    Cost: O(n_q n_k d) time, linear memory. Deterministic. Differentiable in query and key.
    """

    takes_stream: ClassVar[bool] = True
    is_unbiased: ClassVar[bool] = True

    def row_sums(
        self, query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, *,
        scale: float | None = None, num_samples: int = 256,
        generator: torch.Generator | None = None,
    ) -> RowSums:  # fmt: skip
        """Return the exact row sums; the mask is read for its causality only."""
        state = exact_attention(
            query, key, key, scale=default_scale(query, scale), is_causal=mask.is_causal
        )
        return RowSums(log_sum=state.lse)
