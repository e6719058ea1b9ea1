"""Weighted samples of keys: what a sampler hands to the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["KeySample", "SampleDraw"]


@dataclass(frozen=True, kw_only=True)
class KeySample:
    """Columns drawn to stand for all columns, with their importance weights.

    A sample is a Horvitz-Thompson estimator of a column sum: for every function `f` of a key,
    `E[sum_s exp(log_weight_s) * f(index_s)] = sum_j f(j)`, the expectation taken over the
    generator. `log_weight = -log(m * p_j)` for `m` independent draws with probabilities `p`.

    Args:
        index: int64 `[batch, key_heads, m]`; `[batch, key_heads, tiles, m]` when every tile of
            query rows has a sample of its own prefix of the keys.
        log_weight: floating point, the same shape; natural logarithm; `-inf` marks an unused slot.
    """

    index: torch.Tensor
    log_weight: torch.Tensor

    @property
    def num_samples(self) -> int:
        """Slots per list, used or not."""
        return self.index.shape[-1]


SampleDraw = Callable[["torch.Tensor | None"], KeySample]
"""Draws the residual: of all keys (None), or of the prefix of each tile (int64 `[tiles]`)."""
