"""Uniform estimator: exact heavy entries plus importance-weighted uniform columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..builder import build_plans
from ..detectors.base import default_scale
from ..kernels import attend
from ..masks import HeavyMask
from ..rowsums import RowSumRule, RowSums
from ..samplers.uniform import Uniform as UniformSampler
from ..state import AttentionState, merge
from .base import AbstractEstimator

__all__ = ["Uniform"]


@dataclass(frozen=True, kw_only=True)
class Uniform(AbstractEstimator):
    """`D~_ii = sum_{j in M_i} A_ij + n/m sum_s (1 - M_{i,s}) A_{i,s}` over m uniform columns.

    Unbiased; its variance is that of the entries outside the mask. This is Algorithm 2 without
    cap and floor. Under a causal mask every tile of rows samples its own prefix.

    Cost: O(n (b + m) d). Random. Differentiable in query and key.

    Example:
        >>> from hyperframe.detectors import create
        >>> q = k = torch.zeros(1, 1, 4, 2)
        >>> mask = create("oracle(budget=4)").find(q, k)
        >>> Uniform().row_sums(q, k, mask, num_samples=2).log_sum.exp().round().tolist()
        [[[4.0, 4.0, 4.0, 4.0]]]
    """

    takes_stream: ClassVar[bool] = True
    is_unbiased: ClassVar[bool] = True

    def row_sums(
        self, query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, *,
        scale: float | None = None, num_samples: int = 256,
        generator: torch.Generator | None = None,
    ) -> RowSums:  # fmt: skip
        """Return the estimate; see `AbstractEstimator.row_sums`."""
        sampler = UniformSampler()
        value = key.new_zeros((*key.shape[:3], 1))

        draw = sampler.draws(query, key, value, num_samples=num_samples, generator=generator)
        plans = build_plans(mask, key_heads=key.shape[1], draw=draw)
        states: list[AttentionState] = [
            attend(query, key, value, plan, scale=default_scale(query, scale)) for plan in plans
        ]
        return RowSums(log_sum=merge(*states).lse)

    def rule(
        self, query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, *, scale: float,
        num_samples: int, generator: torch.Generator | None = None,
    ) -> RowSumRule:  # fmt: skip
        """Return the empty rule: the columns that the attention samples make this estimate."""
        return RowSumRule()
