"""Detectors that are a list of columns: the keys that all rows of a problem should hold."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...budget import check_budget, resolve_budget
from ...component import check_positive_int
from ...errors import UnsupportedError
from ...masks import HeavyMask, ListMask
from ...precision import without_autocast
from ...ragged import concatenate_lists, keep_in_lists
from ...rectangles import causal_levels, even_runs, odd_runs
from ..base import AbstractDetector, default_scale
from .functions import asks_for, check_columns, detector_of, grouped, positional_names

__all__ = ["AbstractIndex", "from_index"]

_List = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class AbstractIndex(AbstractDetector):
    """Base of detectors that name columns: keys that all rows of a problem should hold.

    Under `is_causal` the columns are named for the rectangles of Algorithm 4 (rows of a run against
    the keys before the run), on every level. A tile of `tile_size` rows holds the first ones named
    for each rectangle that it lies in, `num_keys` in all, and its own keys. So no key moves the
    choice of an earlier row. In the strict form the queries are those before the rectangle's rows.

    Args:
        num_keys: keys held by a row, at most, beside those of its tile under `is_causal`; a float
            is a fraction of all keys.
        tile_size: rows of a tile in the causal form.

    Attributes:
        uses_queries: whether the choice looks at queries.

    Cost: that of the choice; under `is_causal` once for every level, log2(n / tile_size) times, and
    O(n num_keys / tile_size) memory. No gradient.
    """

    uses_queries: ClassVar[bool] = True
    row_budget: ClassVar[str | None] = "num_keys"

    num_keys: int | float = 256
    tile_size: int = 64

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self, "num_keys", self.num_keys)
        check_positive_int(self, "tile_size", self.tile_size)

    def with_budget(self, keys: int) -> AbstractIndex:
        """Return the detector that holds about so many keys."""
        return self.replace(num_keys=keys)

    @abstractmethod
    def _index(
        self, query: torch.Tensor, key: torch.Tensor, *, count: int, scale: float,
        generator: torch.Generator | None,
    ) -> torch.Tensor:  # fmt: skip
        """Return the columns to hold, best first.

        Args:
            query: `[batch, heads, rows, d]`: rows of all query heads that share a key head. The
                batch items are problems of their own.
            key: `[batch, heads, keys, d]`.
            count: how many columns, at most; no more than there are keys.
            scale: factor of the logits.
            generator: source of all randomness.

        Returns:
            int64 `[batch, heads, count]` (or fewer), distinct numbers of keys; -1 is no key.
        """

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the columns; see the class and `AbstractDetector.find`."""
        scale = default_scale(query, scale)
        if is_causal:
            return self._causal(query, key, scale, generator, strict=False)
        return self._whole(query, query, key, scale, generator)

    def find_strict(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
        earlier_query: torch.Tensor | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return columns that were chosen with the help of earlier queries only."""
        scale = default_scale(query, scale)
        if is_causal:
            return self._causal(query, key, scale, generator, strict=True)
        voters = earlier_query if self.uses_queries else query
        if voters is None:
            raise UnsupportedError(
                f"strict_causal=True: {self.name} chooses by the queries before the rows, and here "
                f"there are none ({query.shape[2]} queries against {key.shape[2]} keys that all "
                "come before them); pass the whole sequence at once, or use strict_causal=False"
            )
        return self._whole(voters, query, key, scale, generator)

    def _whole(
        self, voters: torch.Tensor, query: torch.Tensor, key: torch.Tensor, scale: float,
        generator: torch.Generator | None,
    ) -> ListMask:  # fmt: skip
        """One list for all rows."""
        index, count = self._lists(voters, key, scale, generator, absent=None)
        return ListMask(
            batch_size=query.shape[0], num_query_heads=query.shape[1], num_queries=query.shape[2],
            num_keys=key.shape[2], key_index=index.clamp(min=0).unsqueeze(2),
            key_count=count.unsqueeze(2), tile_size=max(1, query.shape[2]),
        )  # fmt: skip

    def _causal(
        self, query: torch.Tensor, key: torch.Tensor, scale: float,
        generator: torch.Generator | None, *, strict: bool,
    ) -> ListMask:  # fmt: skip
        """Lists of tiles: columns of the rectangles over a tile, and its own keys."""
        batch, _, num_queries, _ = query.shape
        key_heads, num_keys = key.shape[1:3]
        offset, size = num_keys - num_queries, min(self.tile_size, num_queries)
        tile = torch.arange(-(-num_queries // size), device=query.device)
        shape, budget = (batch, key_heads, len(tile)), resolve_budget(self.num_keys, num_keys)
        levels, before = causal_levels(num_queries, size), int(offset > 0)
        # a tile lies in a rectangle for each set bit of its number, and behind the keys of row 0
        bits = (tile.unsqueeze(-1) >> torch.arange(len(levels) + 1, device=tile.device)) & 1
        larger = bits.flip(-1).cumsum(-1).flip(-1)[:, 1:] + before
        covering = (bits.sum(-1) + before).clamp(min=1)

        def share(rank: torch.Tensor | int) -> torch.Tensor:
            """Columns of the rectangle that `rank` larger ones come before; `budget` in all."""
            return ((budget - 1 - rank) // covering + 1).clamp(min=0)

        held = concatenate_lists([], shape, query.device)
        if before:
            mask = (self.find_strict if strict else self.find)(
                query, key[:, :, :offset], scale=scale, generator=generator
            )
            assert isinstance(mask, ListMask)
            held = _append(held, mask.key_index, mask.key_count.minimum(share(0)), budget)
        # where there are more queries than keys, zeros stand for the keys of the first rows
        missing = max(0, -offset)
        own = torch.nn.functional.pad(key[:, :, max(0, offset) :], (0, 0, missing, 0))
        for number, level in enumerate(levels):
            parts = []
            if level.full:
                voters = (even_runs if strict else odd_runs)(query, level)
                begin = torch.arange(level.full, device=tile.device) * 2 * level.size
                absent = (missing - begin).clamp(min=0).repeat(batch) if missing else None
                lists = self._lists(voters, even_runs(own, level), scale, generator, absent)
                parts.append([x.unflatten(0, (batch, level.full)).transpose(1, 2) for x in lists])
            if level.ragged:
                first = 2 * level.size * level.full
                middle = first + level.size
                voters = query[:, :, first:middle] if strict else query[:, :, middle:]
                absent = tile.new_full((batch,), max(0, missing - first)) if missing else None
                lists = self._lists(voters, own[:, :, first:middle], scale, generator, absent)
                parts.append([x.unsqueeze(2) for x in lists])
            index, count = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
            rectangle = (tile >> (number + 1)).clamp(max=index.shape[2] - 1)
            start = (tile >> (number + 1)) * 2 * level.size + offset
            taken = count[:, :, rectangle].minimum(share(larger[:, number])) * bits[:, number]
            held = _append(held, index[:, :, rectangle] + start.unsqueeze(-1), taken, budget)
        begin = tile * size + offset
        nearest, stop = begin.clamp(min=0), (begin + size).clamp(min=0, max=num_keys)
        its = nearest.unsqueeze(-1) + torch.arange(size, device=tile.device)
        held = _append(held, its[None, None], (stop - nearest).clamp(min=0), budget + size)
        return ListMask(
            batch_size=batch, num_query_heads=query.shape[1], num_queries=num_queries,
            num_keys=num_keys, is_causal=True, key_index=held[0].clamp(0, max(0, num_keys - 1)),
            key_count=held[1], tile_size=size,
        )  # fmt: skip

    def _lists(
        self, query: torch.Tensor, key: torch.Tensor, scale: float,
        generator: torch.Generator | None, absent: torch.Tensor | None,
    ) -> _List:  # fmt: skip
        """Call the choice: lists `[batch, heads, L]` without gaps, and their counts.

        The first `absent` keys of a batch item, int64 `[batch]`, are left out.
        """
        shape, wanted = tuple(key.shape[:2]), resolve_budget(self.num_keys, key.shape[2])
        wanted = min(wanted, key.shape[2])
        with torch.no_grad(), without_autocast(key):
            rows = grouped(query, key.shape[1])
            found: Any = self._index(rows, key, count=wanted, scale=scale, generator=generator)
        check_columns(self, found, shape, wanted, key.shape[2])
        least = 0 if absent is None else absent.view(-1, 1, 1)
        length = torch.full(shape, found.shape[-1], device=key.device)
        return keep_in_lists(found.long(), length, found >= least)


def from_index(function: Callable[..., torch.Tensor]) -> type[AbstractIndex]:
    """Make a detector of a function that names columns: keys that all rows should hold.

    Args:
        function: `function(query, key, *, ...)`, or `function(key, *, ...)` for a choice that does
            not look at queries; see `AbstractIndex` for what it gets and returns. By keyword it may
            ask for `count`, `scale` and `generator`, for `num_keys` and `tile_size`, and for
            parameters of its own, with defaults.

    Returns:
        A detector class of the function's name; see `from_codes` for `takes_stream`.

    Example:
        >>> @from_index
        ... def largest_keys(key, *, count, order: float = 2.0):
        ...     '''The keys of largest norm.'''
        ...     return key.norm(order, dim=-1).topk(count).indices
        >>> q, k = torch.ones(1, 1, 4, 2), torch.arange(8.0).view(1, 1, 4, 2)
        >>> largest_keys(num_keys=2).find(q, k).to_dense()[0, 0].int().tolist()[0]
        [0, 0, 1, 1]
        >>> causal = largest_keys(num_keys=1, tile_size=1).find(q, k, is_causal=True)
        >>> causal.to_dense()[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    """
    uses_queries = positional_names(function) != ("key",)

    def choose(self: Any, query: torch.Tensor, key: torch.Tensor, **options: Any) -> torch.Tensor:
        found: torch.Tensor = self._chosen(*((query, key) if uses_queries else (key,)), **options)
        return found

    return detector_of(
        function, AbstractIndex, maker="from_index", method="_chosen",
        tensors={("query", "key"), ("key",)}, given={"count", "scale", "generator"},
        attributes={
            "_index": choose, "uses_queries": uses_queries,
            "takes_stream": not asks_for(function, "generator"),
        },
    )  # fmt: skip


def _append(held: _List, index: torch.Tensor, count: torch.Tensor, longest: int) -> _List:
    """Append lists of tiles to those held, of which no more than `longest` slots can be used."""
    pieces = [held, (index, count.expand(*held[1].shape))]
    index, count = concatenate_lists(pieces, tuple(held[1].shape), index.device)
    return index[..., :longest], count
