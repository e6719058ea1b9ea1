"""Hash buckets of vectors: codes, orders by bucket, ranges of these, and the best keys there."""

from __future__ import annotations

import itertools

import torch

from ..precision import without_autocast
from ..ragged import spread_heads
from .ops import buckets as _schemas  # noqa: F401  (defines the operators implemented here)
from .ops import has_triton

__all__ = ["bucket_codes", "bucket_order", "bucket_ranges", "bucket_topk"]

_CHUNK_BYTES = 64 << 20  # of products, keys and logits held at once
_CHUNK = 512  # rows, for which those of each bucket are counted


def bucket_codes(
    x: torch.Tensor, rotation: torch.Tensor, shift: torch.Tensor, *, run: int, second: int = 0
) -> torch.Tensor:
    """Return the buckets of shifted vectors: the largest coordinate of `[y R; -y R]`, `y = x - m`.

    With `second` columns set apart, that of the others and that of these, joined.

    Args:
        x: `[batch, heads, n, d]`, `heads` a multiple of `rotation_heads`.
        rotation: `[rounds, batch, rotation_heads, d, buckets / 2]`, float64 for such `x`, else
            float32, and rounded to the dtype of `x`: products are then exact in float32.
        shift: `m R` for every run of rows, `[rounds, batch, heads, ceil(n / run), buckets / 2]`, of
            the dtype of `rotation`.
        run: rows that share a shift.
        second: how many of the columns, the last ones, are a hash of their own; fewer than all.

    Returns:
        int32 `[rounds, batch, heads, n]` in `[0, buckets)`; with `second` of `c` columns, in
        `[0, 4 (c - second) second)`. No gradient. On CUDA with Triton one
        launch for all rounds that reads `x` once and writes no product, for d <= 256, at most 256
        columns and 128 KiB of a rotation; elsewhere in chunks of bounded memory.

    Example:
        >>> x = torch.tensor([[3.0, 1.0], [-3.0, 1.0], [1.0, -9.0]]).view(1, 1, 3, 2)
        >>> rotation, shift = torch.eye(2).view(1, 1, 1, 2, 2), torch.zeros(1, 1, 1, 1, 2)
        >>> bucket_codes(x, rotation, shift, run=3).flatten().tolist()
        [0, 2, 3]
    """
    code: torch.Tensor = torch.ops.hyperframe.bucket_codes(
        x.detach(), rotation.detach(), shift.detach(), run, second
    )
    return code


def bucket_order(
    code: torch.Tensor, *, buckets: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort rows by bucket, those of one bucket by position.

    Args:
        code: int32 `[..., n]` in `[0, buckets)`.
        buckets: how many buckets there are.

    Returns:
        The row at each place, int32 `[..., n]`; the first place of each bucket, int32
        `[..., buckets + 1]`, `n` behind the last one; and how many rows of each bucket stand in
        the first chunks of 512 rows, int32 `[..., ceil(n / 512), buckets]`, each chunk with those
        before it. On CUDA with Triton a counting sort, for at most 512 buckets.

    Example:
        >>> code = torch.tensor([2, 0, 2, 1], dtype=torch.int32)
        >>> [x.tolist() for x in bucket_order(code, buckets=3)]
        [[1, 3, 0, 2], [0, 1, 2, 4], [[1, 1, 2]]]
    """
    order, bounds, counts = torch.ops.hyperframe.bucket_order(code, buckets, _CHUNK)
    return order, bounds, counts


def bucket_ranges(
    code: torch.Tensor, edge: torch.Tensor, bounds: torch.Tensor, counts: torch.Tensor,
    key_order: torch.Tensor, *, reach: int, is_causal: bool,
) -> torch.Tensor:  # fmt: skip
    """Return the places in the order of the keys that rows look at: runs of their own bucket.

    Args:
        code: int32 `[rounds, batch, query_heads, n]`, the buckets of the rows.
        edge: int32 `[n]` in `[0, n_k]`, a position among the keys for each row.
        bounds: int32 `[rounds, batch, key_heads, buckets + 1]`, from `bucket_order`.
        counts: int32 `[rounds, batch, key_heads, ceil(n_k / 512), buckets]`, from `bucket_order`.
        key_order: int32 `[rounds, batch, key_heads, n_k]`, from `bucket_order`.
        reach: places of a row, at most.
        is_causal: whether a row looks at the last keys before its edge; else at those around it, at
            `reach` of them wherever the bucket has as many.

    Returns:
        int32 `[rounds, batch, query_heads, n, 2]`: the first place, and that behind the last one.
        Rows of one bucket whose edges ascend have ranges that ascend. Cost O(log n_k) for a row, on
        CUDA with Triton, in one launch, that of a search in a chunk.
    """
    ranges: torch.Tensor = torch.ops.hyperframe.bucket_ranges(
        code, edge, bounds, counts, key_order, _CHUNK, reach, is_causal
    )
    return ranges


def bucket_topk(
    query: torch.Tensor, query_order: torch.Tensor, key: torch.Tensor, key_order: torch.Tensor,
    ranges: torch.Tensor, *, reach: int, keep: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the best keys of every row in every round, of those in its range of places.

    Args:
        query: `[batch, query_heads, n, d]`.
        query_order: int32 `[rounds, batch, query_heads, n]`, the rows in an order in which the
            places of neighbours overlap: only time depends on it.
        key: `[batch, key_heads, n_k, d]`, of the same dtype.
        key_order: int32 `[rounds, batch, key_heads, n_k]`, the key at each place.
        ranges: int32 `[rounds, batch, query_heads, n, 2]`: the first place and that behind the last
            one, at most `reach` apart; the second no larger than the first for none.
        reach: places of a row, at most.
        keep: keys to keep of a row in a round.
        scale: factor of the logits.

    Returns:
        Keys int32 `[batch, query_heads, n, rounds * keep]`, those of a round side by side and the
        largest first, -1 where there are fewer; and their logits, in float32 at least, `-inf`
        there. No gradient. Cost O(rounds n reach d) time. On CUDA with Triton one launch, for
        d <= 256 and `keep` <= 8, and logits of half precision are told apart to 1 in 2^16;
        elsewhere in chunks of bounded memory.
    """
    index, score = torch.ops.hyperframe.bucket_topk(
        query.detach(), query_order, key.detach(), key_order, ranges, reach, keep, scale
    )
    return index, score


def _runs_triton(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.version.hip is None and has_triton()


@torch.library.impl("hyperframe::bucket_codes", "default")
def _run_codes(
    x: torch.Tensor, rotation: torch.Tensor, shift: torch.Tensor, run: int, second: int
) -> torch.Tensor:
    if _runs_triton(x):
        from .triton import buckets as kernels

        if kernels.supports_codes(x, rotation):
            with torch.cuda.device(x.device):
                return kernels.triton_bucket_codes(x, rotation, shift, run, second)
    return torch_bucket_codes(x, rotation, shift, run, second)


@torch.library.impl("hyperframe::bucket_order", "default")
def _run_order(
    code: torch.Tensor, buckets: int, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if _runs_triton(code):
        from .triton import buckets as kernels

        if kernels.supports_order(code, buckets):
            with torch.cuda.device(code.device):
                return kernels.triton_bucket_order(code, buckets, chunk)
    return torch_bucket_order(code, buckets, chunk)


@torch.library.impl("hyperframe::bucket_ranges", "default")
def _run_ranges(
    code: torch.Tensor, edge: torch.Tensor, bounds: torch.Tensor, counts: torch.Tensor,
    key_order: torch.Tensor, chunk: int, reach: int, is_causal: bool,
) -> torch.Tensor:  # fmt: skip
    if _runs_triton(code):
        from .triton import buckets as kernels

        if kernels.supports_order(code, bounds.shape[-1] - 1):
            with torch.cuda.device(code.device):
                return kernels.triton_bucket_ranges(
                    code, edge, bounds, counts, key_order, chunk, reach, is_causal
                )
    return torch_bucket_ranges(code, edge, bounds, key_order, reach, is_causal)


@torch.library.impl("hyperframe::bucket_topk", "default")
def _run_topk(
    query: torch.Tensor, query_order: torch.Tensor, key: torch.Tensor, key_order: torch.Tensor,
    ranges: torch.Tensor, reach: int, keep: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    if _runs_triton(key):
        from .triton import buckets as kernels

        if kernels.supports_topk(query, key, ranges, keep):
            with torch.cuda.device(key.device):
                return kernels.triton_bucket_topk(
                    query, query_order, key, key_order, ranges, keep, scale
                )
    return torch_bucket_topk(query, key, key_order, ranges, reach, keep, scale)


def torch_bucket_codes(
    x: torch.Tensor, rotation: torch.Tensor, shift: torch.Tensor, run: int, second: int = 0
) -> torch.Tensor:
    """Do what `bucket_codes` says, for some rows at a time."""
    rounds, batch, heads, half = rotation.shape[0], *x.shape[:2], rotation.shape[-1]
    code = torch.empty((rounds, *x.shape[:3]), dtype=torch.int32, device=x.device)
    run_of_row = torch.arange(x.shape[2], device=x.device) // run
    step = max(1, _CHUNK_BYTES // max(1, 16 * batch * heads * (half + x.shape[3])))
    for number in range(rounds):
        directions = spread_heads(rotation[number], heads)
        for start in range(0, x.shape[2], step):
            rows = slice(start, start + step)
            with without_autocast(x):
                product = x[:, :, rows].to(rotation.dtype) @ directions
            product = product - shift[number][:, :, run_of_row[rows]]
            found = _largest(product[..., : half - second])
            if second:
                found = found * (2 * second) + _largest(product[..., half - second :])
            code[number, :, :, rows] = found
    return code


def _largest(product: torch.Tensor) -> torch.Tensor:
    largest = product.abs().argmax(dim=-1, keepdim=True)
    is_opposite = product.gather(-1, largest) < 0
    return (largest + is_opposite * product.shape[-1]).squeeze(-1)


def torch_bucket_order(
    code: torch.Tensor, buckets: int, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what `bucket_order` says, by sorting."""
    # the fewer bits a sort sees, the faster it is
    narrow = code.to(torch.int16) if buckets < 1 << 15 else code
    ordered, order = narrow.sort(dim=-1, stable=True)
    bucket = torch.arange(buckets + 1, dtype=narrow.dtype, device=code.device)
    bucket = bucket.expand(*code.shape[:-1], -1).contiguous()
    bounds = torch.searchsorted(ordered.contiguous(), bucket, out_int32=True)
    num_rows = code.shape[-1]
    stop = (torch.arange(0, num_rows, chunk, device=code.device) + chunk).clamp(max=num_rows)
    # rows of a bucket before a position: that pair's place among all of them
    wanted = (bucket[..., None, :-1].long() * num_rows + stop.unsqueeze(-1)).flatten(-2)
    pairs = ordered.long() * num_rows + order
    counts = torch.searchsorted(pairs, wanted, out_int32=True)
    counts = counts.unflatten(-1, (len(stop), buckets)) - bounds[..., None, :-1]
    return order.int(), bounds, counts


def torch_bucket_ranges(
    code: torch.Tensor, edge: torch.Tensor, bounds: torch.Tensor, key_order: torch.Tensor,
    reach: int, is_causal: bool,
) -> torch.Tensor:  # fmt: skip
    """Do what `bucket_ranges` says, by searching among pairs of bucket and position."""
    num_keys = key_order.shape[-1]
    place = torch.arange(num_keys, dtype=torch.int32, device=code.device)
    stops = bounds[..., 1:].contiguous()
    bucket = torch.searchsorted(stops, place.expand(key_order.shape).contiguous(), right=True)
    pairs = bucket * num_keys + key_order
    # query heads of a group look in the same order, one behind the other
    own = code.long().view(*bounds.shape[:3], -1)
    wanted = (code.long() * num_keys + edge).view(own.shape)
    middle = torch.searchsorted(pairs, wanted, out_int32=True)
    first, last = bounds.gather(-1, own), bounds.gather(-1, own + 1)
    if is_causal:
        low, high = torch.maximum(first, middle - reach), middle
    else:
        low = torch.maximum(first, torch.minimum(middle - reach // 2, last - reach))
        high = torch.minimum(low + reach, last)
    return torch.stack([low.view(code.shape), high.view(code.shape)], dim=-1).int()


def torch_bucket_topk(
    query: torch.Tensor, key: torch.Tensor, key_order: torch.Tensor, ranges: torch.Tensor,
    reach: int, keep: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `bucket_topk` says, for some rows of a round at a time."""
    batch, heads, num_rows, dim = query.shape
    low, high = ranges.unbind(dim=-1)
    rounds, key_heads, num_keys = low.shape[0], *key.shape[1:3]
    dtype = torch.promote_types(key.dtype, torch.float32)
    shape = (batch, heads, num_rows, rounds * keep)
    index = torch.full(shape, -1, dtype=torch.int32, device=key.device)
    score = torch.full(shape, float("-inf"), dtype=dtype, device=key.device)
    place, kept = torch.arange(reach, device=key.device), min(keep, reach)
    step = max(1, _CHUNK_BYTES // max(1, batch * heads * reach * (4 * dim + 32)))
    for number, start in itertools.product(range(rounds), range(0, num_rows, step)):
        rows = slice(start, start + step)
        slots = slice(number * keep, number * keep + kept)
        at = low[number, :, :, rows, None].long() + place
        inside = at < high[number, :, :, rows, None]
        flat = at.clamp(max=num_keys - 1).reshape(batch, key_heads, -1)
        found = key_order[number].gather(-1, flat).long()
        keys = key.gather(2, found.unsqueeze(-1).expand(-1, -1, -1, dim)).to(dtype)
        with without_autocast(key):
            logits = (query[:, :, rows].to(dtype) * scale).unsqueeze(-2) @ keys.view(
                *at.shape, dim
            ).transpose(-1, -2)
        logits = logits.squeeze(-2).masked_fill(~inside, float("-inf"))
        best = logits.topk(kept, dim=-1)
        score[:, :, rows, slots] = best.values
        chosen = found.view(at.shape).gather(-1, best.indices)
        is_one = inside.gather(-1, best.indices)
        index[:, :, rows, slots] = torch.where(is_one, chosen, -1).int()
    return index, score
