"""The torch backend: any device, batched over tiles, never an `n_q x n_k` matrix.

Every tile gathers its keys, and tiles are processed in chunks so that the temporaries stay within
`CHUNK_BYTES` whatever the plan. The backward recomputes the weights chunk by chunk and is the exact
gradient of the forward with indices and weights held constant:

    dS_ij = Wv_ij A_ij / D_i (dO_i . v_j) + W_ij A'_ij / D_i (dlse_i - dO_i . O_i)

where the second term leaves out capped entries and the sampled part of floored rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..plan import RankRanges, TilePlan
from ..precision import without_autocast
from ..state import AttentionState

__all__ = ["CHUNK_BYTES", "attend", "visible_keys"]

CHUNK_BYTES = 64 << 20
"""Upper bound, in bytes, of the temporaries of one chunk of tiles (about five score arrays)."""

_FEWEST_ROWS = 64  # of a chunk, however long the list of its tile is
_NEG_INF = float("-inf")


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: TilePlan, *, scale: float
) -> AttentionState:
    """Attend by a plan.

    Args:
        query: `[batch, query_heads, n_q, d]`; fp64, fp32, bf16 or fp16.
        key: `[batch, key_heads, n_k, d]`.
        value: `[batch, key_heads, n_k, d_v]`.
        plan: the plan; on the same device.
        scale: factor of the logits.

    Returns:
        `out` in the dtype of `query`, `lse` in float32 (float64 for float64 input). Arithmetic is
        in float32 at least. Differentiable in query, key, value and the plan's summaries.
        Time O(rows x keys per row x d); extra memory `CHUNK_BYTES` plus the outputs.
    """
    if plan.summary_key is not None and plan.summary_value is not None:
        key = torch.cat([key, plan.summary_key.to(key.dtype)], dim=2)
        value = torch.cat([value, plan.summary_value.to(value.dtype)], dim=2)
    layout = _Layout.of(plan.deduplicated())
    out, lse = _Attend.apply(query, key, value, layout, scale)  # type: ignore[no-untyped-call]
    return AttentionState(out=out, lse=lse)


def visible_keys(plan: TilePlan, *, key_heads: int) -> torch.Tensor:
    """Return how many slots count for each row: int64 `[batch, query_heads, n_q]`."""
    layout = _Layout.of(plan.deduplicated())
    counts = torch.zeros(layout.num_rows + 1, dtype=torch.int64, device=layout.index.device)
    for chunk in layout.chunks(key_heads=key_heads, width=0):
        log_weight, visible, _ = chunk.weights()
        if log_weight is not None:
            visible = visible & (log_weight > _NEG_INF)
        counts[chunk.rows] = visible.sum(dim=-1)
    return counts[:-1].view(layout.batch, plan.num_query_heads, plan.num_queries)


@dataclass(frozen=True)
class _Layout:
    """A plan flattened to one list of tiles, with lists that all tiles share stored once."""

    plan: TilePlan
    batch: int
    heads: int
    tiles: int
    tile_size: int
    index: torch.Tensor

    @classmethod
    def of(cls, plan: TilePlan) -> _Layout:
        batch, heads, tiles, _ = plan.key_index.shape
        lists = (
            plan.key_index, plan.key_count, plan.heavy_count, plan.band_count,
            plan.log_weight, plan.value_log_weight,
        )  # fmt: skip
        shared = all(x is None or x.shape[2] == 1 or x.stride(2) == 0 for x in lists)
        tile_size = plan.tile_size
        if shared and tiles > 1:
            # one list for all tiles: one tile of all rows, gathered once
            tile_size, tiles = tile_size * tiles, 1
        return cls(plan, batch, heads, tiles, tile_size, plan.key_index)

    @property
    def num_rows(self) -> int:
        return self.batch * self.plan.num_query_heads * self.plan.num_queries

    def per_tile(self, tensor: torch.Tensor | None, tile: torch.Tensor) -> torch.Tensor | None:
        """Select the flat tiles `tile` of a `[batch, heads, tiles, ...]` tensor."""
        if tensor is None:
            return None
        per_head = self.tiles
        head = tile // per_head
        return tensor[head // self.heads, head % self.heads, tile % per_head]

    def rows_of(self, tile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Flat query rows and query positions of the slots of some tiles, both `[N, R]`."""
        plan = self.plan
        slot = torch.arange(self.tile_size, device=tile.device)
        slot = (tile % self.tiles).unsqueeze(-1) * self.tile_size + slot
        head = tile // self.tiles
        batch, plan_head = head // self.heads, head % self.heads
        if plan.query_order is None:
            row = torch.where(slot < plan.num_queries, slot, -1)
        else:
            row = plan.query_order[batch[:, None], plan_head[:, None], slot].long()
        group = plan.num_query_heads // self.heads
        query_head = plan_head.unsqueeze(-1) * group + torch.arange(group, device=tile.device)
        flat_head = batch.unsqueeze(-1) * plan.num_query_heads + query_head  # [N, G]
        flat = flat_head.unsqueeze(-1) * plan.num_queries + row.unsqueeze(1)  # [N, G, M]
        # empty slots read row 0 and write to an extra last row
        flat = torch.where(row.unsqueeze(1) < 0, self.num_rows, flat).flatten(1)
        return flat, row.unsqueeze(1).expand(-1, group, -1).flatten(1)

    def chunks(self, *, key_heads: int, width: int) -> Iterator[_Chunk]:
        """Cut the tiles, and very tall tiles into runs of rows, by the memory they need."""
        plan = self.plan
        slots = self.index.shape[-1]
        rows = self.tile_size * (plan.num_query_heads // self.heads)
        per_row = 4 * 5 * (slots + width)
        per_tile = 4 * slots * (3 * width + 4) + rows * per_row
        step = max(1, CHUNK_BYTES // max(1, per_tile))
        # gathering a long list again and again for a few rows would cost more than the products
        row_step = max(_FEWEST_ROWS, (CHUNK_BYTES - 4 * slots * 3 * width) // max(1, per_row))
        total = self.batch * self.heads * self.tiles
        for start in range(0, total, step):
            stop = min(start + step, total)
            tile = torch.arange(start, stop, device=self.index.device)
            flat, row = self.rows_of(tile)
            for first in range(0, rows, row_step if step == 1 else rows):
                part = slice(first, first + (row_step if step == 1 else rows))
                yield _Chunk(self, tile, flat[:, part], row[:, part], key_heads)


class _Weights(NamedTuple):
    """Per slot of a chunk: log weights `[N, 1, L]` (or None), visibility, exactness `[N, 1, L]`.

    Visibility is `[N, 1, L]` where it is the same for all rows, else `[N, R, L]`.
    """

    log_weight: torch.Tensor | None
    visible: torch.Tensor
    is_heavy: torch.Tensor


@dataclass(frozen=True)
class _Chunk:
    """Some tiles (or some rows of one tile): row `[N, R]`, key lists `[N, L]`."""

    layout: _Layout
    tile: torch.Tensor
    rows: torch.Tensor
    row: torch.Tensor
    key_heads: int

    def flat_keys(self) -> torch.Tensor:
        """Flat indices `[N, L]` into keys stored as `[batch * key_heads * n_keys, d]`."""
        layout, plan = self.layout, self.layout.plan
        index = layout.per_tile(layout.index, self.tile)
        assert index is not None
        head = self.tile // layout.tiles
        key_head = (head % layout.heads) * self.key_heads // layout.heads
        flat_head = head // layout.heads * self.key_heads + key_head
        count = layout.per_tile(plan.key_count, self.tile)
        assert count is not None
        slot = torch.arange(index.shape[-1], device=index.device)
        # unused slots may hold anything: they read key 0 and count nothing
        index = torch.where(slot < count.unsqueeze(-1), index.long(), 0)
        return flat_head.unsqueeze(-1) * (plan.num_keys + plan.num_summaries) + index

    def weights(self) -> _Weights:
        """Which slots count for which rows, `[N, R, L]` or broadcastable to it."""
        layout, plan = self.layout, self.layout.plan
        index = layout.per_tile(layout.index, self.tile)
        key_count = layout.per_tile(plan.key_count, self.tile)
        heavy_count = layout.per_tile(plan.heavy_count, self.tile)
        assert index is not None
        assert key_count is not None
        assert heavy_count is not None
        slot = torch.arange(index.shape[-1], device=index.device)
        is_heavy = (slot < heavy_count.unsqueeze(-1)).unsqueeze(1)  # [N, 1, L]
        # rows of empty slots are not looked at: what they give is written to the extra last row
        visible = (slot < key_count.unsqueeze(-1)).unsqueeze(1)
        key_position = index.unsqueeze(1)
        is_summary = key_position >= plan.num_keys
        position = (self.row + plan.position_offset).unsqueeze(-1)  # [N, R, 1]
        if plan.is_causal:
            visible = visible & ((key_position <= position) | is_summary)
        if plan.band is not None:
            band_count = layout.per_tile(plan.band_count, self.tile)
            assert band_count is not None
            is_banded = (slot < band_count.unsqueeze(-1)).unsqueeze(1)
            left, right = plan.band
            in_band = (key_position >= position - left) & (key_position <= position + right)
            in_band &= ~is_summary
            visible = visible & torch.where(is_banded, in_band, is_heavy | ~in_band)
        if plan.excluded is not None:
            visible = visible & ~(self._excluded(plan.excluded, index) & ~is_summary)
        log_weight = layout.per_tile(plan.log_weight, self.tile)
        if log_weight is not None:
            log_weight = log_weight.unsqueeze(1)
        return _Weights(log_weight, visible, is_heavy)

    def _excluded(self, ranges: RankRanges, index: torch.Tensor) -> torch.Tensor:
        layout, plan = self.layout, self.layout.plan
        head = self.tile // layout.tiles
        batch, plan_head = head // layout.heads, head % layout.heads
        rank_heads = ranges.key_rank.shape[1]
        rank_head = (plan_head * rank_heads // layout.heads).unsqueeze(-1)
        index = index.long().clamp(min=0, max=plan.num_keys - 1)
        row = self.rows.clamp(max=layout.num_rows - 1)
        held = torch.zeros(1, dtype=torch.bool, device=index.device)
        for r in range(ranges.key_rank.shape[2]):
            # only the ranks of the listed keys: [N, 1, L]
            rank = ranges.key_rank[batch.unsqueeze(-1), rank_head, r, index].unsqueeze(1)
            start = ranges.start[:, :, r].reshape(-1)[row].unsqueeze(-1)
            stop = ranges.stop[:, :, r].reshape(-1)[row].unsqueeze(-1)
            held = held | ((start <= rank) & (rank < stop))
        return held

    def per_row(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Select the chunk's rows of a `[batch, query_heads, n_q]` tensor: `[N, R, 1]`."""
        if tensor is None:
            return None
        row = self.rows.clamp(max=self.layout.num_rows - 1)
        return tensor.reshape(-1)[row].unsqueeze(-1)


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class _Attend(torch.autograd.Function):
    """Forward and exact backward of one plan; `key` and `value` include the summaries."""

    @staticmethod
    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: _Layout, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with without_autocast(query):
            return _forward(query, key, value, layout, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        query, key, value, ctx.layout, ctx.scale = inputs
        ctx.save_for_backward(query, key, value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value = ctx.saved_tensors
        grad_out, grad_lse = grads
        with without_autocast(query):
            return _backward(query, key, value, grad_out, grad_lse, ctx.layout, ctx.scale)


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: _Layout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = _compute_dtype(query)
    flat_q = query.reshape(-1, query.shape[-1])
    flat_k = key.reshape(-1, key.shape[-1])
    flat_v = value.reshape(-1, value.shape[-1])
    # the extra last row takes what empty slots write
    out = flat_q.new_zeros(layout.num_rows + 1, value.shape[-1])
    lse = torch.full((layout.num_rows + 1,), _NEG_INF, dtype=dtype, device=query.device)
    if layout.index.shape[-1] > 0:
        width = max(key.shape[-1], value.shape[-1])
        for chunk in layout.chunks(key_heads=key.shape[1], width=width):
            terms = _Terms.of(chunk, flat_q, flat_k, scale, dtype)
            v = flat_v[terms.keys].to(dtype)  # [N, L, d_v]
            sums = _RowSums.of(terms, chunk.per_row(layout.plan.log_floor))
            row_out = torch.bmm(sums.value_weights, v) * sums.value_factor
            out[chunk.rows] = row_out.to(out.dtype)
            lse[chunk.rows] = sums.lse.squeeze(-1)
    rows = query.shape[:-1]
    return out[:-1].view(*rows, value.shape[-1]), lse[:-1].view(rows)


def _backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad_out: torch.Tensor,
    grad_lse: torch.Tensor, layout: _Layout, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:  # fmt: skip
    dtype = _compute_dtype(query)
    plan = layout.plan
    flat_q = query.reshape(-1, query.shape[-1])
    flat_k = key.reshape(-1, key.shape[-1])
    flat_v = value.reshape(-1, value.shape[-1])
    flat_grad = grad_out.reshape(-1, grad_out.shape[-1])
    grad_q = torch.zeros(flat_q.shape[0] + 1, flat_q.shape[1], dtype=dtype, device=query.device)
    grad_k = torch.zeros_like(flat_k, dtype=dtype)
    grad_v = torch.zeros_like(flat_v, dtype=dtype)
    if layout.index.shape[-1] == 0:
        grad_q = grad_q[:-1]
        return grad_q.view_as(query).to(query.dtype), *_back(grad_k, key, grad_v, value)
    width = max(key.shape[-1], value.shape[-1])
    for chunk in layout.chunks(key_heads=key.shape[1], width=width):
        terms = _Terms.of(chunk, flat_q, flat_k, scale, dtype)
        v = flat_v[terms.keys].to(dtype)
        row = chunk.rows.clamp(max=layout.num_rows - 1)
        is_empty_slot = (chunk.row < 0).unsqueeze(-1)
        do = flat_grad[row].to(dtype).masked_fill(is_empty_slot, 0)
        sums = _RowSums.of(terms, chunk.per_row(plan.log_floor))
        by_value = sums.value_weights * sums.value_factor
        by_sum = by_value
        if sums.value_weights is not sums.weights:
            by_sum = sums.weights / sums.row_sum
        grad_v.index_add_(
            0, terms.keys.flatten(), torch.bmm(by_value.transpose(1, 2), do).flatten(0, 1)
        )
        if terms.is_capped is not None:
            by_sum = by_sum.masked_fill(terms.is_capped, 0)
        if sums.is_floored is not None:
            by_sum = by_sum.masked_fill(sums.is_floored & ~terms.is_heavy, 0)
        grad_logits = by_value * torch.bmm(do, v.transpose(1, 2))
        # the derivative of log D_i collects dlse and minus dO . O (the normalisation), taken
        # from the terms themselves: O is rounded to the dtype of the inputs
        along_sum = grad_lse.reshape(-1)[row].unsqueeze(-1).to(dtype)
        along_sum = along_sum.masked_fill(is_empty_slot, 0)
        along_sum = along_sum - grad_logits.sum(dim=-1, keepdim=True)
        grad_logits += by_sum * along_sum
        grad_q[chunk.rows] = scale * torch.bmm(grad_logits, terms.k)
        grad_k.index_add_(
            0,
            terms.keys.flatten(),
            scale * torch.bmm(grad_logits.transpose(1, 2), terms.q).flatten(0, 1),
        )
    return grad_q[:-1].view_as(query).to(query.dtype), *_back(grad_k, key, grad_v, value)


def _back(
    grad_k: torch.Tensor, key: torch.Tensor, grad_v: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, None, None]:
    return (
        grad_k.view_as(key).to(key.dtype), grad_v.view_as(value).to(value.dtype), None, None
    )  # fmt: skip


class _Terms(NamedTuple):
    """Logits of one chunk, `[N, R, L]`; `-inf` where a slot does not count."""

    q: torch.Tensor
    k: torch.Tensor
    keys: torch.Tensor
    row_logits: torch.Tensor
    value_logits: torch.Tensor
    is_heavy: torch.Tensor
    is_capped: torch.Tensor | None

    @classmethod
    def of(
        cls, chunk: _Chunk, flat_q: torch.Tensor, flat_k: torch.Tensor, scale: float,
        dtype: torch.dtype,
    ) -> _Terms:  # fmt: skip
        plan = chunk.layout.plan
        q = flat_q[chunk.rows.clamp(max=chunk.layout.num_rows - 1)].to(dtype)  # [N, R, d]
        keys = chunk.flat_keys()
        k = flat_k[keys].to(dtype)  # [N, L, d]
        log_weight, visible, is_heavy = chunk.weights()
        cap = chunk.per_row(plan.log_cap)
        value_weight = chunk.layout.per_tile(plan.value_log_weight, chunk.tile)
        if cap is None and value_weight is None and visible.shape[1] == 1:
            # the common case in one pass: all that the slots add fits into the product
            bias = torch.zeros((), dtype=dtype, device=q.device)
            bias = (bias if log_weight is None else log_weight.to(dtype)).expand(visible.shape)
            bias = bias.masked_fill(~visible, _NEG_INF)
            logits = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
            return cls(q, k, keys, logits, logits, is_heavy, None)
        logits = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
        is_capped = None
        row_logits = logits
        if cap is not None:
            is_capped = (logits > cap.to(dtype)) & ~is_heavy
            row_logits = torch.where(is_capped, cap.to(dtype), logits)
        hidden = ~visible
        if log_weight is not None:
            row_logits = row_logits + log_weight
        row_logits = row_logits.masked_fill(hidden, _NEG_INF)
        value_logits = row_logits
        if cap is not None or value_weight is not None:
            value_bias = log_weight if value_weight is None else value_weight.unsqueeze(1)
            value_logits = logits if value_bias is None else logits + value_bias
            value_logits = value_logits.masked_fill(hidden, _NEG_INF)
        return cls(q, k, keys, row_logits, value_logits, is_heavy, is_capped)


class _RowSums(NamedTuple):
    """Weights of one chunk, each shifted by the row's largest, and what normalises them.

    The backward computes them anew: rounded to the dtype of `lse`, a normaliser of thousands would
    put its rounding error into every weight of the row.
    """

    weights: torch.Tensor  # [N, R, L]
    value_weights: torch.Tensor  # the same tensor, unless the numerator has weights of its own
    row_sum: torch.Tensor  # [N, R, 1]; 1 in empty rows
    value_factor: torch.Tensor  # makes shares of value_weights; 0 in empty rows
    lse: torch.Tensor
    is_floored: torch.Tensor | None

    @classmethod
    def of(cls, terms: _Terms, log_floor: torch.Tensor | None) -> _RowSums:
        top = terms.row_logits.amax(-1, keepdim=True)
        is_empty = top == _NEG_INF
        if log_floor is not None:
            top = torch.maximum(top, log_floor.to(top.dtype))
        top = top.masked_fill(is_empty, 0)
        weights = (terms.row_logits - top).exp_()
        is_floored = None
        if log_floor is None:
            row_sum = weights.sum(-1, keepdim=True)
        else:
            sampled = weights.masked_fill(terms.is_heavy, 0).sum(-1, keepdim=True)
            floor = torch.exp(log_floor.to(top.dtype) - top)
            is_floored = sampled < floor
            row_sum = weights.masked_fill(~terms.is_heavy, 0).sum(-1, keepdim=True)
            row_sum = row_sum + torch.maximum(sampled, floor)
        row_sum = row_sum.masked_fill(is_empty, 1)
        value_weights, value_factor = weights, 1 / row_sum
        if terms.value_logits is not terms.row_logits:
            # a shift of its own: capped sums may lie far below the numerator
            value_top = terms.value_logits.amax(-1, keepdim=True)
            value_top = value_top.masked_fill(torch.isinf(value_top), 0)
            value_weights = (terms.value_logits - value_top).exp_()
            # stays finite, also in sums
            largest = 700.0 if top.dtype == torch.float64 else 80.0
            value_factor = value_factor * torch.exp((value_top - top).clamp(max=largest))
        value_factor = value_factor.masked_fill(is_empty, 0)
        lse = (top + torch.log(row_sum)).masked_fill(is_empty, _NEG_INF)
        return cls(weights, value_weights, row_sum, value_factor, lse, is_floored)
