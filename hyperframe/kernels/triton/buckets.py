"""Hash buckets on a GPU: codes of all rounds, a counting sort, ranges, and the best keys there.

Codes: one program owns some rows and makes the products of all rounds; only codes are written.
Orders: histograms of chunks of rows, their running sum, then every row's place.
The best keys: a program owns 64 rows that stand side by side in the order of buckets. Ranges ascend
there, so it walks over a short run of sorted keys, and jumps where no row looks.
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
_CHUNK = 512  # rows of a histogram
_NOWHERE: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # behind all places


@triton.jit(do_not_specialize=["num_rows", "run", "num_runs", "rounds"])
def bucket_codes_kernel(
    x_ptr, x_batch, x_head, x_row, rotation_ptr, shift_ptr, code_ptr, heads_per_rotation,
    num_heads, num_rows, run, num_runs, rounds, D: tl.constexpr, HALF: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, ONE_RUN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the codes of a block of rows; all but `x` are contiguous. Grid: blocks, heads, batch.

    `ONE_RUN` says that all rows of a block share a shift.
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
        size = tl.where((column < HALF)[None, :], tl.abs(product), -1.0)
        # the first of the largest columns, and its sign: cheaper than argmax and a second look
        mark = 2 * column[None, :] + (product < 0).to(tl.int32)
        mark = tl.where(size == tl.max(size, 1)[:, None], mark, 2 * HALF - 1)
        mark = tl.min(mark, 1)
        code = (mark >> 1) + (mark & 1) * HALF
        tl.store(code_ptr + row, code, mask=row < num_rows)
        rotation_ptr += rotation_step
        shift_ptr += flat_heads.to(tl.int64) * num_runs * HALF
        code_ptr += flat_heads.to(tl.int64) * num_rows


@triton.jit(do_not_specialize=["num_rows", "num_chunks", "buckets"])
def count_kernel(
    code_ptr, count_ptr, num_rows, num_chunks, buckets, BUCKETS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Write the histogram of a chunk into `[heads, buckets, chunks]`; grid: chunks, heads."""
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = chunk * CHUNK + tl.arange(0, CHUNK)
    code = tl.load(code_ptr + head * num_rows + row, mask=row < num_rows, other=BUCKETS - 1)
    count = tl.histogram(code, BUCKETS)
    bucket = tl.arange(0, BUCKETS)
    # slots without a row were counted in the last bucket
    empty = tl.maximum((chunk + 1) * CHUNK - num_rows, 0)
    count -= tl.where(bucket == BUCKETS - 1, empty, 0)
    count_ptr += head * buckets * num_chunks + chunk
    tl.store(count_ptr + bucket * num_chunks, count, mask=bucket < buckets)


@triton.jit(do_not_specialize=["num_rows", "num_chunks", "buckets"])
def place_kernel(
    code_ptr, stop_ptr, count_ptr, order_ptr, num_rows, num_chunks, buckets, BUCKETS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write every row of a chunk to its place; `stop` is the running sum of `count`."""
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    bucket, slot = tl.arange(0, BUCKETS), tl.arange(0, BLOCK_N)
    at = head * buckets * num_chunks + chunk + bucket * num_chunks
    place = tl.load(stop_ptr + at, mask=bucket < buckets, other=0)
    place -= tl.load(count_ptr + at, mask=bucket < buckets, other=0)
    code_ptr += head * num_rows
    order_ptr += head * num_rows
    stop = tl.minimum((chunk + 1) * CHUNK, num_rows)
    for start in range(chunk * CHUNK, stop, BLOCK_N):
        row = start + slot
        code = tl.load(code_ptr + row, mask=row < stop, other=BUCKETS - 1)
        is_before = (code[None, :] == code[:, None]) & (slot[None, :] < slot[:, None])
        target = tl.gather(place, code, axis=0) + tl.sum(is_before.to(tl.int32), 1)
        tl.store(order_ptr + target, row, mask=row < stop)
        place += tl.histogram(code, BUCKETS)


@triton.jit(do_not_specialize=["num_rows", "num_keys", "reach", "steps", "buckets"])
def ranges_kernel(
    code_ptr, edge_ptr, bound_ptr, order_ptr, low_ptr, high_ptr, heads_per_key, num_rows, num_keys,
    buckets, reach, steps, IS_CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the range of every row, by bisection inside of its bucket; grid: blocks, heads."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1).to(tl.int64)
    used = row < num_rows
    code = tl.load(code_ptr + head * num_rows + row, mask=used, other=0)
    edge = tl.load(edge_ptr + row, mask=used, other=0)
    bound_ptr += head // heads_per_key * (buckets + 1)
    order_ptr += head // heads_per_key * num_keys
    first, last = tl.load(bound_ptr + code), tl.load(bound_ptr + code + 1)
    left, right = first, last
    for _ in range(steps):
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
    tl.store(low_ptr + head * num_rows + row, low, mask=used)
    tl.store(high_ptr + head * num_rows + row, high, mask=used)


@triton.jit(do_not_specialize=["num_rows", "num_keys", "batches"])
def bucket_topk_kernel(
    q_ptr, q_batch, q_head, q_row, k_ptr, k_batch, k_head, k_row, q_order_ptr, k_order_ptr, low_ptr,
    high_ptr, index_ptr, score_ptr, heads_per_key, num_heads, batches, num_rows, num_keys, scale,
    D: tl.constexpr, KEEP: tl.constexpr, BLOCK_K: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDE_Q: tl.constexpr,
    WIDE_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module; orders and ranges are contiguous.

    Grid: blocks of rows, heads, rounds and batch.
    """
    head, number = tl.program_id(1), tl.program_id(2) // batches
    batch = (tl.program_id(2) % batches).to(tl.int64)
    flat_head = tl.program_id(2).to(tl.int64) * num_heads + head
    slot = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane, dim = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_K)
    used = slot < num_rows
    row = tl.load(q_order_ptr + flat_head * num_rows + slot, mask=used, other=0)
    low = tl.load(low_ptr + flat_head * num_rows + row)
    high = tl.load(high_ptr + flat_head * num_rows + row)
    looks = used & (low < high)
    low, high = tl.where(looks, low, _NOWHERE), tl.where(looks, high, 0)
    q_ptr += batch * q_batch + head.to(tl.int64) * q_head
    k_ptr += batch * k_batch + (head // heads_per_key).to(tl.int64) * k_head
    k_order_ptr += flat_head // heads_per_key * num_keys
    q = load_rows(q_ptr, row[:, None], q_row, dim[None, :], q_ptr, 0, D, BLOCK_D, False, WIDE_Q)
    # columns behind those that are kept are never the worst
    best = tl.where((column < KEEP)[None, :] & used[:, None], float("-inf"), float("inf"))
    place_of = tl.full([BLOCK_M, BLOCK_K], -1, tl.int32)
    start, stop = tl.min(low, 0), tl.max(high, 0)
    # unsigned, so that one comparison tests both ends
    span = tl.where(looks, high - low, 0).to(tl.uint32)
    while start < stop:
        place = start + lane
        key = tl.load(k_order_ptr + tl.minimum(place, num_keys - 1))
        k = load_rows(k_ptr, key[:, None], k_row, dim[None, :], k_ptr, 0, D, BLOCK_D, False, WIDE_K)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        inside = (place[None, :] - low[:, None]).to(tl.uint32) < span[:, None]
        logits = tl.where(inside, logits, float("-inf"))
        for _ in tl.static_range(KEEP):
            top = tl.max(logits, 1)
            at = tl.min(tl.where(logits == top[:, None], lane[None, :], BLOCK_N), 1)
            worst, worst_column = tl.min(best, 1, return_indices=True)
            taken = (top > worst)[:, None] & (column[None, :] == worst_column[:, None])
            best = tl.where(taken, top[:, None], best)
            place_of = tl.where(taken, (start + at)[:, None], place_of)
            logits = tl.where(lane[None, :] == at[:, None], float("-inf"), logits)
        # the next place at which some row looks
        later = start + BLOCK_N
        start = tl.min(tl.where(high > later, tl.maximum(low, later), _NOWHERE), 0)
    best = tl.where((column < KEEP)[None, :], best, float("-inf"))
    target = ((batch * num_heads + head) * num_rows + row) * (ROUNDS * KEEP) + number * KEEP
    for kept in tl.static_range(KEEP):
        top, at = tl.max(best, 1, return_indices=True)
        is_it = column[None, :] == at[:, None]
        place = tl.sum(tl.where(is_it, place_of, 0), 1)
        is_one = used & (top > float("-inf"))
        key = tl.load(k_order_ptr + tl.where(is_one, place, 0))
        tl.store(index_ptr + target + kept, tl.where(is_one, key, -1), mask=used)
        tl.store(score_ptr + target + kept, top, mask=used)
        best = tl.where(is_it, float("-inf"), best)


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


def supports_topk(query: torch.Tensor, key: torch.Tensor, low: torch.Tensor, keep: int) -> bool:
    """Whether the kernel takes these: heads of up to 256, at most 8 keys of a row and round."""
    return (
        key.dtype in _DTYPES
        and query.dtype == key.dtype
        and key.shape[-1] <= 256
        and keep <= 8
        and low.shape[0] * low.shape[1] <= 65535
        and low.shape[2] <= 65535
        and low.numel() > 0
        and key.numel() > 0
    )


def triton_bucket_codes(
    x: torch.Tensor, rotation: torch.Tensor, shift: torch.Tensor, run: int
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
        run, shift.shape[3], rounds, D=dim, HALF=half, BLOCK_N=rows, BLOCK_D=width,
        BLOCK_H=columns, ONE_RUN=run % rows == 0 or shift.shape[3] == 1, PRECISION="ieee",
        num_warps=4 if x.element_size() == 2 else 8,
        num_stages=2 if _rotation_bytes(x, rotation) <= _MOST_BYTES // 4 else 1,
    )  # fmt: skip
    return code


def triton_bucket_order(code: torch.Tensor, buckets: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `hyperframe.kernels.buckets.bucket_order` says, where `supports_order` holds."""
    flat = code.contiguous().view(-1, code.shape[-1])
    heads, num_rows = flat.shape
    chunks, most = triton.cdiv(num_rows, _CHUNK), max(32, power_of_two(buckets))
    count = torch.empty((heads, buckets * chunks), dtype=torch.int32, device=code.device)
    sizes = (num_rows, chunks, buckets)
    count_kernel[(chunks, heads)](flat, count, *sizes, BUCKETS=most, CHUNK=_CHUNK, num_warps=4)
    stop = count.cumsum(dim=1, dtype=torch.int32)
    order = torch.empty_like(flat)
    place_kernel[(chunks, heads)](
        flat, stop, count, order, *sizes, BUCKETS=most, CHUNK=_CHUNK, BLOCK_N=32, num_warps=1
    )
    bounds = torch.nn.functional.pad(stop.view(heads, buckets, chunks)[:, :, -1], (1, 0))
    return order.view(code.shape), bounds.view(*code.shape[:-1], buckets + 1)


def triton_bucket_ranges(
    code: torch.Tensor, edge: torch.Tensor, bounds: torch.Tensor, key_order: torch.Tensor,
    reach: int, is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `hyperframe.kernels.buckets.bucket_ranges` says."""
    code, bounds, key_order = code.contiguous(), bounds.contiguous(), key_order.contiguous()
    low, high = torch.empty_like(code), torch.empty_like(code)
    num_rows, num_keys = code.shape[-1], key_order.shape[-1]
    heads = code.shape[0] * code.shape[1] * code.shape[2]
    ranges_kernel[(triton.cdiv(num_rows, 256), heads)](
        code, edge.contiguous(), bounds, key_order, low, high, code.shape[2] // bounds.shape[2],
        num_rows, num_keys, bounds.shape[-1] - 1, reach, num_keys.bit_length(),
        IS_CAUSAL=is_causal, BLOCK_N=256, num_warps=4,
    )  # fmt: skip
    return low, high


def triton_bucket_topk(
    query: torch.Tensor, query_order: torch.Tensor, key: torch.Tensor, key_order: torch.Tensor,
    low: torch.Tensor, high: torch.Tensor, keep: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `hyperframe.kernels.buckets.bucket_topk` says, where `supports_topk` holds."""
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    orders = (x.contiguous() for x in (query_order, key_order, low, high))
    batch, heads, num_rows, dim = query.shape
    rounds, width = low.shape[0], padded(dim)
    shape = (batch, heads, num_rows, rounds * keep)
    index = torch.empty(shape, dtype=torch.int32, device=key.device)
    score = torch.empty(shape, dtype=torch.float32, device=key.device)
    narrow = key.element_size() == 4 or width > 128
    rows = 32 if narrow else 64
    bucket_topk_kernel[(triton.cdiv(num_rows, rows), heads, rounds * batch)](
        query, *query.stride()[:3], key, *key.stride()[:3], *orders, index, score,
        heads // key.shape[1], heads, batch, num_rows, key.shape[2], scale, D=dim, KEEP=keep,
        BLOCK_K=power_of_two(keep), ROUNDS=rounds, BLOCK_M=rows, BLOCK_N=rows,
        BLOCK_D=width, WIDE_Q=is_wide(query), WIDE_K=is_wide(key), PRECISION="ieee",
        num_warps=4 if key.element_size() == 2 else 8,
    )  # fmt: skip
    return index, score
