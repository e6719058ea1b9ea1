"""A band around the diagonal and the first positions: windows and sinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ArgumentError
from .base import HeavyMask

__all__ = ["BandMask"]


@dataclass(frozen=True, kw_only=True, eq=False)
class BandMask(HeavyMask):
    """Keys at most `left` before and `right` after the query, and the first `num_sinks` keys.

    Args:
        left: keys before the query's own position; at least 0.
        right: keys after it; at least 0.
        num_sinks: leading keys that every row holds.
        on_device: device of the problem (the mask itself stores no tensor).
    """

    left: int
    right: int
    num_sinks: int = 0
    on_device: torch.device

    def __post_init__(self) -> None:
        """Refuse bands without the query's own position: unions of bands would not be bands."""
        for name, size in (("left", self.left), ("right", self.right)):
            if size < 0:
                raise ArgumentError(f"{name}: {size} keys is negative; pass 0 or more")

    @property
    def device(self) -> torch.device:
        """Device of the problem."""
        return self.on_device

    @property
    def _has_positions(self) -> bool:
        return True

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        position = torch.arange(start, stop, device=self.device)[:, None] + self.position_offset
        key_position = torch.arange(self.num_keys, device=self.device)
        offset = key_position - position
        dense = (-self.left <= offset) & (offset <= self.right)
        dense = dense | (key_position < self.num_sinks)
        return dense.expand(self.batch_size, self.num_query_heads, *dense.shape)
