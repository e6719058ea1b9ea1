"""Oracle: the heaviest entries of each row, found by looking at all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..budget import check_budget, resolve_budget
from ..masks import HeavyMask, ListMask
from ..precision import without_autocast
from .base import AbstractDetector, default_scale

__all__ = ["Oracle"]

_CHUNK_ENTRIES = 1 << 24  # logits held at once


@dataclass(frozen=True, kw_only=True)
class Oracle(AbstractDetector):
    """The `budget` largest logits of every row: what a perfect detector would hold.

    Quadratic in time; the yardstick of the other detectors, not a way to save work.

    Args:
        budget: entries held by a row (fewer where fewer keys are visible); a float is a fraction of
            the keys.

    Cost: O(n_q n_k d) time, O(n_q budget) memory. Deterministic, strictly causal.

    Example:
        >>> q, k = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 3.0, 2.0]).view(1, 1, 3, 1)
        >>> Oracle(budget=2).find(q, k).to_dense().tolist()
        [[[[False, True, True]]]]
    """

    is_row_local: ClassVar[bool] = True
    takes_stream: ClassVar[bool] = True
    row_budget: ClassVar[str | None] = "budget"
    finds: ClassVar[tuple[str, ...]] = ("columns", "diagonals", "entries", "neighbours")

    budget: int | float = 256

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self, "budget", self.budget)

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the best entries of every row as lists of single rows."""
        batch, heads, num_queries, _ = query.shape
        key_heads, num_keys = key.shape[1:3]
        sign = -1.0 if default_scale(query, scale) < 0 else 1.0
        dtype = torch.promote_types(query.dtype, torch.float32)
        longest = min(resolve_budget(self.budget, num_keys), num_keys)
        position = torch.arange(num_queries, device=query.device) + num_keys - num_queries
        key_position = torch.arange(num_keys, device=query.device)
        grouped = query.reshape(batch, key_heads, heads // key_heads, num_queries, -1)
        keys = key.to(dtype).transpose(-1, -2).unsqueeze(2)
        found = torch.empty(
            (batch, heads, num_queries, longest), dtype=torch.int32, device=query.device
        )
        step = max(1, _CHUNK_ENTRIES // max(1, batch * heads * num_keys))
        with torch.no_grad(), without_autocast(query):
            for start in range(0, num_queries, step):
                rows = slice(start, start + step)
                seen = num_keys
                if is_causal:
                    last = min(start + step, num_queries) + num_keys - num_queries
                    seen = min(max(last, longest), num_keys)
                logits = sign * (grouped[:, :, :, rows].to(dtype) @ keys[..., :seen]).flatten(1, 2)
                if is_causal:
                    hidden = key_position[:seen] > position[rows, None]
                    logits = logits.masked_fill_(hidden, float("-inf"))
                found[:, :, rows] = logits.topk(longest, dim=-1).indices.int()
        count = torch.full((num_queries,), longest, device=query.device)
        if is_causal:
            count = (position + 1).clamp(0, longest)
        return ListMask.entries(
            found, count.expand(batch, heads, -1), num_query_heads=heads,
            num_keys=num_keys, is_causal=is_causal,
        )  # fmt: skip
