"""The decoding of an ExpanderSketch on a CPU, compiled by numba: a column at a time, in the caches.

`expander_decoding.torch_rows` makes names, edges and clusters of many columns in passes over
memory. Here the products of a few columns are made by torch, and one compiled pass decodes each:
what a cell says beside its plain sum is looked at only where that is large enough, and a graph only
where enough layers hold names. All steps are explained there and in `clusters`; the whole numbers
are the same.

This module imports numba and is imported when it is used. Python's threads share the columns; see
`numba_decoder`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ..kernels.ops.names import DEGREE, NUM_OUTPUTS, VERTICES
from ..precision import without_autocast
from .clusters import CUTS, ITERATIONS, LARGEST, MOST, SCALE_BITS, STEPS, name_tables, start_values
from .codes import SYMBOL_BITS, CellCode
from .expander_decoding import EVEN, NAMED, PLAIN, SHARE
from .numba_decoder import _jit, num_threads

__all__ = ["numba_rows"]

_CHUNK_BYTES = 2 << 20  # of products held at once
_LEAST_COLUMNS = 64  # of a chunk, lest the products be slow


def numba_rows(
    key: torch.Tensor, sketch: torch.Tensor, bucket_order: torch.Tensor, message: int,
    factor: float, capacity: int, num_rows: int, spectral: bool,
) -> torch.Tensor:  # fmt: skip
    """Do what `expander_decoding.torch_rows` says, on a CPU, in float32 or float64.

    The same rows in the same order for the same products, however many threads there are.
    """
    heads, columns, _ = key.shape
    buckets = sketch.shape[1]
    out = torch.full((heads, columns, capacity), -1, dtype=torch.int64)
    key = (key * factor).to(sketch.dtype)
    device = torch.device("cpu")
    contribution, correction = (x.numpy() for x in CellCode(message=message).tables(device))
    first, shift = (x.numpy() for x in name_tables(device))
    start_value = start_values(device).numpy()
    size = buckets * NUM_OUTPUTS * VERTICES * sketch.element_size()
    step = max(_LEAST_COLUMNS, _CHUNK_BYTES // size)
    threads = num_threads()
    with ThreadPoolExecutor(threads) as pool, without_autocast(key):
        for head in range(heads):
            rows = sketch[head].flatten(0, 2).T
            order = bucket_order[head].contiguous().numpy()
            for start in range(0, columns, step):
                value = (key[head, start : start + step] @ rows).numpy()
                value = value.reshape(len(value), buckets, NUM_OUTPUTS, VERTICES)
                found = out[head, start : start + step].numpy()
                share = -(-len(value) // threads)
                fixed = (
                    order, first, shift, contribution, correction, start_value, message, num_rows,
                    spectral,
                )  # fmt: skip
                parts = [slice(at, at + share) for at in range(0, len(value), share)]
                jobs = [pool.submit(_decode, value[part], found[part], *fixed) for part in parts]
                for job in jobs:
                    job.result()
    return out


@_jit
def _names(value: Any, word: Any) -> int:
    """Write what the vertices of a bucket say; return how many layers hold a name."""
    layers = 0
    for vertex in range(VERTICES):
        word[vertex] = 0
        plain = value[0, vertex]
        if plain * plain < PLAIN:
            continue
        energy, size, name = plain * plain, abs(plain), 0
        for number in range(1, NUM_OUTPUTS):
            x = value[number, vertex]
            energy += x * x
            size += abs(x)
            name = (name << 1) | ((x < 0) != (plain < 0))
        is_even = size * size >= NUM_OUTPUTS * EVEN * energy
        if energy >= NUM_OUTPUTS * SHARE and is_even:
            word[vertex] = name | NAMED
            layers |= 1 << (vertex >> 3)
    held = 0
    while layers:
        held += layers & 1
        layers >>= 1
    return held


@_jit
def _components(word: Any, target: Any, is_edge: Any, members: Any, there: Any) -> None:
    for vertex in range(VERTICES):
        members[vertex] = np.uint64(1) << np.uint64(vertex) if word[vertex] > 0 else np.uint64(0)
    for _ in range(STEPS):
        there[:] = members
        changed = False
        for vertex in range(VERTICES):
            if word[vertex] > 0:
                for place in range(DEGREE):
                    if is_edge[place, vertex]:
                        members[vertex] |= there[target[place, vertex]]
                changed |= members[vertex] != there[vertex]
        if not changed:
            break


@_jit
def _layers(members: Any) -> tuple[int, bool]:
    """Return in how many layers a set has vertices, and whether in one there are two."""
    count, has_twins = 0, False
    for layer in range(8):
        cells = (members >> np.uint64(8 * layer)) & np.uint64(255)
        if cells != 0:
            count += 1
            has_twins |= (cells & (cells - np.uint64(1))) != 0
    return count, has_twins


@_jit
def _cut(target: Any, is_edge: Any, inside: Any, start_value: Any, side: Any) -> None:
    """Write one side of the best cut of a component; none if it is a bad one."""
    value, there = np.zeros(VERTICES, np.int64), np.zeros(VERTICES, np.int64)
    degree = np.zeros(VERTICES, np.int64)
    count, total = 0, 0
    for vertex in range(VERTICES):
        side[vertex] = 0
        if inside[vertex]:
            count += 1
            value[vertex] = start_value[vertex]
            for place in range(DEGREE):
                degree[vertex] += is_edge[place, vertex]
            total += degree[vertex]
    for _ in range(ITERATIONS):
        there[:] = value
        summed = 0
        for vertex in range(VERTICES):
            if inside[vertex]:
                x = (8 - degree[vertex]) * there[vertex]
                for place in range(DEGREE):
                    if is_edge[place, vertex]:
                        x += there[target[place, vertex]]
                value[vertex] = x >> 3
                summed += x >> 3
        mean = (summed + 64 * LARGEST) // count - 64 * LARGEST // count
        for vertex in range(VERTICES):
            if inside[vertex]:
                value[vertex] -= mean
    least, chosen = MOST + 1, 0
    for one in range(VERTICES):
        if not inside[one]:
            continue
        bound, cut, volume = value[one], 0, 0
        for vertex in range(VERTICES):
            if inside[vertex] and value[vertex] <= bound:
                volume += degree[vertex]
                for place in range(DEGREE):
                    cut += is_edge[place, vertex] and value[target[place, vertex]] > bound
        smaller = min(volume, total - volume)
        if smaller > 0 and (cut << SCALE_BITS) // smaller < least:
            least, chosen = (cut << SCALE_BITS) // smaller, bound
    if least <= MOST:
        for vertex in range(VERTICES):
            side[vertex] = inside[vertex] and value[vertex] <= chosen


@_jit
def _part(
    word: Any, target: Any, is_edge: Any, members: Any, there: Any, start_value: Any, least: int
) -> None:
    """Cut components with two vertices in a layer."""
    inside, side = np.zeros(VERTICES, np.bool_), np.zeros(VERTICES, np.int64)
    within = np.zeros((DEGREE, VERTICES), np.bool_)
    for _ in range(CUTS):
        first = -1
        for vertex in range(VERTICES):
            if members[vertex] != 0 and first < 0:
                layers, has_twins = _layers(members[vertex])
                if has_twins and layers >= least:
                    first = vertex
        if first < 0:
            return
        chosen = members[first]
        for vertex in range(VERTICES):
            inside[vertex] = (chosen >> np.uint64(vertex)) & np.uint64(1) != 0
            for place in range(DEGREE):
                within[place, vertex] = is_edge[place, vertex] and inside[vertex]
        _cut(target, within, inside, start_value, side)
        for vertex in range(VERTICES):
            for place in range(DEGREE):
                if side[target[place, vertex]] != side[vertex]:
                    is_edge[place, vertex] = False
        _components(word, target, is_edge, members, there)


@_jit
def _decode(
    value: Any, found: Any, order: Any, first: Any, shift: Any, contribution: Any, correction: Any,
    start_value: Any, message: int, num_rows: int, spectral: bool,
) -> None:  # fmt: skip
    """Write the candidates of some columns.

    Args:
        value: products `[columns, buckets, 13, 64]`.
        found: int64 `[columns, capacity]`, written; -1 throughout before.
        order: int64, rows by bucket and place.
        first: see `clusters.name_tables`, and so is `shift`.
        shift: see there.
        contribution: see `codes.CodeTables`, and so is `correction`.
        correction: see there.
        start_value: see `clusters.start_values`.
        message: symbols of a message.
        num_rows: numbers from it on are no rows.
        spectral: part joined clusters.
    """
    buckets = value.shape[1]
    places, capacity = len(order) // buckets, found.shape[1]
    parity_bits = SYMBOL_BITS * (8 - message)
    word, target = np.zeros(VERTICES, np.int64), np.zeros((DEGREE, VERTICES), np.int64)
    is_edge = np.zeros((DEGREE, VERTICES), np.bool_)
    members, there = np.zeros(VERTICES, np.uint64), np.zeros(VERTICES, np.uint64)
    spelled = np.zeros(VERTICES, np.int64)
    for column in range(value.shape[0]):
        held = 0
        for bucket in range(buckets):
            if _names(value[column, bucket], word) < message:
                continue
            for vertex in range(VERTICES):
                for place in range(DEGREE):
                    at = first[place, vertex] + ((word[vertex] >> (SYMBOL_BITS * place)) & 7)
                    target[place, vertex] = at
                    is_back = (word[at] >> shift[place, vertex]) & 7 == vertex & 7
                    is_edge[place, vertex] = word[vertex] > 0 and word[at] > 0 and is_back
            _components(word, target, is_edge, members, there)
            if spectral:
                _part(word, target, is_edge, members, there, start_value, message)
            count = 0
            for vertex in range(VERTICES):
                mine = members[vertex]
                below = (np.uint64(1) << np.uint64(vertex)) - np.uint64(1)
                if mine == 0 or mine & below != 0 or _layers(mine)[0] < message:
                    continue
                total, missing = np.int64(0), 0
                for layer in range(8):
                    cells = np.int64((mine >> np.uint64(8 * layer)) & np.uint64(255))
                    total ^= contribution[layer, cells]
                    if cells == 0 or cells & (cells - 1) != 0:
                        missing |= 1 << layer
                entry = np.int64(correction[(missing << parity_bits) | (total >> 32)])
                if entry < 0:
                    continue
                at = (total & 0xFFFFFFFF) ^ entry
                is_new = at < places
                for other in range(count):
                    is_new = is_new and spelled[other] != at
                if not is_new:
                    continue
                spelled[count] = at
                count += 1
                row = order[bucket * places + at]
                if row < num_rows and held < capacity:
                    found[column, held] = row
                    held += 1
