"""The gradient of keys and values that the tiles of a rectangle share as samples.

One program owns `BLOCK_N` samples of a rectangle and walks over the rows of some of its tiles,
`BLOCK_M` at a time, with scores transposed so that `dV = P^T dO` and `dK = dS^T Q` accumulate in
registers; it stores the sums as a part of its own. A second kernel adds the parts of a sample, in
their order, to its key. So there are no atomics, and every run gives the same bits.

Samples of several plans, those of the levels of the recursion, go in one launch: together they fill
a GPU with few parts for each rectangle, and parts cost memory traffic. What differs from plan to
plan comes as a tuple.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...tables import int_table, kept
from .arguments import ListSource, PlanView, alike, number_of_tiles, strides_of
from .common import LOG2_E, existing_row, load_once, load_places, load_rows, nearest
from .configs import Config, choose, launch, padded
from .lists import of_plan

__all__ = ["add_sample_gradients"]

_PROGRAMS = 2048  # enough to fill a GPU
_LONGEST_PART = 24  # tiles; the last programs should not keep a GPU waiting for long


@triton.jit(do_not_specialize=["num_parts", "num_slots", "num_keys", "place_tile", "tile_slots"])
def sample_gradients_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, part_k_ptr, part_v_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    g_batch, g_head, g_row, place_rows, place_lses, place_deltas, place_tile, tile_slots, tables,
    samples, sample_batch, sample_head, sample_rectangle, ranks, rank_batch, rank_head,
    weights, weight_batch, weight_head, weight_rectangle, weight_slot, tiles_ptr, num_tiles,
    parts_ptr, num_parts, num_slots, num_keys, query_heads, heads_per_key, scale,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, THREADS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, PLANS: tl.constexpr,
):  # fmt: skip
    """Write parts of `dK` and `dV`: float32 `[batch, query_heads, parts, slots, d]`.

    A row of `parts` is: plan, first tile, one past the last tile, rectangle. `tiles` says how many
    tiles each of several plans has. Places are those of `places_kernel`.
    """
    blocks = tl.cdiv(tile_slots, BLOCK_M)
    slot_blocks = tl.cdiv(num_slots, BLOCK_N)
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK_M)
    slot = program % slot_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    part = program // slot_blocks % num_parts
    head = program // (slot_blocks * num_parts) % query_heads
    batch = (program // (slot_blocks * num_parts) // query_heads).to(tl.int64)
    key_head = (head // heads_per_key).to(tl.int64)
    plan = tl.load(parts_ptr + part * 4)
    first_tile = tl.load(parts_ptr + part * 4 + 1)
    last_tile = tl.load(parts_ptr + part * 4 + 2)
    rectangle = tl.load(parts_ptr + part * 4 + 3).to(tl.int64)
    if PLANS > 1:
        num_tiles = tl.load(tiles_ptr + plan)

    # ---- the samples
    sample_ptr, rank_ptr = of_plan(samples, plan, PLANS), of_plan(ranks, plan, PLANS)
    weight_ptr, table_ptr = of_plan(weights, plan, PLANS), of_plan(tables, plan, PLANS)
    sample_ptr += batch * sample_batch + key_head * sample_head + rectangle * sample_rectangle
    rank_ptr += batch * rank_batch + key_head * rank_head
    weight_ptr += batch * weight_batch + key_head * weight_head + rectangle * weight_rectangle
    used = slot < num_slots
    # slots that are not used hold the first sample, and weigh nothing
    key = tl.load(sample_ptr + tl.where(used, slot, 0))
    key = nearest(key, num_keys)
    rank = tl.load(rank_ptr + key)
    weight = tl.load(weight_ptr + slot * weight_slot, mask=used, other=float("-inf"))
    bias = weight.to(tl.float32) * LOG2_E
    dim = tl.arange(0, BLOCK_D)
    dim_v = tl.arange(0, BLOCK_DV)
    k_ptr += batch * k_batch + key_head * k_head
    v_ptr += batch * v_batch + key_head * v_head
    k = load_rows(k_ptr, key[:, None], k_row, dim[None, :], k_ptr, 0, D, BLOCK_D, False, WIDE)
    v = load_rows(v_ptr, key[:, None], v_row, dim_v[None, :], v_ptr, 0, D_V, BLOCK_DV, False, WIDE)

    # ---- the rows
    q_ptr += batch * q_batch
    grad_out_ptr += batch * g_batch
    first_place = (batch * query_heads + head) * num_tiles * place_tile
    row_ptr = of_plan(place_rows, plan, PLANS) + first_place
    lse_ptr = of_plan(place_lses, plan, PLANS) + first_place
    delta_ptr = of_plan(place_deltas, plan, PLANS) + first_place
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    factor = scale * LOG2_E
    all_of_it = lane >= 0
    first_block, last_block = first_tile * blocks, last_tile * blocks
    place = first_tile.to(tl.int64) * place_tile + lane
    next_row = tl.load(row_ptr + place)
    next_lse = load_once(lse_ptr + place, all_of_it, 0.0, BLOCK_M, THREADS)
    next_delta = load_once(delta_ptr + place, all_of_it, 0.0, BLOCK_M, THREADS)
    for block in range(first_block, last_block):
        row, lse, delta = next_row, next_lse, next_delta
        later = tl.minimum(block + 1, last_block - 1)
        place = (later // blocks).to(tl.int64) * place_tile + later % blocks * BLOCK_M + lane
        next_row = tl.load(row_ptr + place)
        next_lse = load_once(lse_ptr + place, all_of_it, 0.0, BLOCK_M, THREADS)
        next_delta = load_once(delta_ptr + place, all_of_it, 0.0, BLOCK_M, THREADS)
        row = existing_row(row)  # places without a row weigh nothing
        q = load_places(q_ptr, row, head, lane, q_head, q_row, dim, D, BLOCK_D, 1, WIDE)
        grad_out = load_places(
            grad_out_ptr, row, head, lane, g_head, g_row, dim_v, D_V, BLOCK_DV, 1, WIDE
        )
        # the tile of these rows holds some of the samples exactly
        tile_ptr = table_ptr + block // blocks * 5
        is_held = (rank >= tl.load(tile_ptr + 2)) & (rank < tl.load(tile_ptr + 3))
        block_bias = tl.where(is_held, float("-inf"), bias)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor
        shares = tl.exp2(logits + (block_bias[:, None] - lse[None, :]))
        dv = tl.dot(shares.to(grad_out.dtype), grad_out, dv, input_precision=PRECISION)
        by_key = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        grad_logits = shares * (by_key - delta[None, :])
        dk = tl.dot(grad_logits.to(q.dtype), q, dk, input_precision=PRECISION)

    dk *= scale
    # slots that are not used may hold NaN times 0
    dk = tl.where(used[:, None], dk, 0.0)
    dv = tl.where(used[:, None], dv, 0.0)
    target = (program // slot_blocks).to(tl.int64) * num_slots + slot
    tl.store(
        part_k_ptr + target[:, None] * D + dim[None, :], dk,
        mask=used[:, None] & (dim < D)[None, :],
    )  # fmt: skip
    tl.store(
        part_v_ptr + target[:, None] * D_V + dim_v[None, :], dv,
        mask=used[:, None] & (dim_v < D_V)[None, :],
    )  # fmt: skip


@triton.jit
def parts_of_slots(
    part_ptr, first, count, heads, head_parts, num_slots, slot, used, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return the sum of some slots over parts and over the heads that share a key head."""
    dim = tl.arange(0, BLOCK_D)
    inside = used[:, None] & (dim < D)[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for number in range(heads * count):
        part = (number // count).to(tl.int64) * head_parts + first + number % count
        cell = (part * num_slots + slot)[:, None] * D + dim[None, :]
        total += tl.load(part_ptr + cell, mask=inside, other=0.0)
    return total


@triton.jit
def next_of_key(index_ptr, key, slot, num_slots, BLOCK_N: tl.constexpr):
    """Return the next slot of the same key, `num_slots` for none, and how many come before."""
    following = tl.zeros([BLOCK_N], tl.int32) + num_slots
    before = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, num_slots, 64):
        other = start + tl.arange(0, 64)
        other_key = tl.load(index_ptr + other, mask=other < num_slots, other=-2)
        same = key[:, None] == other_key[None, :]
        is_later = same & (other[None, :] > slot[:, None])
        later = tl.min(tl.where(is_later, other[None, :], num_slots), 1)
        following = tl.minimum(following, later)
        before += tl.sum((same & (other[None, :] < slot[:, None])).to(tl.int32), 1)
    return following, before


@triton.jit
def add_to_keys(
    total, key, stored, flat_head, num_keys, out_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Add rows to those of some keys of a head."""
    dim = tl.arange(0, BLOCK_D)
    inside = stored[:, None] & (dim < D)[None, :]
    targets = out_ptr + (flat_head * num_keys + key)[:, None] * D + dim[None, :]
    total += tl.load(targets, mask=inside, other=0.0).to(tl.float32)
    tl.store(targets, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rectangles", "num_parts", "num_keys", "num_slots"])
def add_samples_kernel(
    index_ptr, index_batch, index_head, index_tile, part_k_ptr, part_v_ptr, dk_ptr, dv_ptr,
    bounds_ptr, key_heads, heads_per_key, rectangles, num_parts, num_keys, num_slots,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the gradients of sampled slots to their keys; several slots may name one key.

    Grid: blocks of slots of all rectangles. `bounds` is int32 `[rectangles, 2]`, the parts of each;
    `dk` and `dv` are contiguous `[batch, key_heads, n_k, d]`. The first slot of a key adds for all
    of them, in their order.
    """
    slot_blocks = tl.cdiv(num_slots, BLOCK_N)
    program = tl.program_id(0)
    slot = program % slot_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    rectangle = program // slot_blocks % rectangles
    flat_head = (program // slot_blocks // rectangles).to(tl.int64)
    index_ptr += flat_head // key_heads * index_batch + flat_head % key_heads * index_head
    index_ptr += rectangle.to(tl.int64) * index_tile
    first = tl.load(bounds_ptr + rectangle * 2)
    count = tl.load(bounds_ptr + rectangle * 2 + 1) - first
    first_slot = flat_head * heads_per_key * num_parts * num_slots
    part_k_ptr += first_slot * D
    part_v_ptr += first_slot * D_V
    used = slot < num_slots
    key = tl.load(index_ptr + slot, mask=used, other=-1)
    following, before = next_of_key(index_ptr, key, slot, num_slots, BLOCK_N)
    used = used & (key >= 0) & (key < num_keys) & (before == 0)
    dk = parts_of_slots(
        part_k_ptr, first, count, heads_per_key, num_parts, num_slots, slot, used, D, BLOCK_D,
        BLOCK_N,
    )  # fmt: skip
    dv = parts_of_slots(
        part_v_ptr, first, count, heads_per_key, num_parts, num_slots, slot, used, D_V, BLOCK_DV,
        BLOCK_N,
    )  # fmt: skip
    # few keys are named twice, and hardly any more often
    following = tl.where(used, following, num_slots)
    while tl.min(following, 0) < num_slots:
        there = following < num_slots
        dk += parts_of_slots(
            part_k_ptr, first, count, heads_per_key, num_parts, num_slots, following, there, D,
            BLOCK_D, BLOCK_N,
        )  # fmt: skip
        dv += parts_of_slots(
            part_v_ptr, first, count, heads_per_key, num_parts, num_slots, following, there, D_V,
            BLOCK_DV, BLOCK_N,
        )  # fmt: skip
        following, _ = next_of_key(index_ptr, key, following, num_slots, BLOCK_N)
    add_to_keys(dk, key, used, flat_head, num_keys, dk_ptr, D, BLOCK_D)
    add_to_keys(dv, key, used, flat_head, num_keys, dv_ptr, D_V, BLOCK_DV)


class _Parts(NamedTuple):
    """How the tiles of some plans are shared out.

    Attributes:
        table: int32 `[parts, 4]`: plan, first tile, one past the last tile, rectangle.
        bounds: for every plan, int32 `[rectangles, 2]`: its first part, one past its last part.
    """

    table: torch.Tensor
    bounds: tuple[torch.Tensor, ...]


@kept
def _parts(tile_counts: tuple[tuple[int, ...], ...], programs: int, device: torch.device) -> _Parts:
    """Cut the tiles of every rectangle into parts; `programs` run for each of them.

    Args:
        tile_counts: for every plan, the tiles of its rectangles.
        programs: heads and blocks of slots.
        device: where the tables go.
    """
    tiles = sum(map(sum, tile_counts))
    each = max(1, min(_LONGEST_PART, -(-tiles * programs // _PROGRAMS)))
    rows: list[tuple[int, int, int, int]] = []
    bounds: list[list[tuple[int, int]]] = [[] for _ in tile_counts]
    # the largest rectangles come last, and their long parts should start first
    for plan in reversed(range(len(tile_counts))):
        before = 0
        for rectangle, count in enumerate(tile_counts[plan]):
            pieces = max(1, min(count, round(count / each)))
            edges = [before + piece * count // pieces for piece in range(pieces + 1)]
            bounds[plan].append((len(rows), len(rows) + pieces))
            rows += [(plan, first, last, rectangle) for first, last in itertools.pairwise(edges)]
            before += count
    return _Parts(int_table(rows, 4, device), tuple(int_table(b, 2, device) for b in bounds))


def add_sample_gradients(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, views: Sequence[PlanView],
    given_of: Sequence[dict[str, Any]], dk: torch.Tensor, dv: torch.Tensor,
) -> None:  # fmt: skip
    """Add what the samples of block plans contribute to the gradients of keys and values.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        value: `[batch, key_heads, n_k, d_v]`.
        views: the plans; those without samples or tiles add nothing.
        given_of: for every view, the arguments of the kernels of the backward.
        dk: contiguous, in the shape of `key`.
        dv: contiguous, in the shape of `value`.
    """
    chosen = [
        (view, given, view.source)
        for view, given in zip(views, given_of, strict=True)
        if view.source is not None and view.num_tiles and view.source.plan.num_samples
    ]
    forms = [
        {**source.shared, "place_tile": given["place_tile"], "dtype": _dtype(source.weight)}
        for _, given, source in chosen
    ]
    for numbers in alike(forms):
        _add_together(query, key, value, [chosen[number] for number in numbers], dk, dv)


def _dtype(tensor: torch.Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _add_together(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    chosen: Sequence[tuple[PlanView, dict[str, Any], ListSource]], dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:  # fmt: skip
    """Add the gradients of the samples of plans of one form."""
    views, given_of, sources = zip(*chosen, strict=True)
    plans = [source.plan for source in sources]
    batch, heads, num_slots = query.shape[0], query.shape[1], plans[0].num_samples
    parts = _parts(
        tuple(plan.tile_counts for plan in plans), batch * heads * -(-num_slots // 64),
        query.device,
    )  # fmt: skip
    num_parts = parts.table.shape[0]
    shape = (batch, heads, num_parts, num_slots)
    part_k, part_v = (torch.empty((*shape, x.shape[-1]), device=x.device) for x in (key, value))
    sizes, tiles = number_of_tiles(plans, query)
    every = {
        **given_of[0], **sources[0].shared, "part_k_ptr": part_k, "part_v_ptr": part_v,
        "place_rows": tuple(given["place_row_ptr"] for given in given_of),
        "place_lses": tuple(given["place_lse_ptr"] for given in given_of),
        "place_deltas": tuple(given["place_delta_ptr"] for given in given_of),
        "tables": tuple(plan.tiles for plan in plans),
        "samples": tuple(source.sample for source in sources),
        "ranks": tuple(source.rank for source in sources),
        "weights": tuple(source.weight for source in sources),
        "tile_slots": max(view.tile_slots for view in views), "tiles_ptr": sizes,
        "num_tiles": tiles, "parts_ptr": parts.table, "num_parts": num_parts,
        "num_slots": num_slots, "PLANS": len(plans),
    }  # fmt: skip

    def arguments(config: Config) -> dict[str, Any]:
        named = {**every, **config.blocks()}
        return {name: named[name] for name in sample_gradients_kernel.arg_names}

    launch(
        sample_gradients_kernel,
        ("sampled", query.dtype, query.shape[-1], value.shape[-1], query.device.index),
        choose("sampled", query, value, every["tile_slots"], num_slots, is_plain=True),
        lambda config: (-(-num_slots // config.block_n) * num_parts * batch * heads,), arguments,
    )  # fmt: skip
    for source, bounds in zip(sources, parts.bounds, strict=True):
        _add_parts(source, bounds, part_k, part_v, dk, dv)


def _add_parts(
    source: ListSource, bounds: torch.Tensor, part_k: torch.Tensor, part_v: torch.Tensor,
    dk: torch.Tensor, dv: torch.Tensor,
) -> None:  # fmt: skip
    """Add the parts of a plan's samples to their keys."""
    batch, heads, num_parts, num_slots = part_k.shape[:4]
    key_heads, num_keys = dk.shape[1:3]
    width, width_v = dk.shape[-1], dv.shape[-1]
    block = 32 if max(width, width_v) <= 64 else 16  # registers
    rectangles = bounds.shape[0]
    sample = source.sample
    assert sample is not None
    # rectangles that share a sampled key take turns: each adds to what the others have written
    step = rectangles if source.plan.samples_are_own else 1
    for first in range(0, rectangles, step):
        now = sample[:, :, first : first + step]
        programs = batch * key_heads * step * -(-num_slots // block)
        add_samples_kernel[(programs,)](
            index_ptr=now, **strides_of(now, ("index_batch", "index_head", "index_tile")),
            part_k_ptr=part_k, part_v_ptr=part_v, dk_ptr=dk, dv_ptr=dv,
            bounds_ptr=bounds[first : first + step], key_heads=key_heads,
            heads_per_key=heads // key_heads, rectangles=step, num_parts=num_parts,
            num_keys=num_keys, num_slots=num_slots, D=width, D_V=width_v, BLOCK_D=padded(width),
            BLOCK_DV=padded(width_v), BLOCK_N=block,
        )  # fmt: skip
