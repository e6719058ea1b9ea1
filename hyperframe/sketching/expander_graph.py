"""A regular graph that expands: what ties the layers of a sketch to each other."""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass

import torch

from ..errors import ArgumentError

__all__ = ["ExpanderGraph"]

_TRIALS = 64  # random graphs among which the best is taken
_SLACK = 1.15  # above the least possible second eigenvalue of large graphs


@dataclass(frozen=True, kw_only=True)
class ExpanderGraph:
    """A regular graph without loops and double edges, and a gap in its spectrum.

    Args:
        neighbours: for every vertex its neighbours, in ascending order.

    Example:
        >>> graph = ExpanderGraph.make(10, 4)
        >>> graph.degree, graph.second_eigenvalue() < 4, graph.conductance_bound() > 0
        (4, True, True)
    """

    neighbours: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        """Check that the graph is regular, symmetric and simple."""
        degrees = {len(row) for row in self.neighbours}
        for vertex, row in enumerate(self.neighbours):
            is_simple = vertex not in row and len(set(row)) == len(row)
            if not is_simple or any(vertex not in self.neighbours[other] for other in row):
                raise ArgumentError(
                    f"neighbours: those of vertex {vertex}, {row}, are not those of an undirected "
                    "graph without loops and double edges; name every edge once at both ends"
                )
        if len(degrees) != 1:
            raise ArgumentError(
                f"neighbours: the degrees {sorted(degrees)} differ; give every vertex the same "
                "number of neighbours"
            )

    @classmethod
    def make(cls, num_vertices: int, degree: int) -> ExpanderGraph:
        """Return an expander: always the same one for the same sizes.

        The complete graph where `degree >= num_vertices - 1`; otherwise the random regular graph
        with the least second eigenvalue among some, which is then checked: at most
        `1.15 * 2 sqrt(degree - 1)`. A random regular graph comes as near to the least possible,
        `2 sqrt(degree - 1)`, as one likes (Friedman 2008).

        Args:
            num_vertices: at least 2.
            degree: at least 3 (or all other vertices); with an odd one, an even number of vertices.

        Raises:
            ArgumentError: there is no such graph.

        Cost: a few milliseconds for tens of vertices, once a process. Deterministic.
        """
        if num_vertices < 2 or degree < 1:
            raise ArgumentError(
                f"expander graph: {num_vertices} vertices of degree {degree} make no graph; ask "
                "for 2 vertices or more of degree 1 or more"
            )
        if degree >= num_vertices - 1:
            everyone = range(num_vertices)
            return cls(neighbours=tuple(tuple(j for j in everyone if j != i) for i in everyone))
        if degree < 3 or degree * num_vertices % 2:
            raise ArgumentError(
                f"expander graph: no {num_vertices} vertices of degree {degree} expand: cycles do "
                "not, and an odd number of ends makes no edges; pass a degree of 4"
            )
        return _best_random(num_vertices, degree)

    @property
    def num_vertices(self) -> int:
        """Number of vertices."""
        return len(self.neighbours)

    @property
    def degree(self) -> int:
        """Neighbours of each vertex."""
        return len(self.neighbours[0])

    def eigenvalues(self) -> list[float]:
        """Return the eigenvalues of the adjacency matrix, ascending."""
        adjacency = torch.zeros(self.num_vertices, self.num_vertices, dtype=torch.float64)
        for vertex, row in enumerate(self.neighbours):
            adjacency[vertex, list(row)] = 1.0
        return [float(value) for value in torch.linalg.eigvalsh(adjacency)]

    def second_eigenvalue(self) -> float:
        """Return the largest absolute eigenvalue beside the degree."""
        values = self.eigenvalues()
        return max(abs(values[0]), abs(values[-2]))

    def conductance_bound(self) -> float:
        """Return a lower bound of the conductance of every cut, the spectral gap halved.

        A set of at most half of the vertices has at least this share of its edges' ends outside
        (the easy side of Cheeger's inequality).
        """
        return (1 - self.eigenvalues()[-2] / self.degree) / 2

    def tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the neighbours, and the place that a vertex has among those of its neighbour.

        Returns:
            int64 `[vertices, degree]` each: `neighbours[neighbours[k, s], place[k, s]] == k`.
        """
        return _tables(self, device)


@functools.lru_cache(maxsize=32)
def _tables(graph: ExpanderGraph, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept: a copy to a GPU would wait for it."""
    place = [
        [graph.neighbours[other].index(vertex) for other in row]
        for vertex, row in enumerate(graph.neighbours)
    ]
    return torch.tensor(graph.neighbours, device=device), torch.tensor(place, device=device)


@functools.cache
def _best_random(num_vertices: int, degree: int) -> ExpanderGraph:
    draws = random.Random(num_vertices * 1000 + degree)
    graphs = [_random_regular(num_vertices, degree, draws) for _ in range(_TRIALS)]
    # of equal ones the first: processors differ in the last digits
    found = min(graphs, key=lambda graph: round(graph.second_eigenvalue(), 9))
    bound = _SLACK * 2 * math.sqrt(degree - 1)
    if found.second_eigenvalue() > bound or found.eigenvalues()[-2] > degree - 1e-6:
        raise ArgumentError(
            f"expander graph: none of {_TRIALS} random graphs on {num_vertices} vertices of degree "
            f"{degree} has a second eigenvalue below {bound:.3f}; pass a larger degree"
        )
    return found


def _random_regular(num_vertices: int, degree: int, draws: random.Random) -> ExpanderGraph:
    """One edge after another between vertices that lack some, anew where that ends in a corner."""
    if 2 * degree >= num_vertices:
        # what a sparse graph leaves out: few tries find that one
        rest = _random_regular(num_vertices, num_vertices - 1 - degree, draws).neighbours
        everyone = range(num_vertices)
        rows = (tuple(j for j in everyone if j != i and j not in rest[i]) for i in everyone)
        return ExpanderGraph(neighbours=tuple(rows))
    while True:
        edges: set[tuple[int, int]] = set()
        ends = [vertex for vertex in range(num_vertices) for _ in range(degree)]
        while ends:
            draws.shuffle(ends)
            left: list[int] = []
            for a, b in zip(ends[::2], ends[1::2], strict=True):
                edge = (min(a, b), max(a, b))
                if a == b or edge in edges:
                    left += [a, b]
                else:
                    edges.add(edge)
            lacking = set(left)
            is_stuck = all((a, b) in edges for a in lacking for b in lacking if a < b)
            ends = left
            if left and is_stuck:
                break
        if not ends:
            break
    joined: list[list[int]] = [[] for _ in range(num_vertices)]
    for a, b in edges:
        joined[a].append(b)
        joined[b].append(a)
    return ExpanderGraph(neighbours=tuple(tuple(sorted(row)) for row in joined))
