"""Base of detectors that score blocks of keys by the rows of a tile."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..masks import HeavyMask
from .base import AbstractDetector
from .blocks import delayed

__all__ = ["AbstractBlockScores"]


@dataclass(frozen=True, kw_only=True)
class AbstractBlockScores(AbstractDetector):
    """Base of detectors that score blocks of keys by the rows of a tile.

    A subclass says what some rows choose (`_find`). In the strict form the rows that vote for a
    tile are the `tile_size` rows that end with its first one.
    """

    takes_stream: ClassVar[bool] = True  # nothing is drawn

    tile_size: int = 64

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the blocks; see the class and `AbstractDetector.find`."""
        return self._find(query, query, key, scale, is_causal)

    def find_strict(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
        earlier_query: torch.Tensor | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return blocks that no query after the first of a tile helped to choose."""
        voters = delayed(query, earlier_query, self.tile_size - 1)
        return self._find(voters, query, key, scale, is_causal)

    @abstractmethod
    def _find(
        self, voters: torch.Tensor, query: torch.Tensor, key: torch.Tensor, scale: float | None,
        is_causal: bool,
    ) -> HeavyMask:  # fmt: skip
        """Return the blocks that tiles of voters choose; row `i` of a tile votes as voter `i`."""
