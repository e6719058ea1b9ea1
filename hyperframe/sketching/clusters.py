"""Clusters in small layered graphs: edges that both ends name, components, and spectral cuts.

A graph has `layers x cells` vertices, the layers those of an `ExpanderGraph`. Every vertex names
one cell in each of the layers next to its own, and two vertices are joined where each names the
other. The vertices of one heavy index then form a copy of the expander, less what noise took away:
a cluster. Two clusters that noise has joined are parted where the conductance is least.

All functions work on many graphs at once, with sizes that are known beforehand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .expander_graph import ExpanderGraph

__all__ = [
    "ClusterWords",
    "cluster_words",
    "component_labels",
    "is_ambiguous",
    "mutual_edges",
    "parted_labels",
]

CONDUCTANCE = 0.35
"""A cut is made where its conductance is at most this.

Copies of the expanders in use have a conductance of 0.2 to 0.5 even where some vertices are gone,
and only components that hold two vertices of a layer are cut at all; two copies that share a few
edges are joined by much less.
"""

GRAB_SHARE = 5 / 9
"""A vertex with at least this share of its edges on one side goes to that side."""

_STEPS = 5  # of propagation, which doubles its reach: enough for paths of some dozen vertices
_SQUARINGS = 9  # of the walk whose slowest direction parts a component


class ClusterWords(NamedTuple):
    """What the clusters of a graph say, layer by layer.

    Attributes:
        symbol: int64 `[..., slots, layers]`; 0 where nothing is known.
        is_missing: bool, the same shape: no vertex of the layer, or several.
        root: int64 `[..., slots]`, the first vertex; the number of vertices for no cluster.
    """

    symbol: torch.Tensor
    is_missing: torch.Tensor
    root: torch.Tensor


def mutual_edges(
    named: torch.Tensor, is_heavy: torch.Tensor, graph: ExpanderGraph, num_cells: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the edges whose ends name each other.

    Args:
        named: integer `[..., degree, layers * cells]`: the cell that a vertex names in its `s`-th
            neighbouring layer.
        is_heavy: bool `[..., layers * cells]`; other vertices name nothing.
        graph: joins the layers.
        num_cells: cells of a layer.

    Returns:
        int64 targets (vertices) and bool, whether there is an edge; both like `named`.
    """
    neighbours, place = graph.tables(named.device)
    num_vertices = is_heavy.shape[-1]
    cell = torch.arange(num_vertices, device=named.device) % num_cells
    # what is not heavy names no cell that there is
    said = torch.where(is_heavy.unsqueeze(-2), named, num_cells)
    # one row for each place among the neighbours, one column for each vertex
    layer_start = (neighbours.T * num_cells).repeat_interleave(num_cells, dim=-1)
    row_start = (place.T * num_vertices).repeat_interleave(num_cells, dim=-1)
    target = named.long().add_(layer_start)
    back = said.flatten(-2).gather(-1, (row_start + target).flatten(-2)).view(target.shape)
    return target, (back == cell.to(back.dtype)) & is_heavy.unsqueeze(-2)


def component_labels(
    target: torch.Tensor, is_edge: torch.Tensor, is_heavy: torch.Tensor
) -> torch.Tensor:
    """Return the smallest vertex of every vertex's component, by propagation and pointer jumping.

    Args:
        target: int64 `[..., degree, vertices]`, as `mutual_edges` returns them.
        is_edge: bool, the same shape.
        is_heavy: bool `[..., vertices]`.

    Returns:
        int64 `[..., vertices]`; the number of vertices where a vertex is not heavy. Components
        wider than some dozen vertices may keep several labels.
    """
    degree, num_vertices = target.shape[-2:]
    vertex = torch.arange(num_vertices, device=target.device)
    label = torch.where(is_heavy, vertex, num_vertices)
    # what is no edge leads to the vertex itself
    target = torch.where(is_edge, target, vertex)
    for _ in range(_STEPS):
        spread = label
        for place in range(degree):
            spread = torch.minimum(spread, label.gather(-1, target[..., place, :]))
        label = spread
        padded = torch.nn.functional.pad(label, (0, 1), value=num_vertices)
        label = padded.gather(-1, label)
    return label


def cluster_words(
    label: torch.Tensor, symbol: torch.Tensor, *, num_layers: int, num_slots: int, least: int
) -> ClusterWords:  # fmt: skip
    """Return the symbols of the clusters of every graph.

    Args:
        label: int64 `[..., layers * cells]`, see `component_labels`.
        symbol: integer, the same shape: what each vertex says.
        num_layers: number of layers.
        num_slots: clusters of a graph, at most; further ones are left out.
        least: vertices that make a cluster.
    """
    num_vertices = label.shape[-1]
    vertex = torch.arange(num_vertices, device=label.device)
    ones = torch.ones_like(label)
    shape = (*label.shape[:-1], num_vertices + 1)
    size = label.new_zeros(shape).scatter_add_(-1, label, ones)
    is_root = (label == vertex) & (size[..., :-1] >= least)
    slot = torch.where(is_root, is_root.cumsum(dim=-1) - 1, num_slots).clamp(max=num_slots)
    root = label.new_full((*label.shape[:-1], num_slots + 1), num_vertices)
    root.scatter_(-1, slot, torch.where(slot < num_slots, vertex, num_vertices))
    slot = torch.nn.functional.pad(slot, (0, 1), value=num_slots).gather(-1, label)
    layer = vertex // (num_vertices // num_layers)
    place = slot * num_layers + layer
    flat = label.new_zeros((*label.shape[:-1], (num_slots + 1) * num_layers))
    count = flat.scatter_add(-1, place, ones)
    total = flat.scatter_add_(-1, place, symbol.long())
    count, total = (
        x.unflatten(-1, (num_slots + 1, num_layers))[..., :-1, :] for x in (count, total)
    )
    return ClusterWords(
        symbol=torch.where(count == 1, total, 0), is_missing=count != 1, root=root[..., :-1]
    )


def is_ambiguous(label: torch.Tensor, *, num_layers: int, least: int) -> torch.Tensor:
    """Return which labels are of components with two vertices of one layer.

    Args:
        label: int64 `[..., layers * cells]`, see `component_labels`.
        num_layers: number of layers.
        least: vertices of a component, at least; smaller ones say nothing either way.

    Returns:
        bool `[..., layers * cells]`, for every label.
    """
    num_vertices = label.shape[-1]
    layer = torch.arange(num_vertices, device=label.device) // (num_vertices // num_layers)
    count = label.new_zeros((*label.shape[:-1], (num_vertices + 1) * num_layers))
    count.scatter_add_(-1, label * num_layers + layer, torch.ones_like(label))
    count = count.unflatten(-1, (num_vertices + 1, num_layers))[..., :-1, :]
    is_large = count.sum(dim=-1) >= least
    return torch.logical_and((count > 1).any(dim=-1), is_large)


def parted_labels(
    target: torch.Tensor, is_edge: torch.Tensor, label: torch.Tensor, *, num_layers: int,
    least: int, rounds: int = 3,
) -> torch.Tensor:  # fmt: skip
    """Return labels after components that hold two vertices of a layer were cut in two.

    In each round the first such component of a graph is ordered by the second eigenvector of its
    random walk, and cut behind the prefix of least conductance, if that is at most `CONDUCTANCE`;
    vertices that have most of their edges on the other side then change sides.

    Args:
        target: int64 `[graphs, degree, vertices]`, as `mutual_edges` returns them.
        is_edge: bool, the same shape.
        label: int64 `[graphs, vertices]`, see `component_labels`.
        num_layers: number of layers.
        least: vertices that make a cluster.
        rounds: cuts of a graph, at most.

    Returns:
        int64 `[graphs, vertices]`.
    Cost: O(vertices^3) a graph and round. Deterministic.
    Source: Larsen, Nelson, Nguyen and Thorup (2016), Section 5 (spectral cuts, then "grab").
        Departures: one eigenvector by repeated squaring instead of a recursion with certificates;
        the cut that is tested is the best of the sweep.
    """
    num_vertices = label.shape[-1]
    vertex = torch.arange(num_vertices, device=label.device)
    is_heavy = label < num_vertices
    for _ in range(rounds):
        is_joined = is_ambiguous(label, num_layers=num_layers, least=least)
        # members of the first of them; vertices that are not heavy carry the number of vertices
        chosen = torch.where(is_joined, vertex, num_vertices).amin(dim=-1, keepdim=True)
        member = (label == chosen) & is_heavy
        adjacency = _adjacency(target, is_edge & member.unsqueeze(1))
        side = _grabbed(adjacency, _sweep_cut(adjacency))
        across = side.unsqueeze(1).expand(target.shape).gather(-1, target) != side.unsqueeze(1)
        is_edge = is_edge & ~across
        label = component_labels(target, is_edge, is_heavy)
    return label


def _adjacency(target: torch.Tensor, is_edge: torch.Tensor) -> torch.Tensor:
    """Return 0 and 1 for every pair of vertices: float32 `[graphs, vertices, vertices]`."""
    graphs, _, num_vertices = target.shape
    dense = torch.zeros((graphs, num_vertices, num_vertices + 1), device=target.device)
    where = torch.where(is_edge, target, num_vertices)
    return dense.scatter_(-1, where.transpose(-1, -2), 1.0)[..., :-1]


def _grabbed(adjacency: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """Move vertices to where most of their edges lead; a side that is empty stays so."""
    degree, has_cut = adjacency.sum(dim=-1), side.any(dim=-1, keepdim=True)
    for _ in range(2):
        there = (adjacency @ side.to(adjacency.dtype).unsqueeze(-1)).squeeze(-1)
        leaves, joins = degree - there >= GRAB_SHARE * degree, there >= GRAB_SHARE * degree
        side = torch.where(joins | leaves, joins & (degree > 0), side) & has_cut
    return side


def _sweep_cut(edges: torch.Tensor) -> torch.Tensor:
    """Return one side of the best cut of the vertices that have edges; none if it is a bad one."""
    degree = edges.sum(dim=-1)
    is_part = degree > 0
    root = degree.sqrt()
    inverse = torch.where(is_part, 1 / root.clamp(min=1), 0)
    # lazy walk, made symmetric; its first eigenvector, the root of the degrees, is taken out
    walk = inverse.unsqueeze(-1) * edges * inverse.unsqueeze(-2)
    walk = 0.5 * (torch.diag_embed(is_part.to(edges.dtype)) + walk)
    volume = degree.sum(dim=-1, keepdim=True).clamp(min=1)
    walk = walk - root.unsqueeze(-1) * root.unsqueeze(-2) / volume.unsqueeze(-1)
    for _ in range(_SQUARINGS):
        walk = walk @ walk
        walk = walk / walk.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=1e-30)
    # any vector that is not orthogonal to the second eigenvector will do
    vertex = torch.arange(edges.shape[-1], device=edges.device, dtype=edges.dtype)
    start = torch.cos(vertex * 1.7 + 0.3 * vertex.square()).unsqueeze(-1)
    value = (walk @ start).squeeze(-1) * inverse
    # vertices without edges lie behind all others
    order = torch.where(is_part, value, torch.inf).argsort(dim=-1)
    sorted_degree = degree.gather(-1, order)
    index = order.unsqueeze(-1).expand_as(edges)
    edges = edges.gather(-2, index).gather(-1, order.unsqueeze(-2).expand_as(edges))
    before = sorted_degree.cumsum(dim=-1)
    # edges from the prefix to what comes behind: ends of the prefix less those that stay in it
    stays = (edges.tril().sum(dim=-1) * 2).cumsum(dim=-1)
    smaller = torch.minimum(before, volume - before)
    conductance = torch.where(smaller > 0, (before - stays) / smaller.clamp(min=1), torch.inf)
    least, place = conductance.min(dim=-1, keepdim=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank <= place) & is_part & (least <= CONDUCTANCE)
