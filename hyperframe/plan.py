"""The tile plan: which keys each tile of query rows attends to, and with what weight.

The waist of the library. Detectors, samplers and estimators end in a plan; every backend begins
with one. A plan *means* a weight matrix `W` (`to_dense`): with `A = exp(scale * q k^T)`,

    out_i = sum_j W_ij A_ij v_j / sum_j W_ij A_ij        lse_i = log sum_j W_ij A_ij

and the reference backend computes just that, in float64. The slots of a tile's list are laid out
as `[banded | exact | sampled | unused]`:

- *exact* slots (weight 1) count for every row of the tile;
- *banded* slots are exact too, but only for the rows whose `band` they lie in, so that a window
  is held exactly and not as the union over the tile;
- *sampled* slots carry importance weights and stand for the keys the row does not hold: one that
  the tile also holds exactly, or that lies in the row's band, has weight 0 (the factor
  `1 - M_ij` of Algorithm 2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from .errors import ArgumentError

__all__ = ["RankRanges", "TilePlan", "check_problem"]

_NEG_INF = float("-inf")
_CHUNK_BYTES = 64 << 20  # of temporaries held at once
_BYTES_PER_SLOT = 96  # about ten int64 arrays of the lists, and flags


@dataclass(frozen=True, kw_only=True, eq=False)
class RankRanges:
    """Entries that a plan leaves out because other plans of the same list hold them.

    Entry `(i, j)` is left out if `start[r, i] <= key_rank[r, j] < stop[r, i]` for any `r`. This is
    how plans over different orders (hash blocks and a window, several hash rounds) stay disjoint.

    Args:
        key_rank: integer `[batch, key_heads, R, n_k]`.
        start: integer `[batch, query_heads, R, n_q]`.
        stop: integer `[batch, query_heads, R, n_q]`.
    """

    key_rank: torch.Tensor
    start: torch.Tensor
    stop: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class TilePlan:
    """Keys and weights for every tile of query rows.

    `H_p`, the heads of the plan, is the number of query heads, or of key heads: then a tile owns
    `tile_size` positions of every query head in the group. Expanded (stride 0) dimensions are
    welcome everywhere; a list shared by all tiles is stored once and computed as one tile.

    Args:
        key_index: integer `[batch, H_p, T, L]`; indices from `num_keys` on address summary keys.
        key_count: integer `[batch, H_p, T]`, used slots.
        heavy_count: integer `[batch, H_p, T]`, how many of those are exact (banded included).
        tile_size: rows of a tile; `T = ceil(slots / tile_size)`.
        num_query_heads, num_queries, num_keys: the problem's sizes.
        query_order: integer `[batch, H_p, T * tile_size]` or None (consecutive rows); tile `t`
            owns the rows of its `tile_size` slots, -1 is an empty slot, no row appears twice.
        log_weight: floating point `[batch, H_p, T, L]` or None (all 0); natural logarithm, 0 for
            exact slots, `-log(m p_j)` for sampled ones, `-inf` for a slot that counts nothing.
        value_log_weight: the same for the numerator, where its weights differ (Algorithm 3).
        log_cap: floating point `[batch, query_heads, n_q]` or None: `A` of sampled slots is capped
            at `C_i` in the row sum (Algorithm 2, line 7); the numerator is not capped.
        log_floor: like `log_cap`: the sampled part of the row sum is at least this (line 8); a row
            without any key stays empty.
        summary_key: `[batch, key_heads, E, d]` or None, pseudo-keys after the real ones; a summary
            has no position and is visible to every row whose list names it.
        summary_value: `[batch, key_heads, E, d_v]` or None.
        is_causal: require `key position <= query position`, bottom-right aligned.
        band: `(left, right)` or None; see the module's docstring.
        band_count: integer `[batch, H_p, T]` or None: the first slots that are banded.
        excluded: entries that other plans hold, or None.
        disjoint: True when the maker vouches that no tile holds a key twice. Otherwise duplicates
            are found and given weight 0 before use (`deduplicated`).
        query_offset: key position of query row 0; None is the bottom-right alignment, `n_k - n_q`.
        is_removed: the entries count with weight `-W`: other plans of the same list hold at least
            as much of them, and the state of this one is taken out of theirs. Keys may then stand
            in a list several times.
    """

    key_index: torch.Tensor
    key_count: torch.Tensor
    heavy_count: torch.Tensor
    tile_size: int
    num_query_heads: int
    num_queries: int
    num_keys: int
    query_order: torch.Tensor | None = None
    log_weight: torch.Tensor | None = None
    value_log_weight: torch.Tensor | None = None
    log_cap: torch.Tensor | None = None
    log_floor: torch.Tensor | None = None
    summary_key: torch.Tensor | None = None
    summary_value: torch.Tensor | None = None
    is_causal: bool = False
    band: tuple[int, int] | None = None
    band_count: torch.Tensor | None = None
    excluded: RankRanges | None = None
    disjoint: bool = False
    query_offset: int | None = None
    is_removed: bool = False

    def __post_init__(self) -> None:
        """Check shapes; values are checked by `validate`, which reads the device."""
        if self.key_index.dim() != 4:
            raise ArgumentError(
                "key_index: expected [batch, heads, tiles, L], got shape "
                f"{tuple(self.key_index.shape)}"
            )
        lists = self.key_index.shape
        expected = {"key_count": lists[:3], "heavy_count": lists[:3], "band_count": lists[:3]}
        expected |= {"log_weight": lists, "value_log_weight": lists}
        expected["query_order"] = torch.Size((*lists[:2], lists[2] * self.tile_size))
        rows = torch.Size((lists[0], self.num_query_heads, self.num_queries))
        expected |= {"log_cap": rows, "log_floor": rows}
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ArgumentError(
                    f"{name}: expected shape {tuple(shape)} to match key_index "
                    f"{tuple(lists)}, got {tuple(tensor.shape)}"
                )
        if self.num_query_heads % max(1, lists[1]):
            raise ArgumentError(
                f"key_index: its {lists[1]} heads do not divide the {self.num_query_heads} "
                "query heads"
            )
        if self.query_order is None and lists[2] * self.tile_size < self.num_queries:
            raise ArgumentError(
                f"tile_size: {lists[2]} tiles of {self.tile_size} rows do not cover the "
                f"{self.num_queries} queries"
            )
        if self.band is not None and min(self.band) < 0:
            raise ArgumentError(f"band: {self.band} reaches back or ahead by less than nothing")
        if (self.band is None) != (self.band_count is None):
            raise ArgumentError("band and band_count: give both or neither")
        if (self.summary_key is None) != (self.summary_value is None):
            raise ArgumentError("summary_key and summary_value: give both or neither")

    @property
    def num_summaries(self) -> int:
        """Number of pseudo-keys after the real ones."""
        return 0 if self.summary_key is None else self.summary_key.shape[2]

    @property
    def position_offset(self) -> int:
        """Key position of query row 0."""
        if self.query_offset is not None:
            return self.query_offset
        return self.num_keys - self.num_queries

    def slot_rows(self) -> torch.Tensor:
        """Return the query row of every slot, -1 for none: int64 `[batch, H_p, T, tile_size]`."""
        batch, heads, tiles, _ = self.key_index.shape
        if self.query_order is not None:
            return self.query_order.long().reshape(batch, heads, tiles, self.tile_size)
        rows = torch.arange(tiles * self.tile_size, device=self.key_index.device)
        rows = torch.where(rows < self.num_queries, rows, -1)
        return rows.view(tiles, self.tile_size).expand(batch, heads, -1, -1)

    def check_inputs(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """Refuse queries and keys that the plan was not made for; reads shapes only.

        Raises:
            ArgumentError: names the size that differs.
        """
        check_problem(
            query, key, self.key_index.shape[0], self.num_query_heads, self.num_queries,
            self.num_keys,
        )  # fmt: skip
        if self.key_index.shape[1] % key.shape[1]:
            raise ArgumentError(
                f"plan: its {self.key_index.shape[1]} heads are no multiple of the {key.shape[1]} "
                "key heads; give every key head a list of its own"
            )
        summary = self.summary_key
        if summary is not None and (*summary.shape[:2], *summary.shape[3:]) != (
            *key.shape[:2], key.shape[3],
        ):  # fmt: skip
            raise ArgumentError(
                f"summary_key: expected [batch, key_heads, summaries, d] to match a key of "
                f"{tuple(key.shape)}, got {tuple(summary.shape)}"
            )
        if self.excluded is not None:
            orders = self.excluded.key_rank.shape[2]
            of_rows = (*query.shape[:2], orders, self.num_queries)
            for name, shape in {
                "key_rank": (*key.shape[:2], orders, self.num_keys),
                "start": of_rows, "stop": of_rows,
            }.items():  # fmt: skip
                given = tuple(getattr(self.excluded, name).shape)
                if given != shape:
                    raise ArgumentError(f"excluded.{name}: expected shape {shape}, got {given}")

    def validate(self) -> TilePlan:
        """Check the values of the index tensors and return the plan; reads the device.

        Raises:
            ArgumentError: a count outside its list, a key index out of range, a row owned by two
                slots.
        """
        slots = self.key_index.shape[-1]
        ordered = (self.band_count, self.heavy_count, self.key_count)
        counts = [count for count in ordered if count is not None]
        for low, high in zip([torch.zeros_like(counts[0]), *counts], counts, strict=False):
            if bool((low > high).any()) or bool((high > slots).any()):
                raise ArgumentError(
                    "band_count <= heavy_count <= key_count <= L does not hold in every tile"
                )
        used = torch.arange(slots, device=self.key_index.device) < self.key_count.unsqueeze(-1)
        last = self.num_keys + self.num_summaries
        outside = used & ((self.key_index < 0) | (self.key_index >= last))
        if bool(outside.any()):
            worst = int(self.key_index[outside][0])
            raise ArgumentError(
                f"key_index: {worst} is outside 0..{last - 1} (num_keys {self.num_keys} plus "
                f"{self.num_summaries} summary keys)"
            )
        rows = self.slot_rows().flatten(2)
        if bool((rows >= self.num_queries).any()) or bool((rows < -1).any()):
            raise ArgumentError(f"query_order: rows outside -1..{self.num_queries - 1}")
        ordered_rows = rows.sort(dim=-1).values
        repeated = (ordered_rows[..., 1:] == ordered_rows[..., :-1]) & (ordered_rows[..., 1:] >= 0)
        if bool(repeated.any()):
            raise ArgumentError("query_order: a row is owned by two slots; each at most once")
        return self

    def deduplicated(self) -> TilePlan:
        """Return the plan with weight 0 on keys that a tile holds twice.

        Of several exact copies of a key one stays (one that counts for every row, if there is
        one), and sampled copies of a key held for every row of the tile get weight 0. Sampled
        copies of a banded key are settled per row by the band test. Costs one sort of each list.
        """
        if self.disjoint:
            return self
        index, key_count, heavy_count, band_count = (
            None if tensor is None else _store_once(tensor)
            for tensor in (self.key_index, self.key_count, self.heavy_count, self.band_count)
        )
        assert index is not None
        assert key_count is not None
        assert heavy_count is not None
        batch, heads, tiles, num_slots = torch.broadcast_shapes(
            index.shape, (*key_count.shape, 1), (*heavy_count.shape, 1)
        )
        lists = (batch, heads, tiles)
        tensors = [
            None if count is None else count.expand(lists)
            for count in (key_count, heavy_count, band_count)
        ]
        index = index.expand(*lists, num_slots)
        drop = torch.empty((*lists, num_slots), dtype=torch.bool, device=index.device)
        flat_drop = drop.view(batch * heads * tiles, num_slots)
        step = max(1, _CHUNK_BYTES // max(1, _BYTES_PER_SLOT * num_slots))
        for start in range(0, len(flat_drop), step):
            stop = min(start + step, len(flat_drop))
            tile = torch.arange(start, stop, device=index.device)
            at = (tile // (heads * tiles), tile // tiles % heads, tile % tiles)
            counts = (None if count is None else count[at].unsqueeze(-1) for count in tensors)
            flat_drop[start:stop] = _repeats(index[at], *counts)
        weights = self.log_weight
        if weights is None:
            weights = torch.zeros((), device=index.device).expand_as(self.key_index)
        values = self.value_log_weight

        def without_repeats(log_weight: torch.Tensor) -> torch.Tensor:
            stored = _store_once(log_weight)
            shape = torch.broadcast_shapes(stored.shape, drop.shape)
            kept = stored.expand(shape).masked_fill(drop.expand(shape), _NEG_INF)
            return kept.expand_as(self.key_index)

        return replace(
            self,
            log_weight=without_repeats(weights),
            value_log_weight=None if values is None else without_repeats(values),
            disjoint=True,
        )

    def to_dense(
        self, *, part: Literal["all", "heavy", "sampled"] = "all", for_values: bool = False
    ) -> torch.Tensor:
        """Return the weight matrix `W`, the meaning of the plan.

        Args:
            part: the exact slots, the sampled slots, or both.
            for_values: the weights of the numerator instead of those of the row sum.

        Returns:
            float64 `[batch, query_heads, n_q, n_k + E]`; memory n_q x n_k, for tests.
        """
        plan = self.deduplicated()
        rows, visible, is_heavy = plan._slot_visibility()
        if part != "all":
            visible = visible & (is_heavy if part == "heavy" else ~is_heavy)
        log_weight = plan.log_weight
        if for_values and plan.value_log_weight is not None:
            log_weight = plan.value_log_weight
        index = plan._per_query_head(plan.key_index).long().unsqueeze(3).expand_as(visible)
        weight = visible.double()
        if log_weight is not None:
            # selected, not multiplied: the weight of an unused slot may be anything
            weight = plan._per_query_head(log_weight).double().exp().unsqueeze(3)
            weight = torch.where(visible, weight, 0.0)
        batch, heads, tiles, tile_size, _ = visible.shape
        width = self.num_keys + self.num_summaries
        index = torch.where(visible, index, 0)
        dense = weight.new_zeros(batch, heads, tiles, tile_size, width).scatter_add_(
            -1, index, weight
        )
        slots = torch.where(rows < 0, self.num_queries, rows).flatten(2)
        by_row = dense.new_zeros(batch, heads, self.num_queries + 1, width)
        by_row.scatter_(2, slots.unsqueeze(-1).expand(-1, -1, -1, width), dense.flatten(2, 3))
        return -by_row[:, :, :-1] if self.is_removed else by_row[:, :, :-1]

    def _per_query_head(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.repeat_interleave(self.num_query_heads // tensor.shape[1], dim=1)

    def _slot_visibility(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of the slots, and per (row, slot) whether it counts and whether it is exact."""
        rows = self._per_query_head(self.slot_rows())  # [B, H, T, M]
        index = self._per_query_head(self.key_index).long()[:, :, :, None]  # [B, H, T, 1, L]
        slot = torch.arange(index.shape[-1], device=index.device)

        def below(count: torch.Tensor) -> torch.Tensor:
            return slot < self._per_query_head(count)[..., None, None]

        is_summary = index >= self.num_keys
        is_heavy = below(self.heavy_count)
        visible = below(self.key_count) & (rows >= 0).unsqueeze(-1)
        offset = index - (rows.unsqueeze(-1) + self.position_offset)
        if self.is_causal:
            visible = visible & ((offset <= 0) | is_summary)
        if self.band is not None and self.band_count is not None:
            in_band = (offset >= -self.band[0]) & (offset <= self.band[1]) & ~is_summary
            visible = visible & (in_band | ~below(self.band_count))
            visible = visible & (is_heavy | ~in_band)
        if self.excluded is not None:
            visible = visible & ~(self._is_excluded(rows, index) & ~is_summary)
        return rows, visible, is_heavy.expand_as(visible)

    def _is_excluded(self, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ranges = self.excluded
        assert ranges is not None
        # sizes are small here: the dense form is the clearest
        rank = self._per_query_head(ranges.key_rank)[:, :, :, None, :]  # [B, H, R, 1, n_k]
        held = (ranges.start.unsqueeze(-1) <= rank) & (rank < ranges.stop.unsqueeze(-1))
        held = held.any(dim=2)  # [B, H, n_q, n_k]
        batch, heads, tiles, tile_size = rows.shape
        by_slot = held.gather(
            2, rows.clamp(min=0).flatten(2).unsqueeze(-1).expand(-1, -1, -1, self.num_keys)
        ).view(batch, heads, tiles, tile_size, self.num_keys)
        keys = index.clamp(0, self.num_keys - 1).expand(-1, -1, -1, tile_size, -1)
        return by_slot.gather(-1, keys)


def check_problem(
    query: torch.Tensor, key: torch.Tensor, batch_size: int, num_query_heads: int,
    num_queries: int, num_keys: int,
) -> None:  # fmt: skip
    """Refuse queries and keys of other sizes than a plan's; reads shapes only.

    Raises:
        ArgumentError: names the size that differs.
    """
    sizes = (
        ("batch size", batch_size, query.shape[0]),
        ("number of query heads", num_query_heads, query.shape[1]),
        ("number of queries", num_queries, query.shape[2]),
        ("number of keys", num_keys, key.shape[2]),
    )
    for what, expected, found in sizes:
        if expected != found:
            raise ArgumentError(
                f"plan: it was made for a {what} of {expected}, but query {tuple(query.shape)} "
                f"and key {tuple(key.shape)} have {found}; build the plan from these inputs"
            )


def _repeats(
    index: torch.Tensor, key_count: torch.Tensor | None, heavy_count: torch.Tensor | None,
    band_count: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Return which slots of some lists `[N, L]` repeat a key: bool; counts are `[N, 1]`."""
    assert key_count is not None
    assert heavy_count is not None
    slot = torch.arange(index.shape[-1], device=index.device)
    # 0: exact for every row, 1: banded, 2: sampled, 3: unused
    kind = torch.where(slot < heavy_count, 0, 2)
    if band_count is not None:
        kind = torch.where(slot < band_count, 1, kind)
    kind = torch.where(slot < key_count, kind, 3)
    ordered, order = (index.long() * 4 + kind).sort(dim=-1, stable=True)
    ordered_kind, ordered_key = ordered % 4, ordered // 4
    starts = torch.ones_like(ordered_key, dtype=torch.bool)
    starts[:, 1:] = ordered_key[:, 1:] != ordered_key[:, :-1]
    run_start = torch.where(starts, slot, 0).cummax(dim=-1).values
    leader = ordered_kind.gather(-1, run_start)
    repeated = torch.where(ordered_kind == 2, leader == 0, ~starts & (ordered_kind < 2))
    return torch.zeros_like(repeated).scatter_(-1, order, repeated)


def _store_once(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with its expanded tile dimension cut to one."""
    if tensor.shape[2] > 1 and tensor.stride(2) == 0:
        return tensor[:, :, :1]
    return tensor
