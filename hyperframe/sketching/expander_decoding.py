"""What decodes the sketches of many columns into their heavy rows: names, clusters, words."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..kernels.ops.names import NUM_OUTPUTS, VERTICES
from ..kernels.sketch import runs_kernels
from ..precision import without_autocast
from .clusters import components, has_twins, mutual_edges, num_layers, parted
from .codes import CellCode
from .expander_sketch import ExpanderSketch

__all__ = ["EVEN", "NAMED", "PLAIN", "SHARE", "column_bytes", "expander_rows", "heavy_names"]

PLAIN = 0.15
"""Part of a heavy row's energy that the square of a cell's plain sum shows, or nothing else of the
cell is looked at: 27 % of cells without a heavy row go on, 4 % of those with one do not."""

SHARE = 0.45
"""Part of a heavy row's energy that the mean square of all sums of a cell shows. Of the rest of a
cell it is 1/8 on average, and with 13 looks hardly ever 1/4."""

EVEN = 0.8
"""The squared mean of the absolute sums over their mean square, at least. It is 1 for a row alone,
0.96 at the bound amid noise, 1/2 where two rows of the same size meet."""

NAMED = 1 << (NUM_OUTPUTS - 1)
"""The bit of a vertex that holds a name; the bits below it are the name."""

_MOST_TAU = 1e18  # of the search, whose squares must not overflow
_LEAST_COLUMNS, _CHUNK_BYTES = 64, 8 << 20


class Found(NamedTuple):
    """Clusters that are rows: bucket (of all columns), place in it; in order. int64 `[count]`."""

    graph: torch.Tensor
    place: torch.Tensor


def heavy_names(value: torch.Tensor) -> torch.Tensor:
    """Return what the vertices of graphs say: the point queries.

    Args:
        value: floating point `[..., 13, 64]`, sketches of columns, scaled so that a row at the
            bound has size 1.

    Returns:
        int64 `[..., 64]`: 0, or `NAMED` and the name.
    """
    energy, size = value.square().sum(dim=-2), value.abs().sum(dim=-2)
    is_named = value[..., 0, :].square() >= PLAIN
    is_named = is_named & (energy >= NUM_OUTPUTS * SHARE)
    is_named = is_named & (size.square() >= NUM_OUTPUTS * EVEN * energy)
    is_minus = value < 0
    bits = is_minus[..., 1:, :] ^ is_minus[..., :1, :]
    shift = torch.arange(NUM_OUTPUTS - 2, -1, -1, device=value.device).unsqueeze(-1)
    name = (bits.long() << shift).sum(dim=-2)
    return torch.where(is_named, name | NAMED, 0)


def expander_rows(
    drawn: ExpanderSketch, sketch: torch.Tensor, key: torch.Tensor, *, tau: float, capacity: int,
    spectral: bool = True, decoder: str = "torch",
) -> torch.Tensor:  # fmt: skip
    """Return candidates for the heavy rows of columns.

    Args:
        drawn: the map that made the sketch.
        sketch: what `drawn.apply` returns of the queries; may be of a lower precision.
        key: floating point `[heads, columns, d]`, scaled so that every column `Q k` has energy 1,
            or is zero.
        tau: a row is heavy if its square is at least `1 / tau`.
        capacity: candidates of a column at most. Where there are more, those of the first buckets
            are kept; of energy 1 there are no clusters for more than about `2.2 tau`.
        spectral: part clusters that noise has joined (see `clusters.parted`).
        decoder: `"torch"` (with Triton on CUDA, its kernels) or `"numba"`.

    Returns:
        int64 `[heads, columns, capacity]`, distinct rows of a column, then -1 for none. For the
        same products all decoders return the same, in the same order. No gradient.
    Cost: `d` products for every column and number of the sketch; of a bucket without names in as
        many layers as a message has symbols nothing more is looked at. On CUDA two launches, a
        byte for every bucket and 128 for one with a cluster, and no host synchronisation.
    """
    found: torch.Tensor = torch.ops.hyperframe.expander_rows(
        key, sketch, drawn.bucket_order, drawn.layout.code.message,
        math.sqrt(min(tau, _MOST_TAU)), capacity, drawn.num_rows, spectral, decoder,
    )  # fmt: skip
    return found


def column_bytes(sketch: torch.Tensor, capacity: int) -> int:
    """Return about how many bytes are held while a column of a head is searched."""
    buckets = sketch.shape[1]
    return buckets * (1 + 2 * VERTICES) + 8 * capacity


@torch.library.impl("hyperframe::expander_rows", "default")
def _run(
    key: torch.Tensor, sketch: torch.Tensor, bucket_order: torch.Tensor, message: int,
    factor: float, capacity: int, num_rows: int, spectral: bool, decoder: str,
) -> torch.Tensor:  # fmt: skip
    given = (key, sketch, bucket_order, message, factor, capacity, num_rows, spectral)
    if decoder == "numba":
        from .numba_expander import numba_rows

        return numba_rows(*given)
    if runs_kernels(key) and key.shape[-1] <= 256 and sketch.dtype != torch.float64:
        from ..kernels.triton import clusters as kernels
        from .clusters import name_tables

        code = CellCode(message=message)
        with torch.cuda.device(key.device):
            return kernels.triton_rows(
                *given, code.tables(key.device), name_tables(key.device), (PLAIN, SHARE, EVEN)
            )
    return torch_rows(*given)


def torch_rows(
    key: torch.Tensor, sketch: torch.Tensor, bucket_order: torch.Tensor, message: int,
    factor: float, capacity: int, num_rows: int, spectral: bool,
) -> torch.Tensor:  # fmt: skip
    """Do what `expander_rows` says, on any device; waits for it."""
    heads, columns, _ = key.shape
    buckets = sketch.shape[1]
    places = bucket_order.shape[1] // buckets
    out = torch.full((heads, columns, capacity), -1, dtype=torch.int64, device=key.device)
    key = (key * factor).to(sketch.dtype)
    code = CellCode(message=message)
    size = sketch[0, :, :, :, 0].numel() * max(4, sketch.element_size()) * 4
    step = max(_LEAST_COLUMNS, _CHUNK_BYTES // size)
    for head in range(heads):
        rows = sketch[head].flatten(0, 2).T
        for start in range(0, columns, step):
            part = key[head, start : start + step]
            with without_autocast(key):
                value = (part @ rows).view(-1, NUM_OUTPUTS, VERTICES)
            found = clusters_of(heavy_names(value), code, spectral=spectral)
            column, bucket = found.graph // buckets, found.graph % buckets
            place = found.place.clamp(max=places - 1)
            row = bucket_order[head][bucket * places + place]
            is_row = (found.place < places) & (row < num_rows)
            column, row = column[is_row], row[is_row]
            # the rank of a candidate among those of its column
            number = torch.arange(len(row), device=key.device)
            first = torch.searchsorted(column, torch.arange(len(part), device=key.device))
            slot = number - first[column]
            is_kept = slot < capacity
            out[head, start + column[is_kept], slot[is_kept]] = row[is_kept]
    return out


def clusters_of(word: torch.Tensor, code: CellCode, *, spectral: bool) -> Found:
    """Return what the clusters of graphs spell, graph by graph, first vertex by first vertex.

    Args:
        word: int64 `[graphs, 64]`, see `heavy_names`.
        code: of the places.
        spectral: part joined clusters.
    """
    least = code.message
    held = ((word > 0).unflatten(-1, (8, 8)).any(dim=-1)).sum(dim=-1)
    graph = (held >= least).nonzero().squeeze(-1)
    word = word[graph]
    edges = mutual_edges(word)
    members = components(word, edges)
    if spectral:
        needs = (has_twins(members) & (num_layers(members) >= least)).any(dim=-1).nonzero()
        needs = needs.squeeze(-1)
        some = type(edges)(edges.target[needs], edges.is_edge[needs])
        members[needs] = parted(word[needs], some, members[needs], least)
    vertex = torch.arange(VERTICES, device=word.device)
    # the first vertex of a set stands for it
    is_root = (members != 0) & ((members & -members) == (torch.ones_like(members) << vertex))
    is_root = is_root & (num_layers(members) >= least)
    at, root = is_root.nonzero().unbind(-1)
    place = code.decode(members[at, root])
    at, place = graph[at][place >= 0], place[place >= 0]
    # a row that was split in two halves is spelled twice
    both = at * code.num_words + place
    order = both.argsort(stable=True)
    is_first = torch.ones_like(both, dtype=torch.bool)
    is_first[order[1:]] = both[order[1:]] != both[order[:-1]]
    return Found(graph=at[is_first], place=place[is_first])
