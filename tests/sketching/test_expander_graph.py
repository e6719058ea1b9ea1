"""Expanders: regular, simple, always the same, with a gap that bounds every cut."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hyperframe.errors import ArgumentError
from hyperframe.sketching.expander_graph import ExpanderGraph

SIZES = [(8, 4), (10, 4), (14, 4), (16, 4), (32, 4), (10, 3), (12, 6), (7, 4), (6, 4)]


@pytest.mark.parametrize("num_vertices, degree", SIZES)
def test_the_second_eigenvalue_is_near_the_least_possible(num_vertices: int, degree: int) -> None:
    graph = ExpanderGraph.make(num_vertices, degree)
    assert (graph.num_vertices, graph.degree) == (num_vertices, degree)
    assert graph.eigenvalues()[-1] == pytest.approx(degree)
    # Ramanujan is 2 sqrt(d - 1)
    assert graph.second_eigenvalue() <= 1.15 * 2 * math.sqrt(degree - 1)
    assert graph.second_eigenvalue() < degree - 0.3
    assert ExpanderGraph.make(num_vertices, degree) == graph


@pytest.mark.parametrize("num_vertices, degree", [(8, 4), (10, 4), (10, 3)])
def test_no_cut_has_less_conductance_than_the_bound(num_vertices: int, degree: int) -> None:
    graph = ExpanderGraph.make(num_vertices, degree)
    least = 1.0
    for size in range(1, num_vertices // 2 + 1):
        for part in itertools.combinations(range(num_vertices), size):
            across = sum(other not in part for one in part for other in graph.neighbours[one])
            least = min(least, across / (degree * size))
    assert 0 < graph.conductance_bound() <= least + 1e-9


@pytest.mark.parametrize("num_vertices, degree", [(2, 4), (5, 4), (4, 9)])
def test_small_graphs_are_complete(num_vertices: int, degree: int) -> None:
    graph = ExpanderGraph.make(num_vertices, degree)
    assert graph.degree == num_vertices - 1


def test_tables_lead_back() -> None:
    neighbours, place = ExpanderGraph.make(10, 4).tables(torch.device("cpu"))
    vertex = torch.arange(10).unsqueeze(-1).expand(10, 4)
    assert torch.equal(neighbours[neighbours, place], vertex)


def test_what_is_no_expander_is_refused() -> None:
    with pytest.raises(ArgumentError, match="9 vertices of degree 3 expand"):
        ExpanderGraph.make(9, 3)
    with pytest.raises(ArgumentError, match="8 vertices of degree 2 expand: cycles do not"):
        ExpanderGraph.make(8, 2)
    with pytest.raises(ArgumentError, match="1 vertices of degree 4 make no graph"):
        ExpanderGraph.make(1, 4)
    with pytest.raises(ArgumentError, match=r"those of vertex 2, \(1, 0\)"):
        ExpanderGraph(neighbours=((1,), (0, 2), (1, 0)))
    with pytest.raises(ArgumentError, match=r"degrees \[1, 2\] differ"):
        ExpanderGraph(neighbours=((1,), (0, 2), (1,)))
