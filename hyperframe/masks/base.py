"""What a heavy mask is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

import torch

from ..errors import ArgumentTypeError
from .key_blocks import KeyBlocks

__all__ = ["HeavyMask", "Problem", "check_mask_type", "problem_of"]

_NNZ_CHUNK_ENTRIES = 1 << 24  # bools held at once while entries are counted


@dataclass(frozen=True, kw_only=True, eq=False)
class HeavyMask(ABC):
    """A set of heavy entries, per batch item and query head.

    Args:
        batch_size: number of batch items.
        num_query_heads: number of query heads.
        num_queries: `n_q`.
        num_keys: `n_k`.
        is_causal: whether entries above the diagonal are left out.
        query_offset: key position of query row 0; None aligns the last query with the last key
            (bottom right), `n_k - n_q`.
    """

    batch_size: int
    num_query_heads: int
    num_queries: int
    num_keys: int
    is_causal: bool = False
    query_offset: int | None = None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the mask's tensors live."""

    @abstractmethod
    def _rows(self, start: int, stop: int) -> torch.Tensor:
        """Dense rows `[start, stop)` without the causal test."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return the dense rows `[start, stop)`: bool `[batch, query_heads, rows, n_k]`."""
        dense = self._rows(start, stop)
        if self.is_causal:
            position = torch.arange(start, stop, device=self.device) + self.position_offset
            key_position = torch.arange(self.num_keys, device=self.device)
            dense = dense & (key_position <= position[:, None])
        return dense

    @property
    def position_offset(self) -> int:
        """Key position of query row 0."""
        if self.query_offset is not None:
            return self.query_offset
        return self.num_keys - self.num_queries

    def to_dense(self) -> torch.Tensor:
        """Return the mask as bool `[batch, query_heads, n_q, n_k]`; for tests and pictures."""
        return self.rows(0, self.num_queries)

    def nnz(self) -> torch.Tensor:
        """Return the number of heavy entries of every head: int64 `[batch, query_heads]`.

        Counted over row chunks: O(n_q n_k) time, bounded memory.
        """
        heads = self.batch_size * self.num_query_heads
        step = max(1, _NNZ_CHUNK_ENTRIES // max(1, heads * self.num_keys))
        total = torch.zeros(
            self.batch_size, self.num_query_heads, dtype=torch.int64, device=self.device
        )
        for start in range(0, self.num_queries, step):
            total += self.rows(start, min(start + step, self.num_queries)).sum(dim=(-2, -1))
        return total

    def parts(self) -> Iterator[HeavyMask]:
        """Yield the masks whose union this is: itself, unless it is a `UnionMask`."""
        yield self

    def key_blocks(self) -> KeyBlocks | None:
        """Return the blocks of keys that the mask was made from, the same for all rows.

        None for a mask that knows of none. Of a union, the first member that has blocks answers.
        """
        return None

    def validate(self) -> HeavyMask:
        """Check the values of the mask's tensors and return it; may read the device."""
        return self

    def __or__(self, other: HeavyMask) -> HeavyMask:
        """Return the union of two masks over the same problem."""
        check_mask_type("mask", other)
        from .union import UnionMask  # a union is made of masks: the import is circular

        return UnionMask.of(self, other)

    def _same_problem(self, other: HeavyMask) -> bool:
        # a mask that does not depend on positions fits any offset
        has_positions = self._has_positions and other._has_positions
        return (
            self.batch_size == other.batch_size
            and self.num_query_heads == other.num_query_heads
            and self.num_queries == other.num_queries
            and self.num_keys == other.num_keys
            and self.is_causal == other.is_causal
            and not (has_positions and self.position_offset != other.position_offset)
            and self.device == other.device
        )

    @property
    def _has_positions(self) -> bool:
        return self.is_causal


def check_mask_type(name: str, mask: object) -> None:
    """Refuse what is no mask, with the way to make one."""
    if not isinstance(mask, HeavyMask):
        raise ArgumentTypeError(
            f"{name}: expected a HeavyMask, got {type(mask).__name__}; make one with "
            "ListMask.from_dense(dense), ListMask.columns(index, ...) or ListMask.entries(...)"
        )


class Problem(TypedDict):
    """What masks of one problem have in common."""

    batch_size: int
    num_query_heads: int
    num_queries: int
    num_keys: int
    is_causal: bool
    query_offset: int | None


def problem_of(mask: HeavyMask) -> Problem:
    """Return the problem of a mask, as keyword arguments for another one."""
    return Problem(
        batch_size=mask.batch_size, num_query_heads=mask.num_query_heads,
        num_queries=mask.num_queries, num_keys=mask.num_keys, is_causal=mask.is_causal,
        query_offset=mask.query_offset,
    )  # fmt: skip
