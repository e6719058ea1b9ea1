"""Heavy rows of columns, from a sketch of the rows: the descent of its tree, and the exact test."""

from __future__ import annotations

import torch

from ..precision import without_autocast
from .ops import has_triton
from .ops import sketch as _schema

__all__ = [
    "BRANCHING",
    "candidate_bytes",
    "heavy_products",
    "packed_places",
    "runs_kernels",
    "sketch_candidates",
    "torch_candidates",
    "torch_products",
]

BRANCHING = _schema.BRANCHING
"""Children of a node: their scores, a byte each, are a word."""

_MOST_SCORE = 127  # of a node, with kernels


def runs_kernels(key: torch.Tensor) -> bool:
    """Return whether what is asked of such keys is done by kernels, where they take it."""
    is_single = key.dtype == torch.float32
    return key.is_cuda and is_single and torch.version.hip is None and has_triton()


def candidate_bytes(top: torch.Tensor, hashed: torch.Tensor, capacity: int) -> int:
    """Return about how many bytes `sketch_candidates` holds for each column."""
    levels, repetitions, width = hashed.shape[1:4]
    is_taken = top.is_cuda and top.dtype != torch.float64 and repetitions <= _MOST_SCORE
    if is_taken and has_triton():
        return top.shape[2] + levels * repetitions * width // 2 + 8 * capacity
    scores = repetitions * max(width, top.shape[2]) * (max(4, top.element_size()) + 1)
    return scores + capacity * (8 * BRANCHING * 2 + 16 * repetitions)


def packed_places(places: torch.Tensor, blocks: int) -> torch.Tensor:
    """Return blocks in as few bytes as hold their numbers; those of a node fill whole words.

    Args:
        places: int64 `[heads, N, repetitions]`, from 0 to `blocks - 1`.
        blocks: how many there are.

    Returns:
        uint8, int16 or int32 `[heads, N, R]`, zeros from `repetitions` on; a row is a multiple of
        8 bytes.
    """
    dtype = torch.uint8 if blocks <= 256 else torch.int16 if blocks <= 32768 else torch.int32
    missing = -places.shape[-1] % (8 // dtype.itemsize)
    return torch.nn.functional.pad(places.to(dtype), (0, missing))


def sketch_candidates(
    key: torch.Tensor, top: torch.Tensor, hashed: torch.Tensor, places: torch.Tensor, *,
    factor: float, unit: int, least: int, capacity: int, num_rows: int,
) -> torch.Tensor:  # fmt: skip
    """Return the rows that a descent of the tree of a sketch ends at, for every column.

    A bucket's byte is `min((factor * sketch . key)^2, unit)`, rounded down; the score of a node is
    the sum of the bytes of its buckets over the repetitions. From the top on, the nodes that score
    `least` are kept, the best `capacity` of a column, and their children looked at.

    Which of the nodes of an equal score are kept where there are too many: with the kernels, those
    that come first; elsewhere as `torch.topk` has it.

    Args:
        key: floating point `[heads, columns, d]`.
        top: `[heads, repetitions, nodes, d]`, sketches of the top level, where nothing is hashed.
        hashed: `[heads, levels, repetitions, width, d]`, those of the levels below it; siblings lie
            side by side, in a block of 8. Its dtype, and that of `top`, is that of the products.
        places: the block of the children of every node above each hashed level, those of the
            levels one after the other; see `packed_places`.
        factor: of the products.
        unit: the largest byte; `repetitions * unit` has to fit a byte. Kernels take up to 15, and
            127 in all.
        least: the score that is enough, from 1.
        capacity: nodes of a column that are kept at each level.
        num_rows: leaves from it on are no rows.

    Returns:
        int64 `[heads, columns, C]`, distinct rows, -1 for none; `C` is at most `capacity`. With
        the kernels they ascend. No gradient.
        Cost: `d` products for every column and row of the sketch, `8 * repetitions` bytes for every
        kept node; a byte of memory for every column and row of the hashed levels, half of one with
        the kernels. On CUDA with Triton three launches, where `supports` of the kernel holds.
    """
    found: torch.Tensor = torch.ops.hyperframe.sketch_candidates(
        key, top, hashed, places, factor, unit, least, capacity, num_rows
    )
    return found


def heavy_products(
    query: torch.Tensor, key: torch.Tensor, row: torch.Tensor, *, least: float, limit: int,
    sign: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return those of some candidates whose products with the key of their column are large.

    Args:
        query: `[heads, n_q, d]`; may be of a lower precision than `key`.
        key: `[heads, columns, d]`, scaled so that the squares of a column add up to 1 at most.
        row: int64 `[heads, columns, C]`, distinct rows, -1 for none.
        least: what the square of a product has to reach.
        limit: slots of the result; where more candidates pass, those of the largest squares are
            kept.
        sign: of the products; None for both.

    Returns:
        int64 `[heads, columns, min(limit, C)]`, rows, -1 for none, and the products, in the dtype
        of `key`; nothing is said of the products of none. No gradient.
        Cost: O(columns C d) time. On CUDA with Triton one launch that gathers nothing in memory,
        and keeps the order of the candidates, where `limit` holds all that can pass.
    """
    kept, product = torch.ops.hyperframe.heavy_products(query, key, row, least, limit, sign)
    return kept, product


@torch.library.impl("hyperframe::sketch_candidates", "default")
def _run_candidates(
    key: torch.Tensor, top: torch.Tensor, hashed: torch.Tensor, places: torch.Tensor,
    factor: float, unit: int, least: int, capacity: int, num_rows: int,
) -> torch.Tensor:  # fmt: skip
    given = (key, top, hashed, places, factor, unit, least, capacity, num_rows)
    if runs_kernels(key):
        from .triton import sketch as kernels

        if kernels.supports(key, top, hashed, unit, capacity):
            with torch.cuda.device(key.device):
                return kernels.triton_candidates(*given)
    return torch_candidates(*given)


@torch.library.impl("hyperframe::heavy_products", "default")
def _run_products(
    query: torch.Tensor, key: torch.Tensor, row: torch.Tensor, least: float, limit: int,
    sign: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    given = (query, key, row, least, limit, sign)
    if runs_kernels(key):
        from .triton import entries as kernels

        if kernels.supports_products(*given):
            with torch.cuda.device(key.device):
                return kernels.triton_products(*given)
    return torch_products(*given)


def torch_candidates(
    key: torch.Tensor, top: torch.Tensor, hashed: torch.Tensor, places: torch.Tensor,
    factor: float, unit: int, least: int, capacity: int, num_rows: int,
) -> torch.Tensor:  # fmt: skip
    """Do what `sketch_candidates` says, on any device."""
    heads, columns, _ = key.shape
    levels, repetitions, width = hashed.shape[1:4]
    key = (key * factor).to(top.dtype)
    score = _scores(top, key, unit).sum(dim=2, dtype=torch.uint8)
    node, is_kept = _best(score, None, least, capacity)
    first = torch.arange(repetitions, device=key.device) * (width // BRANCHING)
    start, nodes = 0, top.shape[2]
    for level in range(levels):
        # the bytes of eight siblings are a word; words add up without carries
        words = _scores(hashed[:, level], key, unit).view(torch.int64).flatten(2)
        parents = node.view(heads, -1, 1).expand(-1, -1, repetitions)
        place = places[:, start : start + nodes, :repetitions].gather(1, parents) + first
        total = words.gather(-1, place.view(heads, columns, -1))
        total = total.unflatten(-1, (-1, repetitions)).sum(dim=-1)
        score = torch.where(is_kept, total, 0).view(torch.uint8)
        node, is_kept = _best(score, node, least, capacity)
        start, nodes = start + nodes, nodes * BRANCHING
    return torch.where(is_kept & (node < num_rows), node, -1)


def _scores(sketch: torch.Tensor, key: torch.Tensor, unit: int) -> torch.Tensor:
    """Return the bytes of all buckets: `[heads, columns, repetitions, buckets]`."""
    with without_autocast(key):
        value = key @ sketch.flatten(1, 2).transpose(-1, -2)
    score = value.square_().clamp_(max=unit).to(torch.uint8)
    by_bucket: torch.Tensor = score.unflatten(-1, sketch.shape[1:3])
    return by_bucket


def _best(
    score: torch.Tensor, node: torch.Tensor | None, least: int, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best nodes, `[heads, columns, C]`, and which of them score enough.

    Args:
        score: uint8 `[heads, columns, nodes]`, of all children of `node`.
        node: int64, the parents; None for the nodes themselves.
        least: what is enough.
        capacity: how many are kept.
    """
    best, place = score.topk(min(capacity, score.shape[-1]), dim=-1, sorted=False)
    if node is not None:
        place = node.gather(-1, place // BRANCHING) * BRANCHING + place % BRANCHING
    return place, best >= least


def torch_products(
    query: torch.Tensor, key: torch.Tensor, row: torch.Tensor, least: float, limit: int,
    sign: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `heavy_products` says, on any device."""
    heads, columns, width = row.shape
    with without_autocast(query):
        index = row.clamp(min=0).view(heads, -1, 1).expand(-1, -1, query.shape[-1])
        found = query.gather(1, index).view(heads, columns, width, -1).to(key.dtype)
        product = (found @ key.unsqueeze(-1)).squeeze(-1)
    square = product.square()
    is_heavy = (row >= 0) & (square > 0) & (square >= least)
    if sign is not None:
        is_heavy = is_heavy & (product * sign > 0)
    square = square.masked_fill(~is_heavy, -1)
    if limit < width:
        square, place = square.topk(limit, dim=-1)
        row, product = row.gather(-1, place), product.gather(-1, place)
    return torch.where(square > 0, row, -1), product
