"""Row-norm sampling: columns drawn by the squared norm of their values (Lemma 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import AbstractSampler

__all__ = ["RowNorm"]

_SMALLEST_SHARE = 1e-2  # of the mean squared norm


@dataclass(frozen=True, kw_only=True)
class RowNorm(AbstractSampler):
    """Keys drawn with probability `||V_l||^2 / ||V||_F^2`, independently.

    In the notation of Lemma 2 the sampling matrix S has rows `||V||_F / (sqrt(m) ||V_l||) e_l`;
    its square is the weight `1 / (m p_l)` used here.

    Lemma 2 is about the product with V alone. The same columns also estimate row sums, which a
    column with a vanishing value enters as well; so squared norms below one hundredth of the mean
    so far, in the order of positions, count as that much. No density is 0 then, and the row sums
    stay unbiased; their variance does not: early keys with small values (attention sinks) are
    drawn rarely and with large weights.

    Cost: O(n d_v) time, O(n) memory for a head. Random. Source: HyperAttention, Lemma 2.

    Example:
        >>> v = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
        >>> sample = RowNorm().sample(v, v, v, num_samples=1)
        >>> round(sample.log_weight.exp().item(), 4) in (10.0, 1.1111)
        True
    """

    def density(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the squared norms of the values, small ones raised."""
        squared = value.double().square().sum(dim=-1)
        count = torch.arange(1, squared.shape[-1] + 1, device=value.device)
        # a running mean, so that no later value moves the density of an earlier key
        mean = squared.cumsum(dim=-1) / count
        raised = torch.maximum(squared, _SMALLEST_SHARE * mean)
        return torch.where(raised > 0, raised, torch.finfo(torch.float64).tiny ** 0.5)
