"""Strided: keys at distances that are multiples of a stride."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from ..component import check_positive_int
from ..masks import HeavyMask, RangeMask, UnionMask
from ..tables import kept
from .base import AbstractDetector

__all__ = ["Strided"]

_MAX_SPLITS = 2  # strides of one mask: a factor of 2**2 apart, and as many keys more in a list
_ROW_TILE = 64  # most rows of a tile


@dataclass(frozen=True, kw_only=True)
class Strided(AbstractDetector):
    """The keys whose distance from the query is a multiple of a stride; at most `num_keys` a row.

    Non-causal: the stride is `ceil(n_k / num_keys)`, the same for all rows. Causal: the stride of
    a row at position `p` is the smallest power of 2 above `p / num_keys`, so that the row holds
    its own key and between half of `num_keys` and all of it, or every key before it as long as
    these are no more. A row's stride does not depend on how many keys follow, as those of the
    rectangles of the causal recursion cannot: what is appended changes no row.

    With `n_q != n_k` positions are aligned at the last query and the last key; they are counted
    from the first key of the call, padding included.

    Args:
        num_keys: most keys of a row.

    Cost: O(n_q + n_k) memory for tables, which are kept; the plans hold O(n_q / 64 num_keys) for
    each head. Causal: `log2(n_k / num_keys) / 3` masks of that kind in a single pass, each an order
    and a plan of its own; one or two in a rectangle. Deterministic, strictly causal.
    Source: the second head of strided attention in Sparse Transformer (arXiv 1904.10509), which
    has a fixed stride near the root of n and so O(n^1.5) entries.

    Example:
        >>> q = k = torch.zeros(1, 1, 12, 4)
        >>> Strided(num_keys=4).find(q, k).to_dense()[0, 0, 4].nonzero().flatten().tolist()
        [1, 4, 7, 10]
        >>> causal = Strided(num_keys=4).find(q, k, is_causal=True).to_dense()
        >>> [causal[0, 0, row].nonzero().flatten().tolist() for row in (3, 7, 9)]
        [[0, 1, 2, 3], [1, 3, 5, 7], [1, 5, 9]]
    """

    is_positional: ClassVar[bool] = True
    is_row_local: ClassVar[bool] = True
    takes_stream: ClassVar[bool] = True
    row_budget: ClassVar[str | None] = "num_keys"

    num_keys: int = 256

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_positive_int(self, "num_keys", self.num_keys)

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the classes of equal residue; queries and keys are read for their shapes only."""
        offset = key.shape[2] - query.shape[2]
        if is_causal:
            return self._causal_part(query, key, offset, 0, is_causal=True)
        return self._full_part(query, key, offset, 0, key.shape[2])

    def find_within(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None, strict: bool = False,
        query_start: int, key_start: int, first_row: int, num_queries: int, num_keys: int,
    ) -> HeavyMask:  # fmt: skip
        """Return the part of the whole call's pattern that lies in these rows and keys."""
        if is_causal:
            return self._causal_part(query, key, query_start, key_start, is_causal=True)
        return self._full_part(query, key, query_start, key_start, num_keys)

    def find_rectangle(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        generator: torch.Generator | None = None, query_start: int = 0, key_start: int = 0,
        first_row: int = 0, first_key: int = 0, earlier_query: torch.Tensor | None = None,
        strict: bool = False,
    ) -> HeavyMask:  # fmt: skip
        """Return the part of the causal pattern that lies in a rectangle."""
        return self._causal_part(query, key, query_start, key_start, is_causal=False)

    def _full_part(
        self, query: torch.Tensor, key: torch.Tensor, query_start: int, key_start: int,
        num_keys: int,
    ) -> RangeMask:  # fmt: skip
        strides = _Strides(base=-(-num_keys // self.num_keys), splits=0, budget=None)
        return _mask(strides, query, key, query_start, key_start, is_causal=False)

    def _causal_part(
        self, query: torch.Tensor, key: torch.Tensor, query_start: int, key_start: int,
        *, is_causal: bool,
    ) -> HeavyMask:  # fmt: skip
        # one that no row reaches says no more than this one
        budget = min(self.num_keys, max(1, query_start + query.shape[2]))
        lowest = self._log2_stride(query_start)
        highest = self._log2_stride(query_start + query.shape[2] - 1)
        masks = []
        while highest >= lowest:
            splits = min(_MAX_SPLITS, highest - lowest)
            strides = _Strides(base=1 << (highest - splits), splits=splits, budget=budget)
            masks.append(_mask(strides, query, key, query_start, key_start, is_causal=is_causal))
            highest -= splits + 1
        return UnionMask.of(*masks)

    def _log2_stride(self, position: int) -> int:
        power = 0
        while self.num_keys << power <= position:
            power += 1
        return power


class _Strides(NamedTuple):
    """The strides `base * 2**k` for k up to `splits`.

    The rows of a stride are those from `budget * stride / 2` to `budget * stride`, from 0 if the
    stride is 1; all rows, where there is no budget.
    """

    base: int
    splits: int
    budget: int | None

    def label(self, position: torch.Tensor) -> torch.Tensor:
        """Return numbers of which those of a class of equal residue, for any stride, are a range.

        The residue for `base` comes first, then the bits that decide for each doubling of it.
        """
        label, rest = position % self.base, position // self.base
        for bit in range(self.splits):
            label = 2 * label + ((rest >> bit) & 1)
        return label


class _Tables(NamedTuple):
    query_order: torch.Tensor
    key_order: torch.Tensor
    start: torch.Tensor
    stop: torch.Tensor
    tile_size: int
    max_keys: int


@kept
def _tables(
    strides: _Strides, query_start: int, num_queries: int, key_start: int, num_keys: int,
    device: torch.device,
) -> _Tables:  # fmt: skip
    """Orders and ranges for one head, made on the host."""
    base, splits, budget = strides
    num_labels = base << splits
    position = torch.arange(num_queries) + query_start
    key_position = torch.arange(num_keys) + key_start
    key_label = strides.label(key_position)
    split = torch.zeros_like(position)  # the row's stride is `base << split`
    is_here = torch.ones_like(position, dtype=torch.bool)
    max_keys = -(-num_keys // base)
    if budget is not None:
        # no row of these strides sees the keys behind, and the ranges stay short without them
        key_label = torch.where(key_position < budget * num_labels, key_label, num_labels)
        max_keys = min(max_keys, budget << splits)
        for number in range(splits):
            split += position >= budget * (base << number)
        is_here = position < budget * num_labels
        if base > 1:
            is_here &= position >= budget * (base // 2)
    ordered, key_order = key_label.sort(stable=True)
    width = splits - split  # how many bits of the label the stride leaves open
    first = strides.label(position) >> width << width
    start = torch.searchsorted(ordered, first)
    stop = torch.where(is_here, torch.searchsorted(ordered, first + (1 << width)), start)
    if not torch.compiler.is_compiling():
        max_keys = int((stop - start).max())
    tile_size = 1
    while tile_size < min(_ROW_TILE, num_queries / num_labels):
        tile_size *= 2
    # rows of two strides may begin at the same key; of the order only its length matters here
    group = start.clamp(max=num_keys - 1) * (splits + 1) + split
    length_only = torch.zeros(1, 1, 1, dtype=torch.int64).expand(1, 1, num_keys * (splits + 1))
    rows = RangeMask.of_rows(
        group.view(1, 1, -1), start.view(1, 1, -1), stop.view(1, 1, -1), length_only,
        max_keys=max_keys, max_groups=2 * num_labels, tile_size=tile_size,
    )  # fmt: skip
    return _Tables(
        rows.query_order.to(device), key_order.view(1, 1, -1).to(device), rows.start.to(device),
        rows.stop.to(device), tile_size, max_keys,
    )  # fmt: skip


def _mask(
    strides: _Strides, query: torch.Tensor, key: torch.Tensor, query_start: int, key_start: int,
    *, is_causal: bool,
) -> RangeMask:  # fmt: skip
    tables = _tables(strides, query_start, query.shape[2], key_start, key.shape[2], query.device)
    rows, keys = (query.shape[0], query.shape[1], -1), (key.shape[0], key.shape[1], -1)
    return RangeMask(
        batch_size=query.shape[0], num_query_heads=query.shape[1], num_queries=query.shape[2],
        num_keys=key.shape[2], is_causal=is_causal, query_offset=query_start - key_start,
        query_order=tables.query_order.expand(rows), key_order=tables.key_order.expand(keys),
        start=tables.start.expand(rows), stop=tables.stop.expand(rows),
        tile_size=tables.tile_size, max_keys=tables.max_keys,
    )  # fmt: skip
