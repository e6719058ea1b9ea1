"""Dilated sliding window: near keys with gaps between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..component import check_positive_int
from ..masks import HeavyMask, ListMask
from .base import AbstractDetector

__all__ = ["Dilated"]


@dataclass(frozen=True, kw_only=True)
class Dilated(AbstractDetector):
    """The `width` keys around the query that are `dilation` positions apart.

    Causal: the query's own key and the `width - 1` before it, at the distances `dilation`,
    `2 dilation`, and so on. Non-causal: `width // 2` keys before the query, itself, and the rest of
    the width after it. With `n_q != n_k` positions are aligned at the last query and the last key.
    Padding does not move windows. A dilation of 1 gives the entries of `sliding_window`, and
    that one needs no list for every row.

    Args:
        width: keys of the window, the query's own included.
        dilation: distance of neighbouring keys of the window.

    Cost: O(n_q width) time and memory: a list for every row, which all heads share, although their
    plans do not. As a tile is one row, backends gather `width` keys for each, and a causal residual
    is drawn for each; on a CPU that takes several times as long as a sliding window of that width.
    Deterministic, strictly causal.
    Source: the dilated window of Longformer (arXiv 2004.05150).

    Example:
        >>> q = k = torch.zeros(1, 1, 8, 4)
        >>> mask = Dilated(width=3, dilation=2).find(q, k, is_causal=True)
        >>> mask.to_dense()[0, 0, 6].nonzero().flatten().tolist()
        [2, 4, 6]
    """

    is_positional: ClassVar[bool] = True
    is_row_local: ClassVar[bool] = True
    takes_stream: ClassVar[bool] = True

    width: int = 256
    dilation: int = 4

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_positive_int(self, "width", self.width)
        check_positive_int(self, "dilation", self.dilation)

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the windows; queries and keys are read for their shapes only."""
        left = self.width - 1 if is_causal else self.width // 2
        return self._part(query, key, key.shape[2] - query.shape[2], left, is_causal=is_causal)

    def find_within(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None, strict: bool = False,
        query_start: int, key_start: int, first_row: int, num_queries: int, num_keys: int,
    ) -> HeavyMask:  # fmt: skip
        """Return the part of the windows that lies in these rows and keys of the call."""
        left = self.width - 1 if is_causal else self.width // 2
        return self._part(query, key, query_start - key_start, left, is_causal=is_causal)

    def find_rectangle(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        generator: torch.Generator | None = None, query_start: int = 0, key_start: int = 0,
        first_row: int = 0, first_key: int = 0, earlier_query: torch.Tensor | None = None,
        strict: bool = False,
    ) -> HeavyMask:  # fmt: skip
        """Return the part of the causal windows that lies in a rectangle."""
        return self._part(query, key, query_start - key_start, self.width - 1, is_causal=False)

    def _part(
        self, query: torch.Tensor, key: torch.Tensor, offset: int, left: int, *, is_causal: bool
    ) -> ListMask:
        """Lists of all rows; row 0 stands at key `offset`, and `left` keys come before a row's."""
        (batch, key_heads, num_keys, _), num_queries = key.shape, query.shape[2]
        right = self.width - 1 - left
        # no row is further from a key, and int32 holds it
        span = abs(offset) + num_queries + num_keys
        left, right = min(left, span), min(right, span)
        # a row holds the keys `position + step * dilation`, steps in [-left, right]: a run of them
        # lies inside the keys
        position = torch.arange(num_queries, dtype=torch.int32, device=query.device) + offset
        first = (-(position // self.dilation)).clamp(min=-left)
        last = ((num_keys - 1 - position) // self.dilation).clamp(max=right)
        # what any row holds: no more than the first does, where all keys come before it
        nearest = max(0, -((num_keys - 1 - offset) // self.dilation))
        longest = min(-(-num_keys // self.dilation), self.width)
        if nearest > 0:
            longest = min(longest, max(0, left + 1 - nearest))
        slot = torch.arange(longest, dtype=torch.int32, device=query.device)
        index = position[:, None] + (first[:, None] + slot) * self.dilation
        count = (last - first + 1).clamp(min=0)
        return ListMask(
            batch_size=batch, num_query_heads=query.shape[1], num_queries=num_queries,
            num_keys=num_keys, is_causal=is_causal, query_offset=offset,
            key_index=index.clamp(0, num_keys - 1).expand(batch, key_heads, -1, -1),
            key_count=count.expand(batch, key_heads, -1), tile_size=1,
        )  # fmt: skip
