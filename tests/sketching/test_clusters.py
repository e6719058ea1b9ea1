"""Clusters: edges that both ends name, components, and cuts of what noise has joined."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.sketching.clusters import (
    GRAPH,
    Edges,
    components,
    has_twins,
    mutual_edges,
    num_layers,
    parted,
)
from hyperframe.sketching.expander_decoding import NAMED
from hyperframe.sketching.expander_graph import ExpanderGraph

LAYERS, CELLS, DEGREE, VERTICES = 8, 8, 4, 64


def named_by(rows: list[list[int]], seed: int) -> torch.Tensor:
    """What vertices say where row `r` lies in cell `rows[r][k]` of layer k; others say nothing."""
    word = torch.zeros(VERTICES, dtype=torch.int64)
    for row in rows:
        for layer, cell in enumerate(row):
            name = NAMED
            for place, other in enumerate(GRAPH.neighbours[layer]):
                name |= row[other] << (3 * place)
            word[layer * CELLS + cell] = name
    g = torch.Generator().manual_seed(seed)
    noise = NAMED | torch.randint(0, NAMED, word.shape, generator=g)
    is_noise = torch.rand(word.shape, generator=g) < 0.5
    return torch.where((word == 0) & is_noise, noise, word)


def edges_by_hand(word: list[int]) -> set[tuple[int, int]]:
    found = set()
    for vertex in range(VERTICES):
        layer, cell = divmod(vertex, CELLS)
        for place, other in enumerate(GRAPH.neighbours[layer]):
            target = other * CELLS + (word[vertex] >> (3 * place) & 7)
            back = word[target] >> (3 * GRAPH.neighbours[other].index(layer)) & 7
            if back == cell and word[vertex] > 0 and word[target] > 0:
                found.add((vertex, target))
    return found


def pairs(edges: Edges, graph: int = 0) -> set[tuple[int, int]]:
    return {
        (vertex, int(edges.target[graph, place, vertex]))
        for place, vertex in edges.is_edge[graph].nonzero().tolist()
    }


def vertices(members: int) -> set[int]:
    return {vertex for vertex in range(VERTICES) if members >> vertex & 1}


def test_the_graph_is_the_best_of_its_size() -> None:
    best = ExpanderGraph.make(LAYERS, DEGREE).second_eigenvalue()
    assert GRAPH.second_eigenvalue() == pytest.approx(best, abs=1e-9)
    assert best <= 1.15 * 2 * 3**0.5


def test_a_set_of_layers_has_edges_outside() -> None:
    """The least conductance, over all sets of up to half of the layers."""
    least = 1.0
    for chosen in range(1, 256):
        inside = [k for k in range(LAYERS) if chosen >> k & 1]
        if len(inside) <= LAYERS // 2:
            cut = sum(other not in inside for k in inside for other in GRAPH.neighbours[k])
            least = min(least, cut / (DEGREE * len(inside)))
    assert least > 0.31


@given(seed=st.integers(0, 10_000), share=st.floats(0.1, 1.0))
def test_edges_are_those_that_both_ends_name_and_components_those_of_a_search(
    seed: int, share: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    # few cells are named, so that many edges are mutual
    named = torch.randint(0, 3, (VERTICES, DEGREE), generator=g)
    word = NAMED | (named << (3 * torch.arange(DEGREE))).sum(dim=-1)
    word = torch.where(torch.rand(VERTICES, generator=g) < share, word, 0)
    edges = mutual_edges(word[None])
    expected = edges_by_hand(word.tolist())
    assert pairs(edges) == expected
    members = components(word[None], edges)[0].tolist()
    for vertex in range(VERTICES):
        # what is reached in seven steps
        reached = {vertex} if word[vertex] > 0 else set()
        for _ in range(7):
            reached |= {b for a, b in expected if a in reached}
        assert vertices(members[vertex]) == reached


@given(st.lists(st.integers(0, 63), max_size=20))
def test_layers_and_twins_of_a_set(held: list[int]) -> None:
    members = sum(1 << vertex for vertex in set(held))
    signed = torch.tensor(members - (1 << 64) if members >> 63 else members)
    layers = [vertex // CELLS for vertex in set(held)]
    assert num_layers(signed) == len(set(layers))
    assert bool(has_twins(signed)) == (len(set(layers)) < len(layers))


@given(seed=st.integers(0, 10_000))
def test_a_row_is_a_cluster_with_noise_around_it(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    row = torch.randint(0, CELLS, (LAYERS,), generator=g).tolist()
    word = named_by([row], seed)[None]
    members = components(word, mutual_edges(word))[0]
    own = {layer * CELLS + cell for layer, cell in enumerate(row)}
    # its names are taken: no other vertex can be joined to it
    assert all(vertices(int(members[vertex])) == own for vertex in own)


def joined(seed: int) -> tuple[torch.Tensor, list[list[int]]]:
    """Two rows that meet in two layers, whose names there are a mixture of both."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randint(0, CELLS, (LAYERS,), generator=g)
    second = (first + torch.randint(1, CELLS, (LAYERS,), generator=g)) % CELLS
    shared = torch.randperm(LAYERS, generator=g)[:2]
    second[shared] = first[shared]
    rows = [first.tolist(), second.tolist()]
    word = torch.zeros(VERTICES, dtype=torch.int64)
    for row in rows:
        word = torch.where(word > 0, word, named_by([row], 0) * _own(row))
    for layer in shared.tolist():
        name = NAMED
        for place, other in enumerate(GRAPH.neighbours[layer]):
            which = int(torch.randint(0, 2, (), generator=g))
            name |= rows[which][other] << (3 * place)
        word[layer * CELLS + rows[0][layer]] = name
    return word, rows


def _own(row: list[int]) -> torch.Tensor:
    """1 for the vertices of a row, 0 for others."""
    found = torch.zeros(VERTICES, dtype=torch.int64)
    found[[layer * CELLS + cell for layer, cell in enumerate(row)]] = 1
    return found


def test_clusters_that_meet_in_two_layers_are_parted() -> None:
    """Fixed seeds: of 200 pairs more than half are joined; nearly all of these are parted.

    Parted: of the six vertices that a row has to itself, at least four are in one set, and another
    one than those of the other row. A vertex that both rows share may go to either.
    """
    made = [joined(seed) for seed in range(200)]
    word = torch.stack([one[0] for one in made])
    edges = mutual_edges(word)
    members = components(word, edges)
    needs = has_twins(members).any(dim=-1)
    assert needs.sum() > 100
    after = parted(word, edges, members, 4)
    good = 0
    for graph in needs.nonzero().flatten().tolist():
        own = []
        first, second = made[graph][1]
        for row in (first, second):
            private = [k * CELLS + row[k] for k in range(LAYERS) if first[k] != second[k]]
            mode = after[graph, private].mode().values
            if (after[graph, private] == mode).sum() < 4:
                break
            own.append(int(mode))
        good += len(own) == 2 and own[0] != own[1]
    assert good >= 0.9 * int(needs.sum())


@pytest.mark.parametrize("num_missing", [0, 1, 2])
def test_what_has_one_vertex_a_layer_is_never_cut(num_missing: int) -> None:
    g = torch.Generator().manual_seed(num_missing)
    rows = torch.randint(0, CELLS, (50, LAYERS), generator=g).tolist()
    word = torch.stack([named_by([row], 1) * _own(row) for row in rows])
    for layer in range(num_missing):
        word[:, layer * CELLS : (layer + 1) * CELLS] = 0
    edges = mutual_edges(word)
    members = components(word, edges)
    assert not has_twins(members).any()
    assert torch.equal(parted(word, edges, members, 4), members)


def test_graphs_are_cut_for_themselves() -> None:
    made = torch.stack([joined(seed)[0] for seed in range(12)])
    edges = mutual_edges(made)
    whole = parted(made, edges, components(made, edges), 4)
    for graph in range(12):
        word = made[graph : graph + 1]
        edges = mutual_edges(word)
        alone = parted(word, edges, components(word, edges), 4)
        assert torch.equal(alone[0], whole[graph])
