"""Clusters in small layered graphs: edges that both ends name, components, and spectral cuts.

A graph has 8 layers of 8 cells: a set of its vertices is a word of 64 bits, one byte a layer. Every
vertex that holds a heavy row names one cell in each of the layers next to its own, and two vertices
are joined where each names the other. The vertices of one heavy row then form a copy of the
expander, less what noise took away: a cluster. Two clusters that noise has joined are parted where
the conductance is least.

All arithmetic is of whole numbers, so that any other decoder can do the same, bit for bit: see
`numba_expander` and `kernels.triton.clusters`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..kernels.ops.names import CELLS, DEGREE, VERTICES
from .codes import SYMBOL_BITS
from .expander_graph import ExpanderGraph

__all__ = [
    "CUTS",
    "GRAPH",
    "ITERATIONS",
    "LARGEST",
    "STEPS",
    "Edges",
    "components",
    "has_twins",
    "mutual_edges",
    "name_tables",
    "parted",
    "start_values",
]

GRAPH = ExpanderGraph(
    neighbours=(
        (1, 5, 6, 7), (0, 3, 6, 7), (3, 4, 5, 7), (1, 2, 4, 7),
        (2, 3, 5, 6), (0, 2, 4, 6), (0, 1, 4, 5), (0, 1, 2, 3),
    )
)  # fmt: skip
"""The expander on the layers, one of those with the least second eigenvalue among what
`ExpanderGraph.make(8, 4)` draws, written down, so that compiled code draws nothing. Every set of up
to 4 layers has at least 0.32 of its edges' ends outside."""

STEPS = 7
"""Steps of propagation: any path through a cluster of 8 vertices."""

CUTS = 2
"""Cuts of a graph, at most."""

ITERATIONS = 20
"""Of `8 I - Laplacian`. Where a few edges join two clusters, what is not the direction that parts
them falls behind it by a factor of 20 or more."""

LARGEST = 1 << 20
"""Of the values that are iterated: sums of 64, times 8, fit 31 bits."""

CONDUCTANCE = 0.35
"""A cut is made where its conductance is at most this: copies of the expander have more even where
some vertices are gone, and only components with two vertices in a layer are cut at all."""

SCALE_BITS = 16
"""Fraction bits of a conductance: `(cut << 16) // volume`, at most that of `CONDUCTANCE`."""

MOST = int(CONDUCTANCE * (1 << SCALE_BITS))

_ONES, _LOW = 0x0101010101010101, 0x7F7F7F7F7F7F7F7F


class Edges(NamedTuple):
    """The edges of graphs.

    Attributes:
        target: int64 `[..., 4, 64]`, the vertex that each one names in its `s`-th next layer.
        is_edge: bool, the same shape, whether that names it back.
    """

    target: torch.Tensor
    is_edge: torch.Tensor


@functools.lru_cache(maxsize=32)
def name_tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for every vertex the first vertex of its `s`-th next layer, and where that names it.

    Returns:
        int64 `[4, 64]`: a vertex; and the lowest bit of a name that is the cell of this layer.
    """
    neighbours, place = GRAPH.tables(torch.device("cpu"))
    tables = (neighbours * CELLS, place * SYMBOL_BITS)
    first, shift = (x.T.repeat_interleave(CELLS, dim=1).to(device) for x in tables)
    return first, shift


def mutual_edges(word: torch.Tensor) -> Edges:
    """Return the edges whose ends name each other.

    Args:
        word: int64 `[..., 64]`, what vertices say, above 0 where they hold something: bits `3 s` to
            `3 s + 2` are the cell that a vertex names in its `s`-th neighbouring layer.
    """
    first, shift = name_tables(word.device)
    place = SYMBOL_BITS * torch.arange(DEGREE, device=word.device).unsqueeze(-1)
    target = first + ((word.unsqueeze(-2) >> place) & (CELLS - 1))
    said = word.unsqueeze(-2).expand(target.shape).gather(-1, target)
    cell = torch.arange(VERTICES, device=word.device) % CELLS
    is_back = ((said >> shift) & (CELLS - 1)) == cell
    return Edges(target, is_back & (said > 0) & (word > 0).unsqueeze(-2))


def components(word: torch.Tensor, edges: Edges) -> torch.Tensor:
    """Return the set of vertices that each vertex is joined to, itself among them: int64.

    Vertices that hold nothing have the empty set. Ways of more than `STEPS` edges are not followed.
    """
    bit = torch.ones_like(word) << torch.arange(VERTICES, device=word.device)
    found = torch.where(word > 0, bit, 0)
    for _ in range(STEPS):
        there = found.unsqueeze(-2).expand(edges.target.shape).gather(-1, edges.target)
        there = torch.where(edges.is_edge, there, 0)
        for place in range(DEGREE):
            found = found | there[..., place, :]
    return found


def has_twins(members: torch.Tensor) -> torch.Tensor:
    """Return which sets hold two vertices of one layer."""
    x = members
    # bit by bit, what is set beside another of the same byte
    seen, twice = torch.zeros_like(x), torch.zeros_like(x)
    for cell in range(CELLS):
        bit = (x >> cell) & _ONES
        twice = twice | (seen & bit)
        seen = seen | bit
    return twice != 0


def num_layers(members: torch.Tensor) -> torch.Tensor:
    """Return in how many layers sets have vertices."""
    low = members & _LOW
    used = (((low + _LOW) | members) >> 7) & _ONES
    return (used * _ONES) >> 56


def start_values(device: torch.device) -> torch.Tensor:
    """Return what the iteration begins with: int64 `[64]`, without structure, below `LARGEST`."""
    return ((torch.arange(VERTICES, device=device) * 40503 & 4095) - 2048) * (LARGEST >> 11)


def parted(word: torch.Tensor, edges: Edges, members: torch.Tensor, least: int) -> torch.Tensor:
    """Return sets after components with two vertices in a layer were cut in two.

    In each of `CUTS` rounds the first such component of a graph is ordered by an approximate
    eigenvector of its Laplacian, of the least eigenvalue but 0, and cut where the conductance is
    least, if that is at most `CONDUCTANCE`.

    Args:
        word: int64 `[graphs, 64]`.
        edges: of these graphs.
        members: int64 `[graphs, 64]`, see `components`.
        least: layers of a component, at least; smaller ones are no cluster anyway.

    Cost: `64^2` comparisons a graph and round. Deterministic, in whole numbers.
    Source: Larsen, Nelson, Nguyen and Thorup (2016), Section 5. Departures: the Laplacian
        instead of the walk; an approximate vector; no certificates; nothing is grabbed after a cut.
    """
    vertex = torch.arange(VERTICES, device=word.device)
    for _ in range(CUTS):
        is_joined = has_twins(members) & (num_layers(members) >= least)
        first = torch.where(is_joined, vertex, VERTICES).amin(dim=-1, keepdim=True)
        chosen = members.gather(-1, first.clamp(max=VERTICES - 1))
        chosen = torch.where(first < VERTICES, chosen, 0)
        inside = ((chosen >> vertex) & 1) == 1
        is_edge = edges.is_edge & inside.unsqueeze(-2)
        value = _iterated(edges.target, is_edge, inside)
        side = _best_side(edges.target, is_edge, inside, value)
        there = side.unsqueeze(-2).expand(edges.target.shape).gather(-1, edges.target)
        edges = Edges(edges.target, edges.is_edge & (there == side.unsqueeze(-2)))
        members = components(word, edges)
    return members


def _at(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return value.unsqueeze(-2).expand(target.shape).gather(-1, target)


def _iterated(target: torch.Tensor, is_edge: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Return values of vertices whose order parts a component: int64 `[graphs, 64]`."""
    value = torch.where(inside, start_values(target.device), 0)
    degree = is_edge.sum(dim=-2)
    count = inside.sum(dim=-1, keepdim=True).clamp(min=1)
    for _ in range(ITERATIONS):
        there = torch.where(is_edge, _at(value, target), 0).sum(dim=-2)
        value = torch.where(inside, ((8 - degree) * value + there) >> 3, 0)
        # the quotient of a number that is not negative is the same everywhere
        mean = (value.sum(dim=-1, keepdim=True) + 64 * LARGEST) // count - 64 * LARGEST // count
        value = torch.where(inside, value - mean, 0)
    return value


def _best_side(
    target: torch.Tensor, is_edge: torch.Tensor, inside: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Return one side of the best cut, bool `[graphs, 64]`; none if it is a bad one."""
    there = _at(value, target)
    bound = value.unsqueeze(-1)  # of every vertex, against all
    is_below = value.unsqueeze(-2) <= bound
    cut = torch.zeros_like(value)
    volume = torch.zeros_like(value)
    for place in range(DEGREE):
        counted = is_below & is_edge[:, place].unsqueeze(-2)
        volume += counted.sum(dim=-1)
        cut += (counted & (there[:, place].unsqueeze(-2) > bound)).sum(dim=-1)
    total = is_edge.sum(dim=(-2, -1)).unsqueeze(-1)
    smaller = torch.minimum(volume, total - volume)
    score = (cut << SCALE_BITS) // smaller.clamp(min=1)
    score = torch.where(inside & (smaller > 0), score, MOST + 1)
    # the first vertex of the least score
    best, at = (score * VERTICES + torch.arange(VERTICES, device=value.device)).min(dim=-1)
    chosen = value.gather(-1, at.unsqueeze(-1))
    is_good = (best // VERTICES <= MOST).unsqueeze(-1)
    return inside & (value <= chosen) & is_good
