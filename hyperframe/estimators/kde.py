"""Kde: row sums from columns drawn by the column norms of the softmax matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..builder import build_plans
from ..component import check_fraction, check_positive_int
from ..detectors.base import default_scale
from ..kernels import attend_all
from ..masks import HeavyMask
from ..rowsums import RowSums
from ..samplers.kde import Kde as KdeSampler
from .base import AbstractEstimator

__all__ = ["Kde"]


@dataclass(frozen=True, kw_only=True)
class Kde(AbstractEstimator):
    """`D~_ii = sum_{j in M_i} A_ij + sum_s (1 - M_{i,s}) A_{i,s} / (m p_s)`, columns drawn by `p`.

    `p` are the probabilities of the sampler `kde`: the squared column norms of `D^-1 A`, seen by
    some exact rows, mixed with the uniform density. Unbiased, and no draw counts for more than
    `n / (floor m)` of its entry. Columns that many rows look at, such as sinks, are nearly always
    among the draws, where uniform ones miss them with probability `(1 - 1/n)^m`.

    An attention with this estimator and `sampler="auto"` samples the same columns for its
    numerator, so that the two errors cancel in large part. Beside another sampler the estimate
    replaces the normaliser, as in KDEformer, whose row sums and products have samples of their
    own; take that only where the row sums are known to be good: a small one scales its row up.

    Args:
        num_queries: rows that are looked at, as in the sampler.
        floor: share of the draws that is uniform.

    Cost: O((n_q (b + m) + num_queries n_k) d) for b held keys a row. Random. Differentiable in
    query and key, with the columns and their weights held constant.
    Source: KDEformer (arXiv 2302.02451); see the sampler for what is estimated otherwise.

    Example:
        >>> from hyperframe.detectors import create
        >>> q = k = torch.zeros(1, 1, 4, 2)
        >>> mask = create("oracle(budget=4)").find(q, k)
        >>> Kde().row_sums(q, k, mask, num_samples=2).log_sum.exp().round().tolist()
        [[[4.0, 4.0, 4.0, 4.0]]]
    """

    takes_stream: ClassVar[bool] = True
    is_unbiased: ClassVar[bool] = True
    uses_queries: ClassVar[bool] = True

    num_queries: int = 64
    floor: float = 0.5

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_positive_int(self, "num_queries", self.num_queries)
        check_fraction(self, "floor", self.floor)

    @property
    def columns(self) -> KdeSampler:
        """The sampler `kde` with the same parameters."""
        return KdeSampler(num_queries=self.num_queries, floor=self.floor)

    def row_sums(
        self, query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, *,
        scale: float | None = None, num_samples: int = 256,
        generator: torch.Generator | None = None,
    ) -> RowSums:  # fmt: skip
        """Return the estimate; see `AbstractEstimator.row_sums`."""
        value = key.new_zeros((*key.shape[:3], 1))
        draw = self.columns.draws(
            query, key, value, num_samples=num_samples, generator=generator, scale=scale
        )
        plans = build_plans(mask, key_heads=key.shape[1], draw=draw)
        state = attend_all(query, key, value, plans, scale=default_scale(query, scale))
        return RowSums(log_sum=state.lse)
