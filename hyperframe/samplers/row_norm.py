"""Row-norm sampling: columns drawn by the squared norm of their values (Lemma 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..component import check_bool
from .base import AbstractSampler

__all__ = ["RowNorm"]


@dataclass(frozen=True, kw_only=True)
class RowNorm(AbstractSampler):
    """Keys drawn with probability `p_l = ||V_l||^2 / ||V||_F^2`.

    In the notation of Lemma 2 the sampling matrix S has rows `||V||_F / (sqrt(m) ||V_l||) e_l`;
    its square is the weight `1 / (m p_l)` used here.

    Lemma 2 is about the product with V alone. The same columns also estimate row sums, which a
    column with a vanishing value enters as well: see `AbstractSampler` for how such columns stay
    drawable. (Attention sinks often have small values, so that row-norm sampling can be worse than
    uniform sampling on language models.)

    Without replacement key `l` is among the drawn ones with the probability `min(1, c p_l)` (`c`
    makes them add up to `m`) and weighs its inverse; keys with a large value are certain. From a
    prefix the probability is `min(1, m p_l)`, with the more of the uniform density mixed into `p`
    the nearer the prefix comes to `m` keys. Lemma 2 is about independent draws.

    Args:
        replacement: whether draws are independent, so that a key can be drawn again.

    Cost: O(n d_v) time, O(n) memory for a head; without replacement a sort of the keys more.
    Random. Source: HyperAttention, Lemma 2; without replacement: systematic sampling with unequal
    probabilities (Madow 1949).

    Example:
        >>> v = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
        >>> sample = RowNorm().sample(v, v, v, num_samples=1)
        >>> round(sample.log_weight.exp().item(), 4) in (10.0, 1.1111)
        True
    """

    replacement: bool = True

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_bool(self, "replacement", self.replacement)

    def density(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        scale: float | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Return the squared norms of the values."""
        return value.double().square().sum(dim=-1)
