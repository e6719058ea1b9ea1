"""Sliding window and attention sinks: the nearest keys and the first ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..component import check_non_negative_int, check_positive_int
from ..masks import BandMask, HeavyMask, ListMask
from .base import AbstractDetector

__all__ = ["SlidingWindow"]


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(AbstractDetector):
    """The `width` keys around the query and the first `num_sinks` keys.

    Causal: the query's own key and the `width - 1` before it. Non-causal: `width // 2` keys before
    the query, itself, and the rest of the width after it. With `n_q != n_k` positions are aligned
    at the last query and the last key. Padding does not move windows; the sinks are the first real
    keys.

    Args:
        width: keys of the window, the query's own included.
        num_sinks: leading real keys, which every row holds.

    Cost: O(1), no tensor is made; the plan is index arithmetic. Deterministic, strictly causal.
    Source: Longformer (arXiv 2004.05150) for the window, StreamingLLM (arXiv 2309.17453) for the
    sinks.

    Example:
        >>> q = k = torch.zeros(1, 1, 6, 4)
        >>> SlidingWindow(width=2, num_sinks=1).find(q, k, is_causal=True).nnz().item()
        15
    """

    is_positional: ClassVar[bool] = True
    is_row_local: ClassVar[bool] = True
    takes_stream: ClassVar[bool] = True

    width: int = 256
    num_sinks: int = 16

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_positive_int(self, "width", self.width)
        check_non_negative_int(self, "num_sinks", self.num_sinks)

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the band; queries and keys are read for their shapes only."""
        return self._band(query, key, None, is_causal=is_causal)

    def _band(
        self, query: torch.Tensor, key: torch.Tensor, query_offset: int | None,
        *, is_causal: bool,
    ) -> BandMask:  # fmt: skip
        left = self.width - 1 if is_causal else self.width // 2
        return BandMask(
            batch_size=query.shape[0], num_query_heads=query.shape[1],
            num_queries=query.shape[2], num_keys=key.shape[2], is_causal=is_causal,
            query_offset=query_offset, left=left, right=self.width - 1 - left,
            num_sinks=self.num_sinks, on_device=query.device,
        )  # fmt: skip

    def find_within(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None, strict: bool = False,
        query_start: int, key_start: int, first_row: int, num_queries: int, num_keys: int,
    ) -> HeavyMask:  # fmt: skip
        """Return the part of the band that lies in these rows and keys of the call."""
        return self._band(query, key, query_start - key_start, is_causal=is_causal)

    def find_rectangle(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        generator: torch.Generator | None = None, query_start: int = 0, key_start: int = 0,
        first_row: int = 0, first_key: int = 0, earlier_query: torch.Tensor | None = None,
        strict: bool = False,
    ) -> HeavyMask:  # fmt: skip
        """Return the part of the causal window that lies in a rectangle."""
        num_sinks = min(max(0, self.num_sinks - (key_start - first_key)), key.shape[2])
        if query_start - (key_start + key.shape[2] - 1) >= self.width:
            # the first row does not reach the last key: sinks are all there is
            index = torch.arange(num_sinks, device=query.device)
            return ListMask.columns(
                index.expand(*key.shape[:2], -1), num_query_heads=query.shape[1],
                num_queries=query.shape[2], num_keys=key.shape[2],
            )  # fmt: skip
        return BandMask(
            batch_size=query.shape[0], num_query_heads=query.shape[1],
            num_queries=query.shape[2], num_keys=key.shape[2],
            query_offset=query_start - key_start, left=self.width - 1, right=0,
            num_sinks=num_sinks, on_device=query.device,
        )  # fmt: skip
