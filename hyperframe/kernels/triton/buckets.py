"""Hash buckets on a GPU: codes of all rounds, a counting sort, ranges, and the best keys there.

Codes: one program owns some rows and makes the products of all rounds; only codes are written.
Orders: histograms of chunks of rows, their running sums, then every row's place. The sums also say
between which places a position stands in its bucket, but for a few steps of bisection.
The best keys: a program owns 64 rows that stand side by side in the order of buckets. Ranges ascend
there, so it walks over a short run of sorted keys, and jumps where no row looks. A score of half
precision carries its lane in its last bits: one maximum then gives both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .arguments import is_wide
from .common import load_rows
from .configs import padded, power_of_two

__all__ = [
    "supports_codes",
    "supports_order",
    "supports_topk",
    "triton_bucket_codes",
    "triton_bucket_order",
    "triton_bucket_ranges",
    "triton_bucket_topk",
]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_BUCKETS = 512
_MOST_BYTES = 128 << 10  # of a rotation, in shared memory
_NOWHERE: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # behind all places


@triton.jit
def largest(
    product, column, FIRST: tl.constexpr, STOP: tl.constexpr, BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Return for each row which of the columns `[FIRST, STOP)` is the largest, with its sign.

    The first of the largest. `PACKED`: with column and sign in the last bits, one maximum finds it.
    """
    inside = ((column >= FIRST) & (column < STOP))[None, :]
    if PACKED:
        bits = product.to(tl.int32, bitcast=True)
        # the first column the largest; a negative number takes one away
        mark = (2 * BLOCK - 1 - 2 * (column - FIRST))[None, :] + (bits >> 31)
        mark = tl.where(inside, (bits & (0x7FFFFFFF & -2 * BLOCK)) | mark, -1)
        mark = 2 * BLOCK - 1 - (tl.max(mark, 1) & (2 * BLOCK - 1))
    else:
        size = tl.where(inside, tl.abs(product), -1.0)
        mark = 2 * (column - FIRST)[None, :] + (product < 0).to(tl.int32)
        mark = tl.where(size == tl.max(size, 1)[:, None], mark, 2 * (STOP - FIRST) - 1)
        mark = tl.min(mark, 1)
    return (mark >> 1) + (mark & 1) * (STOP - FIRST)


@triton.jit(do_not_specialize=["num_rows", "run", "num_runs", "rounds"])
def bucket_codes_kernel(
    x_ptr, x_batch, x_head, x_row, rotation_ptr, shift_ptr, code_ptr, heads_per_rotation,
    num_heads, num_rows, run, num_runs, rounds, D: tl.constexpr, HALF: tl.constexpr,
    SECOND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
    ONE_RUN: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the codes of a block of rows; all but `x` are contiguous. Grid: blocks, heads, batch.

    `ONE_RUN` says that all rows of a block share a shift. The last `SECOND` columns are a hash of
    their own.
    """
    start = tl.program_id(0) * BLOCK_N
    head, batch = tl.program_id(1), tl.program_id(2)
    flat_head = (batch * num_heads + head).to(tl.int64)
    flat_heads = tl.num_programs(2) * num_heads
    row = start + tl.arange(0, BLOCK_N)
    dim, column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H)
    x_ptr += batch.to(tl.int64) * x_batch + head.to(tl.int64) * x_head + start.to(tl.int64) * x_row
    x = tl.load(
        x_ptr + tl.arange(0, BLOCK_N)[:, None] * x_row + dim[None, :],
        mask=(row < num_rows)[:, None] & (dim < D)[None, :], other=0.0,
    )  # [N, D]  # fmt: skip
    rotation_ptr += (flat_head // heads_per_rotation) * (D * HALF)
    rotation_step = (flat_heads // heads_per_rotation).to(tl.int64) * (D * HALF)
    shift_ptr += flat_head * num_runs * HALF
    code_ptr += flat_head * num_rows
    for _ in range(rounds):
        rotation = tl.load(
            rotation_ptr + dim[:, None] * HALF + column[None, :],
            mask=(dim < D)[:, None] & (column < HALF)[None, :], other=0.0,
        )  # fmt: skip
        product = tl.dot(x, rotation, input_precision=PRECISION)  # [N, H]
        if ONE_RUN:
            at = shift_ptr + (start // run) * HALF + column
            product -= tl.load(at, mask=column < HALF, other=0.0)[None, :]
        else:
            number = tl.minimum(row // run, num_runs - 1)
            at = shift_ptr + number[:, None] * HALF + column[None, :]
            product -= tl.load(at, mask=(column < HALF)[None, :], other=0.0)
        code = largest(product, column, 0, HALF - SECOND, BLOCK_H, PACKED)
        if SECOND > 0:
            other = largest(product, column, HALF - SECOND, HALF, BLOCK_H, PACKED)
            code = code * (2 * SECOND) + other
        tl.store(code_ptr + row, code, mask=row < num_rows)
        rotation_ptr += rotation_step
        shift_ptr += flat_heads.to(tl.int64) * num_runs * HALF
        code_ptr += flat_heads.to(tl.int64) * num_rows


@triton.jit(do_not_specialize=["num_rows", "num_chunks", "buckets"])
def count_kernel(
    code_ptr, count_ptr, num_rows, num_chunks, buckets, BUCKETS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Write the histogram of a chunk into `[heads, chunks, buckets]`; grid: chunks, heads."""
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = chunk * CHUNK + tl.arange(0, CHUNK)
    code = tl.load(code_ptr + head * num_rows + row, mask=row < num_rows, other=BUCKETS - 1)
    count = tl.histogram(code, BUCKETS)
    bucket = tl.arange(0, BUCKETS)
    # slots without a row were counted in the last bucket
    empty = tl.maximum((chunk + 1) * CHUNK - num_rows, 0)
    count -= tl.where(bucket == BUCKETS - 1, empty, 0)
    count_ptr += (head * num_chunks + chunk) * buckets
    tl.store(count_ptr + bucket, count, mask=bucket < buckets)


@triton.jit(do_not_specialize=["num_chunks", "buckets"])
def running_kernel(count_ptr, num_chunks, buckets, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr):
    """Add up the histograms of chunks, in place; grid: blocks of buckets, heads."""
    bucket = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    count_ptr += tl.program_id(1).to(tl.int64) * num_chunks * buckets
    before = tl.zeros([BLOCK_B], tl.int32)
    for start in range(0, num_chunks, BLOCK_C):
        chunk = start + tl.arange(0, BLOCK_C)
        at = count_ptr + chunk[:, None] * buckets + bucket[None, :]
        inside = (chunk < num_chunks)[:, None] & (bucket < buckets)[None, :]
        count = tl.load(at, mask=inside, other=0)
        tl.store(at, tl.cumsum(count, 0) + before[None, :], mask=inside)
        before += tl.sum(count, 0)


@triton.jit(do_not_specialize=["num_rows", "num_chunks", "buckets"])
def place_kernel(
    code_ptr, bound_ptr, count_ptr, order_ptr, num_rows, num_chunks, buckets,
    BUCKETS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write every row of a chunk to its place; `count` is the running sum over chunks.

    Sorted in registers by bucket and row, the rows of a bucket stand side by side, as they will.
    """
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    bucket, slot = tl.arange(0, BUCKETS), tl.arange(0, CHUNK)
    is_bucket = bucket < buckets
    first = tl.load(bound_ptr + head * (buckets + 1) + bucket, mask=is_bucket, other=0)
    count_ptr += (head * num_chunks + chunk) * buckets + bucket
    earlier = tl.load(count_ptr - buckets, mask=is_bucket & (chunk > 0), other=0)
    own = tl.load(count_ptr, mask=is_bucket, other=0) - earlier
    # a bucket's first place for this chunk, less where it begins among the sorted rows
    first += earlier - (tl.cumsum(own, 0) - own)
    row = chunk * CHUNK + slot
    code = tl.load(code_ptr + head * num_rows + row, mask=row < num_rows, other=BUCKETS)
    packed = tl.sort(code * CHUNK + slot)
    code, row = packed // CHUNK, chunk * CHUNK + packed % CHUNK
    target = tl.gather(first, tl.minimum(code, BUCKETS - 1), axis=0) + slot
    tl.store(order_ptr + head * num_rows + target, row, mask=code < BUCKETS)


@triton.jit(do_not_specialize=["num_rows", "num_keys", "num_chunks", "reach", "buckets"])
def ranges_kernel(
    code_ptr, edge_ptr, bound_ptr, count_ptr, order_ptr, range_ptr, heads_per_key, num_rows,
    num_keys, num_chunks, buckets, reach, CHUNK: tl.constexpr, IS_CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the range of every row; grid: blocks, heads.

    Bisection among the keys of its bucket in the chunk of its edge: the chunks before are counted.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1).to(tl.int64)
    used = row < num_rows
    code = tl.load(code_ptr + head * num_rows + row, mask=used, other=0)
    edge = tl.load(edge_ptr + row, mask=used, other=0)
    key_head = head // heads_per_key
    bound_ptr += key_head * (buckets + 1)
    order_ptr += key_head * num_keys
    count_ptr += key_head * num_chunks * buckets
    first, last = tl.load(bound_ptr + code), tl.load(bound_ptr + code + 1)
    chunk = tl.minimum(edge // CHUNK, num_chunks - 1)
    at = count_ptr + chunk * buckets + code
    left = first + tl.load(at - buckets, mask=chunk > 0, other=0)
    right = first + tl.load(at)
    while tl.max(right - left, 0) > 0:
        middle = (left + right) // 2
        key = tl.load(order_ptr + tl.minimum(middle, num_keys - 1))
        goes_right = (middle < right) & (key < edge)
        is_open = left < right
        right = tl.where(is_open & (goes_right == 0), middle, right)
        left = tl.where(is_open & goes_right, middle + 1, left)
    if IS_CAUSAL:
        low, high = tl.maximum(first, left - reach), left
    else:
        low = tl.maximum(first, tl.minimum(left - reach // 2, last - reach))
        high = tl.minimum(low + reach, last)
    range_ptr += 2 * (head * num_rows + row)
    tl.store(range_ptr, low, mask=used)
    tl.store(range_ptr + 1, high, mask=used)


@triton.jit
def best_lane(logits, lane, LANES: tl.constexpr, PACKED: tl.constexpr):
    """Return the largest logit of each row and its lane, the first of several."""
    top = tl.max(logits, 1)
    if PACKED:
        at = LANES - 1 - (top.to(tl.int32, bitcast=True) & (LANES - 1))
    else:
        at = tl.min(tl.where(logits == top[:, None], lane[None, :], LANES), 1)
    return top, at


@triton.jit(do_not_specialize=["num_rows", "num_keys", "num_heads", "batches"])
def bucket_topk_kernel(
    q_ptr, q_batch, q_head, q_row, k_ptr, k_batch, k_head, k_row, q_order_ptr, k_order_ptr,
    range_ptr, index_ptr, score_ptr, heads_per_key, num_heads, batches, num_rows, num_keys, scale,
    D: tl.constexpr, KEEP: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDE_Q: tl.constexpr, WIDE_K: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module; orders and ranges are contiguous.

    Grid: blocks of rows, rounds, heads and batch: a head's rows stay in the cache for all rounds.
    `PACKED` scores are exact but for their last bits.
    """
    number, head = tl.program_id(1), tl.program_id(2) % num_heads
    batch = (tl.program_id(2) // num_heads).to(tl.int64)
    flat_head = (number * batches + batch) * num_heads + head
    slot = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane, dim = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    used = slot < num_rows
    row = tl.load(q_order_ptr + flat_head * num_rows + slot, mask=used, other=0)
    range_ptr += 2 * (flat_head * num_rows + row)
    low, high = tl.load(range_ptr), tl.load(range_ptr + 1)
    looks = used & (low < high)
    low, high = tl.where(looks, low, _NOWHERE), tl.where(looks, high, 0)
    q_ptr += batch * q_batch + head.to(tl.int64) * q_head
    k_ptr += batch * k_batch + (head // heads_per_key).to(tl.int64) * k_head
    k_order_ptr += flat_head // heads_per_key * num_keys
    q = load_rows(q_ptr, row[:, None], q_row, dim[None, :], q_ptr, 0, D, BLOCK_D, False, WIDE_Q)
    nothing = tl.full([BLOCK_M], float("-inf"), tl.float32)
    best, place_of = (nothing,), (tl.full([BLOCK_M], -1, tl.int32),)
    for _ in tl.static_range(KEEP - 1):
        best += (nothing,)  # type: ignore[assignment]
        place_of += (tl.full([BLOCK_M], -1, tl.int32),)  # type: ignore[assignment]
    start, stop = tl.min(low, 0), tl.max(high, 0)
    # unsigned, so that one comparison tests both ends
    span = tl.where(looks, high - low, 0).to(tl.uint32)
    while start < stop:
        place = start + lane
        key = tl.load(k_order_ptr + tl.minimum(place, num_keys - 1))
        k = load_rows(k_ptr, key[:, None], k_row, dim[None, :], k_ptr, 0, D, BLOCK_D, False, WIDE_K)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if PACKED:
            # the lane in the last bits, the first lane the largest
            bits = logits.to(tl.int32, bitcast=True) & -BLOCK_N
            logits = (bits | (BLOCK_N - 1 - lane)[None, :]).to(tl.float32, bitcast=True)
        inside = (place[None, :] - low[:, None]).to(tl.uint32) < span[:, None]
        logits = tl.where(inside, logits, float("-inf"))
        for kept in tl.static_range(KEEP):
            top, at = best_lane(logits, lane, BLOCK_N, PACKED)
            if kept < KEEP - 1:
                if PACKED:
                    is_it = logits == top[:, None]
                else:
                    is_it = lane[None, :] == at[:, None]
                logits = tl.where(is_it, float("-inf"), logits)
            at += start
            # into a sorted list: what it displaces moves on
            scores, places = (), ()
            for other in tl.static_range(KEEP):
                is_better = top > best[other]
                scores += (tl.where(is_better, top, best[other]),)  # type: ignore[assignment]
                places += (tl.where(is_better, at, place_of[other]),)  # type: ignore[assignment]
                later = tl.where(is_better, best[other], top)
                at = tl.where(is_better, place_of[other], at)
                top = later
            best, place_of = scores, places  # type: ignore[assignment]
        # the next place at which some row looks
        later_start = start + BLOCK_N
        start = tl.min(tl.where(high > later_start, tl.maximum(low, later_start), _NOWHERE), 0)
    target = ((batch * num_heads + head) * num_rows + row) * (ROUNDS * KEEP) + number * KEEP
    if KEEP == 2:
        # side by side, so that a row is written at once
        place, top = tl.join(place_of[0], place_of[1]), tl.join(best[0], best[1])  # type: ignore[misc]
        is_one = used[:, None] & (top > float("-inf"))
        key = tl.load(k_order_ptr + tl.where(is_one, place, 0))
        at = target[:, None] + tl.arange(0, 2)[None, :]
        tl.store(index_ptr + at, tl.where(is_one, key, -1), mask=used[:, None])
        tl.store(score_ptr + at, top, mask=used[:, None])
    else:
        for kept in tl.static_range(KEEP):
            is_one = used & (best[kept] > float("-inf"))
            key = tl.load(k_order_ptr + tl.where(is_one, place_of[kept], 0))
            tl.store(index_ptr + target + kept, tl.where(is_one, key, -1), mask=used)
            tl.store(score_ptr + target + kept, best[kept], mask=used)


def _rotation_bytes(x: torch.Tensor, rotation: torch.Tensor) -> int:
    return padded(x.shape[-1]) * padded(rotation.shape[-1]) * x.element_size()


def supports_codes(x: torch.Tensor, rotation: torch.Tensor) -> bool:
    """Whether the kernel takes these: at most 512 buckets, and 128 KiB of a padded rotation."""
    return (
        x.dtype in _DTYPES
        and rotation.dtype == torch.float32
        and x.shape[-1] <= 256
        and 2 * rotation.shape[-1] <= _MOST_BUCKETS
        and _rotation_bytes(x, rotation) <= _MOST_BYTES
        and max(x.shape[0], x.shape[1]) <= 65535
        and x.numel() > 0
    )


def supports_order(code: torch.Tensor, buckets: int) -> bool:
    """Whether the kernels take these: at most 512 buckets."""
    heads = code.numel() // max(1, code.shape[-1])
    return buckets <= _MOST_BUCKETS and 0 < heads <= 65535


def supports_topk(
    query: torch.Tensor, key: torch.Tensor, ranges: torch.Tensor, keep: int
) -> bool:  # fmt: skip
    """Whether the kernel takes these: heads of up to 256, at most 8 keys of a row and round."""
    return (
        key.dtype in _DTYPES
        and query.dtype == key.dtype
        and key.shape[-1] <= 256
        and keep <= 8
        and ranges.shape[1] * ranges.shape[2] <= 65535
        and ranges.shape[0] <= 65535
        and ranges.numel() > 0
        and key.numel() > 0
    )


def triton_bucket_codes(
    x: torch.Tensor, rotation: torch.Tensor, shift: torch.Tensor, run: int, second: int = 0
) -> torch.Tensor:
    """Do what `hyperframe.kernels.buckets.bucket_codes` says, where `supports_codes` holds."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    # it was rounded to this dtype
    rotation, shift = rotation.to(x.dtype).contiguous(), shift.contiguous()
    batch, heads, num_rows, dim = x.shape
    rounds, half = rotation.shape[0], rotation.shape[-1]
    code = torch.empty((rounds, batch, heads, num_rows), dtype=torch.int32, device=x.device)
    width, columns = padded(dim), padded(half)
    rows = 32 if max(width, columns) > 128 or x.element_size() == 4 else 64
    bucket_codes_kernel[(triton.cdiv(num_rows, rows), heads, batch)](
        x, *x.stride()[:3], rotation, shift, code, heads // rotation.shape[2], heads, num_rows,
        run, shift.shape[3], rounds, D=dim, HALF=half, SECOND=second, BLOCK_N=rows, BLOCK_D=width,
        BLOCK_H=columns, ONE_RUN=run % rows == 0 or shift.shape[3] == 1,
        PACKED=x.element_size() == 2, PRECISION="ieee",
        num_warps=4 if x.element_size() == 2 else 8,
        num_stages=2 if _rotation_bytes(x, rotation) <= _MOST_BYTES // 4 else 1,
    )  # fmt: skip
    return code


def triton_bucket_order(
    code: torch.Tensor, buckets: int, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what `hyperframe.kernels.buckets.bucket_order` says, where `supports_order` holds."""
    flat = code.contiguous().view(-1, code.shape[-1])
    heads, num_rows = flat.shape
    chunks, most = triton.cdiv(num_rows, chunk), max(32, power_of_two(buckets))
    count = torch.empty((heads, chunks, buckets), dtype=torch.int32, device=code.device)
    sizes = (num_rows, chunks, buckets)
    count_kernel[(chunks, heads)](flat, count, *sizes, BUCKETS=most, CHUNK=chunk, num_warps=4)
    running_kernel[(triton.cdiv(buckets, 32), heads)](
        count, chunks, buckets, BLOCK_C=64, BLOCK_B=32, num_warps=4
    )
    total = count[:, -1].cumsum(dim=-1, dtype=torch.int32)
    bounds = torch.nn.functional.pad(total, (1, 0))
    order = torch.empty_like(flat)
    place_kernel[(chunks, heads)](
        flat, bounds, count, order, *sizes, BUCKETS=most, CHUNK=chunk, num_warps=1
    )
    leading = code.shape[:-1]
    return (
        order.view(code.shape),
        bounds.view(*leading, buckets + 1),
        count.view(*leading, chunks, buckets),
    )


def triton_bucket_ranges(
    code: torch.Tensor, edge: torch.Tensor, bounds: torch.Tensor, counts: torch.Tensor,
    key_order: torch.Tensor, chunk: int, reach: int, is_causal: bool,
) -> torch.Tensor:  # fmt: skip
    """Do what `hyperframe.kernels.buckets.bucket_ranges` says."""
    code, bounds, counts, key_order = (x.contiguous() for x in (code, bounds, counts, key_order))
    ranges = torch.empty((*code.shape, 2), dtype=torch.int32, device=code.device)
    num_rows, num_keys = code.shape[-1], key_order.shape[-1]
    heads = code.shape[0] * code.shape[1] * code.shape[2]
    ranges_kernel[(triton.cdiv(num_rows, 256), heads)](
        code, edge.contiguous(), bounds, counts, key_order, ranges,
        code.shape[2] // bounds.shape[2], num_rows, num_keys, counts.shape[-2],
        bounds.shape[-1] - 1, reach, CHUNK=chunk, IS_CAUSAL=is_causal, BLOCK_N=256, num_warps=4,
    )  # fmt: skip
    return ranges


def triton_bucket_topk(
    query: torch.Tensor, query_order: torch.Tensor, key: torch.Tensor, key_order: torch.Tensor,
    ranges: torch.Tensor, keep: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `hyperframe.kernels.buckets.bucket_topk` says, where `supports_topk` holds."""
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    orders = (x.contiguous() for x in (query_order, key_order, ranges))
    batch, heads, num_rows, dim = query.shape
    rounds, width = ranges.shape[0], padded(dim)
    shape = (batch, heads, num_rows, rounds * keep)
    index = torch.empty(shape, dtype=torch.int32, device=key.device)
    score = torch.empty(shape, dtype=torch.float32, device=key.device)
    is_half = key.element_size() == 2
    rows = 64 if is_half and width <= 128 else 32
    bucket_topk_kernel[(triton.cdiv(num_rows, rows), rounds, batch * heads)](
        query, *query.stride()[:3], key, *key.stride()[:3], *orders, index, score,
        heads // key.shape[1], heads, batch, num_rows, key.shape[2], scale, D=dim, KEEP=keep,
        ROUNDS=rounds, BLOCK_M=rows, BLOCK_N=rows,
        BLOCK_D=width, WIDE_Q=is_wide(query), WIDE_K=is_wide(key), PACKED=is_half,
        PRECISION="ieee", num_warps=4 if is_half else 8,
        # five programs on a multiprocessor: loads by address wait for one another
        maxnreg=96 if is_half and width <= 64 and keep <= 2 else None,
    )  # fmt: skip
    return index, score
