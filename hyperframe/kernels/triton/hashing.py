"""Hash codes and a stable counting sort for all run sizes: three launches for query and key.

Rows are cut into chunks that no run straddles. The first kernel reads every row once; it writes the
row's code, its rank among the rows of that code in its chunk, and the chunk's histogram. The second
turns histograms into first places: for each run size, run, chunk and code. The third adds the two
and writes the orders of all run sizes. Codes and ranks take three bytes a row, the histograms
`4 * 2^r` bytes a chunk and run size.

All kernels cover the chunks of the queries first, then those of the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

__all__ = ["HashSort", "Tuning", "supports", "triton_hash_orders"]

MAX_PROJECTIONS = 8  # a code fits a byte
MAX_HEAD_DIM = 256
COLUMNS: tl.constexpr = tl.constexpr(8)  # projections, padded: the narrowest matrix product

_MIN_BUCKETS = 32  # a warp has a lane for each
_FEW_TABLE_ROWS, _TABLE_ROWS, _MOST_TABLE_ROWS = 4, 32, 256  # histograms that it holds at once
_SHORTEST_LEAF = 32  # below it, tables are larger than the rows
_FEWEST_CHUNKS = 4096  # enough to fill a large GPU several times
_SHORTEST_CHUNK, _LONGEST_CHUNK = 128, 1024

# every length of a ragged batch would compile anew for the divisors of these
_SIZES = (
    "num_queries", "num_keys", "query_leaf", "key_leaf", "query_leaf_chunks", "key_leaf_chunks",
    "query_chunks", "key_chunks", "flat_query_heads", "query_programs", "programs", "query_rows",
    "key_rows", "most_runs",
)  # fmt: skip


@triton.jit
def _chunk_of(
    program, query_programs, num_queries, num_keys, query_leaf, key_leaf, query_leaf_chunks,
    key_leaf_chunks, query_chunks, key_chunks, CHUNK: tl.constexpr,
):  # fmt: skip
    """Return of a chunk: whether it is of queries, its head, the head's rows, its [start, stop)."""
    is_query = program < query_programs
    index = tl.where(is_query, program, program - query_programs)
    num_rows = tl.where(is_query, num_queries, num_keys)
    leaf = tl.where(is_query, query_leaf, key_leaf)
    leaf_chunks = tl.where(is_query, query_leaf_chunks, key_leaf_chunks)
    chunks = tl.where(is_query, query_chunks, key_chunks)
    flat_head, chunk = index // chunks, index % chunks
    leaf_start = chunk // leaf_chunks * leaf
    start = leaf_start + chunk % leaf_chunks * CHUNK
    stop = tl.minimum(tl.minimum(start + CHUNK, leaf_start + leaf), num_rows)
    return is_query, flat_head.to(tl.int64), num_rows, start, stop


@triton.jit(do_not_specialize=_SIZES)
def _hash_kernel(
    query_ptr, key_ptr, plane_ptr, threshold_ptr, code_ptr, rank_ptr, count_ptr, sorted_ptr,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    plane_stride_b, query_heads, key_heads, num_queries, num_keys, query_leaf, key_leaf,
    query_leaf_chunks, key_leaf_chunks, query_chunks, key_chunks, query_programs, query_rows,
    D: tl.constexpr, R: tl.constexpr, HAS_THRESHOLD: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BUCKETS: tl.constexpr, CHUNK: tl.constexpr, SORTS: tl.constexpr,
):  # fmt: skip
    """Write codes, ranks among equal codes of the chunk, and histograms; grid: all chunks."""
    program = tl.program_id(0)
    is_query, flat_head, num_rows, start, stop = _chunk_of(
        program, query_programs, num_queries, num_keys, query_leaf, key_leaf, query_leaf_chunks,
        key_leaf_chunks, query_chunks, key_chunks, CHUNK,
    )  # fmt: skip
    heads = tl.where(is_query, query_heads, key_heads)
    batch, head = flat_head // heads, flat_head % heads
    key_head = head // (heads // key_heads)
    # one body for both: a branch for each would need the shared memory of both
    x_ptr = tl.where(
        is_query, query_ptr + batch * query_stride_b + head * query_stride_h,
        key_ptr + batch * key_stride_b + head * key_stride_h,
    )  # fmt: skip
    stride_n = tl.where(is_query, query_stride_n, key_stride_n)
    offset = tl.where(is_query, 0, query_rows) + flat_head * num_rows
    code_ptr += offset
    rank_ptr += offset
    sorted_ptr += offset

    dim = tl.arange(0, BLOCK_D)
    column = tl.arange(0, COLUMNS)
    plane_ptr += batch * plane_stride_b + key_head * (D * R)
    plane = tl.load(
        plane_ptr + dim[:, None] * R + column[None, :],
        mask=(dim[:, None] < D) & (column[None, :] < R), other=0.0,
    ).to(query_ptr.dtype.element_ty)  # fmt: skip
    threshold = tl.zeros([COLUMNS], tl.float32)
    if HAS_THRESHOLD:
        # missing columns project to 0, which is not above 0: their bits stay clear
        threshold = tl.load(
            threshold_ptr + (batch * key_heads + key_head) * R + column,
            mask=(column < R) & (is_query == 0), other=0.0,
        )  # fmt: skip
    slot = tl.arange(0, BLOCK_N)
    bucket = tl.arange(0, BUCKETS)
    seen = tl.zeros([BUCKETS], tl.int32)  # rows of each code in the blocks before
    x_ptr += start.to(tl.int64) * stride_n
    cell = slot[:, None] * stride_n + dim[None, :]
    for at in range(start, stop, BLOCK_N):
        row = at + slot
        inside = row < stop
        x = tl.load(
            x_ptr + cell, mask=inside[:, None] & (dim[None, :] < D), other=0.0
        )  # [N, D]  # fmt: skip
        x_ptr += tl.cast(stride_n, tl.int64) * BLOCK_N
        product = tl.dot(x, plane, input_precision="ieee")  # [N, 8]
        code = tl.sum((product > threshold[None, :]).to(tl.int32) << column[None, :], axis=1)
        code ^= code >> 1
        code ^= code >> 2
        code ^= code >> 4
        # slots without a row are the last of the last bucket, and are not counted
        code = tl.where(inside, code, BUCKETS - 1)
        # the place of a row in the sorted block is the number of smaller marks. they are integers
        # below 2^16: float32 compares them in one saturating instruction. gathering them leaves
        # the layout of the product, in which four threads hold each row
        mark = tl.gather((code * BLOCK_N + slot).to(tl.float32), slot, axis=0)
        smaller = tl.clamp(mark[None, :] - mark[:, None], 0.0, 1.0)
        place = tl.sum(smaller, axis=0).to(tl.int32)
        code = mark.to(tl.int32) // BLOCK_N
        count = tl.histogram(code, BUCKETS)
        first_place = tl.cumsum(count, axis=0) - count
        rank = place + tl.gather(seen - first_place, code, axis=0)
        tl.store(code_ptr + row, code.to(tl.uint8), mask=inside)
        tl.store(rank_ptr + row, rank.to(tl.int16), mask=inside)
        empty = tl.maximum(at + BLOCK_N - stop, 0)
        seen += count - tl.where(bucket == BUCKETS - 1, empty, 0)
    tl.store(count_ptr + program.to(tl.int64) * BUCKETS + bucket, seen)
    if SORTS:
        tl.debug_barrier()  # other threads wrote what is read here
        first = tl.cumsum(seen, axis=0) - seen
        for at in range(start, stop, BLOCK_N):
            row = at + slot
            inside = row < stop
            code = tl.load(code_ptr + row, mask=inside, other=0).to(tl.int32)
            rank = tl.load(rank_ptr + row, mask=inside, other=0).to(tl.int32)
            place = tl.gather(first, code, axis=0) + rank
            tl.store(sorted_ptr + start + place, row - start + code * CHUNK, mask=inside)


@triton.jit
def _write_one_table(
    count_ptr, first_place_ptr, start, stop, first_place, BUCKETS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Write the first places of a run whose histograms fit into one table: they are read once."""
    bucket = tl.arange(0, BUCKETS)[None, :]
    chunk = start + tl.arange(0, ROWS)[:, None]
    cell = chunk.to(tl.int64) * BUCKETS + bucket
    count = tl.load(count_ptr + cell, mask=chunk < stop, other=0)
    total = tl.sum(count, axis=0)
    place = first_place + tl.cumsum(total, axis=0) - total
    before = tl.cumsum(count, axis=0) - count
    tl.store(first_place_ptr + cell, place[None, :] + before, mask=chunk < stop)


@triton.jit(do_not_specialize=_SIZES)
def _first_places_kernel(
    count_ptr, first_place_ptr, runs, num_queries, num_keys, query_leaf, key_leaf,
    query_leaf_chunks, key_leaf_chunks, query_chunks, key_chunks, flat_query_heads, query_programs,
    programs, most_runs, LEVELS: tl.constexpr, BUCKETS: tl.constexpr, TABLE_ROWS: tl.constexpr,
    FEW_ROWS: tl.constexpr, IS_ONE_TABLE: tl.constexpr, ALTERNATE: tl.constexpr,
):  # fmt: skip
    """Write the first place of every code of every chunk; grid: (heads and runs, run sizes)."""
    flat_head, run = tl.program_id(0) // most_runs, tl.program_id(0) % most_runs
    level = tl.program_id(1)
    is_query = flat_head < flat_query_heads
    num_rows = tl.where(is_query, num_queries, num_keys)
    leaf = tl.where(is_query, query_leaf, key_leaf)
    leaf_chunks = tl.where(is_query, query_leaf_chunks, key_leaf_chunks)
    chunks = tl.where(is_query, query_chunks, key_chunks)
    first_chunk = tl.where(
        is_query, flat_head * chunks, query_programs + (flat_head - flat_query_heads) * chunks
    ).to(tl.int64)
    size = tl.cast(runs[0], tl.int64)
    for other in tl.static_range(1, LEVELS):
        size = tl.where(level == other, runs[other], size)
    size = tl.minimum(size, num_rows).to(tl.int32)
    if run >= tl.cdiv(num_rows, size):
        return  # other run sizes have more runs
    if ALTERNATE:
        if (run % 2 == 1) != is_query:
            return
    run_chunks = tl.cdiv(size, leaf) * leaf_chunks
    start = run * run_chunks
    stop = tl.minimum(start + run_chunks, chunks)
    bucket = tl.arange(0, BUCKETS)[None, :]
    line = tl.arange(0, TABLE_ROWS)[:, None]
    count_ptr += first_chunk * BUCKETS
    first_place_ptr += (level.to(tl.int64) * programs + first_chunk) * BUCKETS
    # loads are what this kernel waits for: one instead of two for every table
    if IS_ONE_TABLE:
        _write_one_table(count_ptr, first_place_ptr, start, stop, run * size, BUCKETS, TABLE_ROWS)
        return
    if stop - start <= FEW_ROWS:
        _write_one_table(count_ptr, first_place_ptr, start, stop, run * size, BUCKETS, FEW_ROWS)
        return
    if stop - start <= TABLE_ROWS:
        _write_one_table(count_ptr, first_place_ptr, start, stop, run * size, BUCKETS, TABLE_ROWS)
        return
    total = tl.zeros([BUCKETS], tl.int32)
    for at in range(start, stop, TABLE_ROWS):
        chunk = at + line
        cell = chunk.to(tl.int64) * BUCKETS + bucket
        total += tl.sum(tl.load(count_ptr + cell, mask=chunk < stop, other=0), axis=0)
    place = run * size + tl.cumsum(total, axis=0) - total
    for at in range(start, stop, TABLE_ROWS):
        chunk = at + line
        cell = chunk.to(tl.int64) * BUCKETS + bucket
        count = tl.load(count_ptr + cell, mask=chunk < stop, other=0)
        before = tl.cumsum(count, axis=0) - count
        tl.store(first_place_ptr + cell, place[None, :] + before, mask=chunk < stop)
        place += tl.sum(count, axis=0)


@triton.jit(do_not_specialize=_SIZES)
def _place_kernel(
    code_ptr, rank_ptr, count_ptr, sorted_ptr, first_place_ptr, query_order_ptr, key_order_ptr,
    key_rank_ptr, runs,
    num_queries, num_keys, query_leaf, key_leaf, query_leaf_chunks, key_leaf_chunks, query_chunks,
    key_chunks, query_programs, programs, query_rows, key_rows, LEVELS: tl.constexpr,
    BUCKETS: tl.constexpr, CHUNK: tl.constexpr, ALTERNATE: tl.constexpr, SORTS: tl.constexpr,
):  # fmt: skip
    """Write the orders of all run sizes, and the places of keys; grid: all chunks.

    With `SORTS` rows are placed in the order of their codes, so that neighbours of one code are
    written together.
    """
    program = tl.program_id(0)
    is_query, flat_head, num_rows, start, stop = _chunk_of(
        program, query_programs, num_queries, num_keys, query_leaf, key_leaf, query_leaf_chunks,
        key_leaf_chunks, query_chunks, key_chunks, CHUNK,
    )  # fmt: skip
    offset = flat_head * num_rows
    order_ptr = tl.where(is_query, query_order_ptr, key_order_ptr) + offset
    key_rank_ptr += offset
    stride = tl.where(is_query, query_rows, key_rows).to(tl.int64)
    first_place_ptr += program.to(tl.int64) * BUCKETS
    row = start + tl.arange(0, CHUNK)
    inside = row < stop
    offset += tl.where(is_query, 0, query_rows)
    code = tl.load(code_ptr + offset + row, mask=inside, other=0).to(tl.int32)
    rank = tl.load(rank_ptr + offset + row, mask=inside, other=0).to(tl.int32)
    sorted_row, sorted_code, sorted_rank = row, code, rank
    if SORTS:
        count = tl.load(count_ptr + program.to(tl.int64) * BUCKETS + tl.arange(0, BUCKETS))
        packed = tl.load(sorted_ptr + offset + row, mask=inside, other=0)
        sorted_row, sorted_code = start + packed % CHUNK, packed // CHUNK
        first = tl.gather(tl.cumsum(count, axis=0) - count, sorted_code, axis=0)
        sorted_rank = row - start - first
    for level in tl.static_range(LEVELS):
        is_sorted = True
        if ALTERNATE:
            is_sorted = (start // runs[level] % 2 == 1) == is_query
        if SORTS:
            if is_sorted:
                place = sorted_rank + tl.load(first_place_ptr + sorted_code, mask=inside, other=0)
                tl.store(order_ptr + place, sorted_row, mask=inside)
                if is_query == 0:
                    place = rank + tl.load(first_place_ptr + code, mask=inside, other=0)
                    tl.store(key_rank_ptr + row, place, mask=inside)
            else:
                tl.store(order_ptr + row, row, mask=inside)
                tl.store(key_rank_ptr + row, row, mask=inside & (is_query == 0))
        else:
            place = row
            if is_sorted:
                place = rank + tl.load(first_place_ptr + code, mask=inside, other=0)
            tl.store(order_ptr + place, row, mask=inside)
            tl.store(key_rank_ptr + row, place, mask=inside & (is_query == 0))
        order_ptr += stride
        key_rank_ptr += stride
        first_place_ptr += tl.cast(programs, tl.int64) * BUCKETS


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the rows are shared out; any values give the same result.

    Args:
        chunk: rows of a chunk, a multiple of `block_rows`.
        block_rows: rows that a program of the hash kernel works on at once.
        num_warps: warps of such a program.
        num_stages: blocks of rows that it loads ahead.
        sorts: have the hash kernel sort every chunk, so that orders are written in longer pieces.
    """

    chunk: int
    block_rows: int
    num_warps: int
    num_stages: int
    sorts: bool = False

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, runs: Sequence[int]) -> Tuning:
        """Choose by shapes and dtype."""
        row_bytes = _padded(query.shape[-1]) * query.element_size()
        rows = sum(x.shape[0] * x.shape[1] * x.shape[2] for x in (query, key))
        leaf = min(max(query.shape[2], key.shape[2]), *runs)
        longest = min(_LONGEST_CHUNK, triton.next_power_of_2(leaf))
        chunk = _SHORTEST_CHUNK
        while 2 * chunk <= longest and rows >= 2 * chunk * _FEWEST_CHUNKS:
            chunk *= 2
        if row_bytes <= 256:
            return cls(chunk=chunk, block_rows=64, num_warps=2, num_stages=3)
        return cls(chunk=chunk, block_rows=64, num_warps=4, num_stages=2)


class _Cut(NamedTuple):
    """How the rows of a head are cut: into leaves, the smallest runs, and those into chunks."""

    num_rows: int
    leaf: int
    leaf_chunks: int
    chunks: int

    @classmethod
    def of(cls, num_rows: int, runs: Sequence[int], chunk: int) -> _Cut:
        leaf = min(num_rows, *runs)
        leaf_chunks = triton.cdiv(leaf, chunk)
        chunks = num_rows // leaf * leaf_chunks + triton.cdiv(num_rows % leaf, chunk)
        return cls(num_rows, leaf, leaf_chunks, chunks)


class HashSort:
    """The three launches, with what they hand on."""

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, projection: torch.Tensor,
        key_threshold: torch.Tensor | None, runs: Sequence[int], tuning: Tuning | None = None, *,
        alternate: bool = False,
    ) -> None:  # fmt: skip
        self.query, self.key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
        self.projection = projection.contiguous()
        self.key_threshold = None if key_threshold is None else key_threshold.contiguous()
        self.runs = tuple(runs)
        self.alternate = alternate
        self.tuning = tuning or Tuning.of(query, key, runs)
        self.buckets = max(_MIN_BUCKETS, 1 << projection.shape[-1])
        # batch and heads; rows; chunks: of the queries, then of the keys
        self.heads = [x.shape[0] * x.shape[1] for x in (query, key)]
        self.cuts = [_Cut.of(x.shape[2], runs, self.tuning.chunk) for x in (query, key)]
        self.rows = [heads * cut.num_rows for heads, cut in zip(self.heads, self.cuts, strict=True)]
        self.sizes = [size for both in zip(*self.cuts, strict=True) for size in both]
        self.programs = [
            heads * cut.chunks for heads, cut in zip(self.heads, self.cuts, strict=True)
        ]

        def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=query.device)

        levels = len(self.runs)
        self.code = empty(torch.uint8, sum(self.rows))
        self.rank = empty(torch.int16, sum(self.rows))
        self.count = empty(torch.int32, sum(self.programs), self.buckets)
        # rows of a chunk in the order of their codes: row in the chunk, and code
        self.sorted = empty(torch.int32, sum(self.rows) if self.tuning.sorts else 0)
        self.first_place = empty(torch.int32, levels, sum(self.programs), self.buckets)
        self.query_order = empty(torch.int32, levels, *query.shape[:3])
        self.key_order = empty(torch.int32, levels, *key.shape[:3])
        self.key_rank = empty(torch.int32, levels, *key.shape[:3])

    def write_codes(self) -> None:
        """Write codes, ranks in the chunk, and histograms."""
        head_dim, num_projections = self.projection.shape[-2:]
        has_threshold = self.key_threshold is not None
        _hash_kernel[(sum(self.programs),)](
            self.query, self.key, self.projection,
            self.key_threshold if has_threshold else self.projection,
            self.code, self.rank, self.count, self.sorted, *self.query.stride()[:3],
            *self.key.stride()[:3],
            self.projection.stride(0) if self.projection.shape[0] > 1 else 0,
            self.query.shape[1], self.key.shape[1], *self.sizes, self.programs[0],
            self.rows[0], D=head_dim, R=num_projections, HAS_THRESHOLD=has_threshold,
            BLOCK_D=_padded(head_dim), BLOCK_N=self.tuning.block_rows, BUCKETS=self.buckets,
            CHUNK=self.tuning.chunk, SORTS=self.tuning.sorts, num_warps=self.tuning.num_warps,
            num_stages=self.tuning.num_stages,
        )  # fmt: skip

    def write_first_places(self) -> None:
        """Write the first place of every code of every chunk, for each run size."""
        most_runs = max(triton.cdiv(cut.num_rows, cut.leaf) for cut in self.cuts)
        chunks = max(cut.chunks for cut in self.cuts)
        is_one_table = most_runs == 1 and chunks <= _MOST_TABLE_ROWS
        table_rows = triton.next_power_of_2(chunks) if is_one_table else _TABLE_ROWS
        _first_places_kernel[(sum(self.heads) * most_runs, len(self.runs))](
            self.count, self.first_place, self.runs, *self.sizes, self.heads[0],
            self.programs[0], sum(self.programs), most_runs, LEVELS=len(self.runs),
            BUCKETS=self.buckets, TABLE_ROWS=table_rows, FEW_ROWS=_FEW_TABLE_ROWS,
            IS_ONE_TABLE=is_one_table,
            ALTERNATE=self.alternate, num_warps=16 if table_rows > _TABLE_ROWS else 4,
        )  # fmt: skip

    def write_orders(self) -> None:
        """Write the orders of all run sizes."""
        _place_kernel[(sum(self.programs),)](
            self.code, self.rank, self.count, self.sorted, self.first_place, self.query_order,
            self.key_order, self.key_rank, self.runs, *self.sizes, self.programs[0],
            sum(self.programs), *self.rows, LEVELS=len(self.runs), BUCKETS=self.buckets,
            CHUNK=self.tuning.chunk, ALTERNATE=self.alternate, SORTS=self.tuning.sorts,
        )  # fmt: skip


def triton_hash_orders(
    query: torch.Tensor, key: torch.Tensor, projection: torch.Tensor,
    key_threshold: torch.Tensor | None, runs: Sequence[int], tuning: Tuning | None = None, *,
    alternate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `hyperframe.kernels.hashing.hash_orders` says, where `supports` holds.

    No host synchronisation; what is launched depends on shapes, strides and dtypes alone.
    """
    sort = HashSort(query, key, projection, key_threshold, runs, tuning, alternate=alternate)
    sort.write_codes()
    sort.write_first_places()
    sort.write_orders()
    return sort.query_order, sort.key_order, sort.key_rank


def supports(
    query: torch.Tensor, key: torch.Tensor, projection: torch.Tensor, runs: Sequence[int]
) -> bool:
    """Return whether the kernels take these; depends on shapes and dtypes alone."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return (
        query.dtype in dtypes
        and key.dtype == query.dtype
        and projection.shape[-1] <= MAX_PROJECTIONS
        and query.shape[-1] <= MAX_HEAD_DIM
        and query.numel() > 0
        and key.numel() > 0
        and len(runs) > 0
        and all(_are_cut_alike(x.shape[2], runs) for x in (query, key))
    )


def _are_cut_alike(num_rows: int, runs: Sequence[int]) -> bool:
    """Whether all runs consist of whole smallest runs, and those are worth a histogram each."""
    leaf = min(num_rows, *runs)
    is_whole = all(run % leaf == 0 for run in runs if run < num_rows)
    return is_whole and (leaf >= _SHORTEST_LEAF or leaf == num_rows)


def _padded(head_dim: int) -> int:
    return max(16, int(triton.next_power_of_2(head_dim)))
