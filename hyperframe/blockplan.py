"""The block plan: blocks of two orders, with samples shared by rectangles.

The plan of sortLSH without a mask: non-causal attention, and the rectangles of one level of the
causal recursion. A `TilePlan` could say the same (`to_tile_plan` does), with a list of keys for
every tile; here a tile is five numbers, keys are read from the order, and all tiles of a rectangle
share one list of samples. So nothing is built between hashing and attending.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .errors import ArgumentError
from .plan import TilePlan, check_problem
from .ragged import append_lists, spread_heads, take_ranges
from .rectangles import Places

__all__ = ["BlockPlan"]


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockPlan:
    """Tiles of rows, each holding a range of an order of the keys and its rectangle's samples.

    The rows `query_order[b, h, query_start:query_stop]` of a tile hold the keys
    `key_order[b, h', key_start:key_stop]` of their key head `h'` exactly (weight 1), and the
    samples of the tile's rectangle with their weights; a sample whose rank lies in
    `[key_start, key_stop)` has weight 0, since the tile holds it (the factor `1 - M_ij` of
    Algorithm 2). A key that is sampled twice counts twice. There is no causal test. Rows in no
    tile are empty: 0 and `-inf`.

    Args:
        query_order: int32 `[batch, query_heads, n_q]`, a permutation of the rows.
        key_order: int32 `[batch, key_heads, n_k]`, a permutation of the keys.
        tiles: int32 `[T, 5]` on the same device: query_start, query_stop, key_start, key_stop
            (places in the orders), rectangle. Query ranges are disjoint; key ranges too.
        max_rows: the longest query range.
        max_keys: the longest key range.
        tile_counts: tiles of every rectangle; they stand together, in the rectangles' order.
        rectangles: `(query_start, query_stop, key_start, key_stop)` of each rectangle, places;
            every row of a rectangle lies in one of its tiles.
        num_query_heads, num_queries, num_keys: the problem's sizes.
        sample_index: int32 `[batch, key_heads, rectangles, m]`, or None without samples.
        sample_log_weight: float32, the same shape (expanded dimensions are welcome);
            `-log(m p_j)`, `-inf` for a slot that counts nothing.
        key_rank: int32 `[batch, key_heads, n_k]`, the place of every key in `key_order`; needed
            with samples, whose places are looked up there.
        samples_are_own: True when the maker vouches that no two rectangles share a key and that the
            samples of each are keys of its own.
        covers_all_keys: True when the maker vouches that every key lies in a tile's key range.
    """

    query_order: torch.Tensor
    key_order: torch.Tensor
    tiles: torch.Tensor
    max_rows: int
    max_keys: int
    tile_counts: tuple[int, ...]
    rectangles: tuple[Places, ...]
    num_query_heads: int
    num_queries: int
    num_keys: int
    sample_index: torch.Tensor | None = None
    sample_log_weight: torch.Tensor | None = None
    key_rank: torch.Tensor | None = None
    samples_are_own: bool = False
    covers_all_keys: bool = False

    def __post_init__(self) -> None:
        """Check shapes; values are checked by `validate`, which reads the device."""
        batch = self.query_order.shape[0]
        key_heads = self.key_order.shape[1] if self.key_order.dim() == 3 else 1
        if self.num_query_heads % max(1, key_heads):
            raise ArgumentError(
                f"key_order: its {key_heads} heads do not divide the {self.num_query_heads} "
                "query heads"
            )
        samples = (self.sample_index, self.sample_log_weight, self.key_rank)
        given = [tensor for tensor in samples if tensor is not None]
        if len(given) not in (0, 3):
            raise ArgumentError(
                "sample_index, sample_log_weight and key_rank: give all three or none"
            )
        expected: dict[str, tuple[int, ...]] = {
            "query_order": (batch, self.num_query_heads, self.num_queries),
            "key_order": (batch, key_heads, self.num_keys),
            "tiles": (self.tiles.shape[0], 5),
        }
        if given:
            lists = (batch, key_heads, len(self.rectangles), given[0].shape[-1])
            expected |= dict.fromkeys(("sample_index", "sample_log_weight"), lists)
            expected["key_rank"] = (batch, key_heads, self.num_keys)
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ArgumentError(
                    f"{name}: expected shape {shape}, got {found}; orders, tiles and samples are "
                    "of one problem"
                )

    @property
    def num_samples(self) -> int:
        """Samples of a rectangle, used or not."""
        return 0 if self.sample_index is None else self.sample_index.shape[-1]

    @property
    def sample_rank(self) -> torch.Tensor | None:
        """Place of every sampled key in `key_order`, in the shape of `sample_index`."""
        if self.sample_index is None or self.key_rank is None:
            return None
        index = self.sample_index.long()
        return self.key_rank.gather(-1, index.flatten(2)).view(index.shape)

    def check_inputs(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """Refuse queries and keys that the plan was not made for; reads shapes only.

        Raises:
            ArgumentError: names the size that differs.
        """
        check_problem(
            query, key, self.query_order.shape[0], self.num_query_heads, self.num_queries,
            self.num_keys,
        )  # fmt: skip
        if self.key_order.shape[1] != key.shape[1]:
            raise ArgumentError(
                f"plan: it was made for {self.key_order.shape[1]} key heads, but key "
                f"{tuple(key.shape)} has {key.shape[1]}; build the plan from these inputs"
            )

    def validate(self) -> BlockPlan:
        """Check the values of the index tensors and return the plan; reads the device.

        Raises:
            ArgumentError: an order that is no permutation; tiles that overlap, are too long, or
                lie outside of their rectangle; a sample that does not exist or whose rank is not
                that of its key.
        """
        for name, order in (("query_order", self.query_order), ("key_order", self.key_order)):
            expected = torch.arange(order.shape[-1], device=order.device)
            if not bool((order.sort(dim=-1).values == expected).all()):
                raise ArgumentError(f"{name}: not a permutation in every head")
        table = self.tiles.tolist()
        for axis, longest, name in ((0, self.max_rows, "query"), (2, self.max_keys, "key")):
            before = 0
            for start, stop in sorted(row[axis : axis + 2] for row in table):
                if not before <= start <= stop <= start + longest:
                    raise ArgumentError(
                        f"tiles: the {name} range {start}..{stop} overlaps another one or is "
                        f"longer than {longest}"
                    )
                if start == stop:
                    raise ArgumentError(
                        f"tiles: the {name} range {start}..{stop} is empty; leave the tile out"
                    )
                before = stop
        held = sum(row[3] - row[2] for row in table)
        if self.covers_all_keys and held != self.num_keys:
            raise ArgumentError(
                f"covers_all_keys: the tiles hold {held} of the {self.num_keys} keys; leave it out"
            )
        owners = [r for r, count in enumerate(self.tile_counts) for _ in range(count)]
        if owners != [row[4] for row in table]:
            raise ArgumentError(
                f"tile_counts: {self.tile_counts} is not how many tiles the rectangles have, one "
                "rectangle after the other"
            )
        for row in table:
            inside = self.rectangles[row[4]] if 0 <= row[4] < len(self.rectangles) else (0,) * 4
            if any(not inside[i] <= row[i] <= inside[i + 1] for i in (0, 2)) or any(
                row[i] > inside[i] for i in (1, 3)
            ):
                raise ArgumentError(f"tiles: {row} lies outside of its rectangle {inside}")
        for number, places in enumerate(self.rectangles):
            rows = sum(row[1] - row[0] for row in table if row[4] == number)
            if rows != places[1] - places[0]:
                raise ArgumentError(
                    f"tiles: those of rectangle {number}, {places}, hold {rows} of its "
                    f"{places[1] - places[0]} rows; give every row a tile"
                )
        if self.sample_index is not None and self.key_rank is not None:
            index, rank = self.sample_index, self.key_rank.long()
            if bool(((index < 0) | (index >= self.num_keys)).any()):
                raise ArgumentError(
                    f"sample_index: keys outside of [0, {self.num_keys}); sample keys that exist"
                )
            if bool(((rank < 0) | (rank >= self.num_keys)).any()) or not bool(
                (self.key_order.gather(-1, rank) == torch.arange(rank.shape[-1]).to(rank)).all()
            ):
                raise ArgumentError(
                    "key_rank: not the place of every key in key_order; scatter the places there"
                )
        if self.samples_are_own:
            self._check_samples()
        return self

    def _check_samples(self) -> None:
        """Check what `samples_are_own` vouches for."""
        before = 0
        for start, stop in sorted(places[2:] for places in self.rectangles):
            if start < before:
                raise ArgumentError(
                    f"samples_are_own: two rectangles share the keys from {start}; leave it out"
                )
            before = stop
        rank = self.sample_rank
        if rank is None or not self.rectangles:
            return
        bounds = torch.tensor(self.rectangles, device=rank.device).unsqueeze(-1)
        is_own = (bounds[:, 2] <= rank) & (rank < bounds[:, 3])
        if not bool(is_own.all()):
            raise ArgumentError(
                "samples_are_own: a rectangle samples a key outside of its key range; leave it out"
            )

    def to_tile_plan(self) -> TilePlan:
        """Return the same plan with a list of keys for every tile: what other backends run.

        Memory O(batch query_heads T (max_rows + max_keys + m)).
        """
        heads = self.num_query_heads
        first, last, start, stop, rectangle = self.tiles.long().unbind(dim=1)
        rows, has_row = take_ranges(self.query_order, first, last, self.max_rows)
        index, _ = take_ranges(spread_heads(self.key_order, heads), start, stop, self.max_keys)
        length = (stop - start).expand(index.shape[:3])
        log_weight, key_count = None, length
        sample_rank = self.sample_rank
        if (
            self.sample_index is not None
            and self.sample_log_weight is not None
            and sample_rank is not None
        ):
            rank, drawn, weight = (
                spread_heads(tensor[:, :, rectangle], heads)  # [B, H, T, m]
                for tensor in (sample_rank, self.sample_index, self.sample_log_weight)
            )
            held = (start.unsqueeze(-1) <= rank) & (rank < stop.unsqueeze(-1))
            weight = weight.masked_fill(held, float("-inf"))
            index, log_weight, key_count = append_lists(index, length, drawn, weight)
        return TilePlan(
            key_index=index.int(), key_count=key_count.int(), heavy_count=length.int(),
            tile_size=self.max_rows, num_query_heads=heads, num_queries=self.num_queries,
            num_keys=self.num_keys, query_order=torch.where(has_row, rows, -1).flatten(2),
            log_weight=log_weight, disjoint=True,
        )  # fmt: skip

    def to_dense(self, *, part: Literal["all", "heavy", "sampled"] = "all") -> torch.Tensor:
        """Return the weight matrix `W`, the meaning of the plan; see `TilePlan.to_dense`."""
        return self.to_tile_plan().to_dense(part=part)
