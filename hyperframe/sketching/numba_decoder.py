"""The descent of a sketch's tree on a CPU, compiled by numba: a column at a time, in the caches.

`kernels.sketch.torch_candidates` makes the bytes of every bucket of every column, sums words, and
sorts, each in a pass over memory. Here the products of a few columns are made by torch, and one
compiled pass descends each column through all of its levels: a bucket becomes a byte where a kept
node asks for it, and the best nodes are found by counting scores, of which there are 256.

This module imports numba and is imported when it is used. What it compiles runs without Python's
lock, so that Python's threads share the columns; numba's own threads would end the process where
it was forked, or called from two threads at once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch

from ..kernels.ops.sketch import BRANCHING, num_slots
from ..precision import without_autocast

__all__ = ["num_threads", "numba_candidates"]

_CHUNK_BYTES = 2 << 20  # of products held at once: about a cache
_LEAST_COLUMNS = 64  # of a chunk, lest the products be slow
_SCORES = 256


def num_threads() -> int:
    """Return how many threads share the columns: torch's, or numba's limit if that is lower."""
    limit = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    return max(1, min(torch.get_num_threads(), limit))


def numba_candidates(
    key: torch.Tensor, top: torch.Tensor, hashed: torch.Tensor, places: torch.Tensor,
    factor: float, unit: int, least: int, capacity: int, num_rows: int,
) -> torch.Tensor:  # fmt: skip
    """Do what `kernels.sketch.sketch_candidates` says, on a CPU, in float32 or float64.

    Where more nodes of a score would be kept than there is room for, those that come first are,
    and the rows of the result ascend, as with the Triton kernels. The same bits for the same
    products, however many threads there are.

    Args:
        key: as there, and so are all others.
        top: float32 or float64.
        hashed: of the dtype of `top`.
        places: see `kernels.sketch.packed_places`.
        factor: of the products.
        unit: the largest byte.
        least: the score that is enough.
        capacity: nodes of a column that are kept at each level.
        num_rows: leaves from it on are no rows.

    Returns:
        int64 `[heads, columns, C]`, rows, -1 for none.

    Cost: as there; memory of the result, and about 2 MiB of products.
    """
    heads, columns, _ = key.shape
    levels, repetitions, width = hashed.shape[1:4]
    slots = num_slots(top.shape[2], levels, capacity)
    out = torch.empty((heads, columns, slots), dtype=torch.int64)
    key = (key * factor).to(top.dtype)
    size = repetitions * (top.shape[2] + levels * width)
    step = max(_LEAST_COLUMNS, _CHUNK_BYTES // (size * top.element_size()))
    threads = num_threads()
    with ThreadPoolExecutor(threads) as pool, without_autocast(key):
        for head in range(heads):
            rows = torch.cat([top[head].flatten(0, 1), hashed[head].flatten(0, 2)]).T
            block = places[head].numpy()
            for start in range(0, columns, step):
                value = (key[head, start : start + step] @ rows).numpy()
                found = out[head, start : start + step].numpy()
                share = -(-len(value) // threads)
                fixed = (top.shape[2], levels, repetitions, width, unit, least, capacity, num_rows)
                parts = [slice(at, at + share) for at in range(0, len(value), share)]
                if threads == 1:
                    _descend(value, block, found, *fixed)
                    continue
                jobs = [
                    pool.submit(_descend, value[part], block, found[part], *fixed) for part in parts
                ]
                for job in jobs:
                    job.result()
    return out


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function when it is called; keep that on disk where there is a folder for it."""
    try:
        compiled = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the folder of this file nor one of the user can be written
        compiled = numba.njit(nogil=True)(function)
    found: Callable[..., Any] = compiled
    return found


@_jit
def _best(score: Any, size: int, least: int, capacity: int, count: Any, place: Any) -> int:
    """Write the places of the best `capacity` scores, ascending, and return how many there are.

    Of equal scores the first ones are taken where not all of them have room.
    """
    count[:] = 0
    for at in range(size):
        count[score[at]] += 1
    bound, room = _SCORES - 1, capacity
    while bound >= least and count[bound] <= room:
        room -= count[bound]
        bound -= 1
    # all above the bound are kept, and as many at it as there is room for
    if bound < least:
        room = 0
    kept = 0
    for at in range(size):
        if score[at] > bound or (score[at] == bound and room > 0):
            room -= score[at] == bound
            place[kept] = at
            kept += 1
    return kept


@_jit
def _descend(
    value: Any, places: Any, found: Any, nodes: int, levels: int, repetitions: int, width: int,
    unit: int, least: int, capacity: int, num_rows: int,
) -> None:  # fmt: skip
    """Descend the tree for each of some columns.

    Args:
        value: products `[columns, R]`, the top level first, then those of the hashed levels, each
            by repetitions.
        places: `[nodes above hashed levels, repetitions]`, or wider.
        found: int64 `[columns, slots]`, written.
        nodes: those of the top level.
        levels: how many are hashed.
        repetitions: of each level.
        width: buckets of a hashed level.
        unit: the largest byte.
        least: the score that is enough.
        capacity: nodes that are kept.
        num_rows: leaves from it on are no rows.
    """
    slots = found.shape[1]
    most = max(nodes, capacity * BRANCHING)
    score, place = np.empty(most, np.int32), np.empty(most, np.int64)
    count = np.empty(_SCORES, np.int32)
    # the bytes of eight siblings are a word; words add up without carries
    byte, blocks = np.empty(repetitions * width, np.uint8), width // BRANCHING
    word = byte.view(np.uint64)
    limit = value.dtype.type(unit)
    for column in range(value.shape[0]):
        row, node = value[column], found[column]
        score[:nodes] = 0
        for repetition in range(repetitions):
            for at in range(nodes):
                y = row[repetition * nodes + at]
                score[at] += np.int32(min(y * y, limit))
        kept = _best(score, nodes, least, capacity, count, place)
        parents = place[:kept].copy()
        start, first, here = repetitions * nodes, 0, nodes
        for _ in range(levels):
            for at in range(repetitions * width):
                y = row[start + at]
                byte[at] = np.uint8(min(y * y, limit))
            for slot in range(kept):
                total = np.uint64(0)
                for repetition in range(repetitions):
                    block = np.int64(places[first + parents[slot], repetition])
                    total += word[repetition * blocks + block]
                for child in range(BRANCHING):
                    score[slot * BRANCHING + child] = np.uint8(total >> np.uint64(8 * child))
            kept = _best(score, kept * BRANCHING, least, capacity, count, place)
            children = np.empty(kept, np.int64)
            for slot in range(kept):
                at = place[slot]
                children[slot] = parents[at // BRANCHING] * BRANCHING + at % BRANCHING
            parents = children
            start, first, here = start + repetitions * width, first + here, here * BRANCHING
        for slot in range(slots):
            node[slot] = parents[slot] if slot < kept and parents[slot] < num_rows else -1
