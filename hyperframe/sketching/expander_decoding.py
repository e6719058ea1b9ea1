"""What decodes the sketches of many columns into their heavy rows: names, clusters, words."""

from __future__ import annotations

import torch

from .clusters import cluster_words, component_labels, is_ambiguous, mutual_edges, parted_labels
from .expander_sketch import CELL_BITS, ExpanderSketch, Layout

__all__ = ["MOST_CLUSTERS", "distinct", "expander_rows", "heavy_names"]

NAME_SHARE = 0.25
"""Part of a heavy row's energy that the square of a cell has to show for its name to be read."""

MOST_CLUSTERS = 8
"""Clusters of a bucket; where one heavy row is expected, more are there once in 10^5 buckets."""

_PARTED_SHARE = 16  # one graph of so many is parted where looking how many need it would wait


def heavy_names(
    value: torch.Tensor, layout: Layout, *, tau: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the sketches of columns say about the cells: the point queries.

    Args:
        value: `[..., num_outputs]`, sketches of columns with energy 1 (or of zero columns).
        layout: of the sketch.
        tau: see `ExpanderSketch.draw`.

    Returns:
        bool `[..., buckets, layers * cells]`, which cells hold a heavy name; its symbol, uint8, the
        same shape; and uint8 `[..., buckets, degree, layers * cells]`, the cells that it names in
        the neighbouring layers.
    """
    value = value.unflatten(-1, (1 + layout.name_bits, layout.num_buckets, layout.num_vertices))
    is_heavy = value[..., 0, :, :].square() * tau >= NAME_SHARE
    negative = value < 0
    bits = (negative[..., 1:, :, :] ^ negative[..., :1, :, :]).view(torch.uint8)

    def number(first: int, count: int) -> torch.Tensor:
        found = bits[..., first, :, :].clone()
        for bit in range(1, count):
            found |= bits[..., first + bit, :, :] << bit
        return found

    first = layout.code.bits
    named = [number(first + CELL_BITS * s, CELL_BITS) for s in range(layout.graph.degree)]
    return is_heavy, number(0, first), torch.stack(named, dim=-2)


def expander_rows(
    drawn: ExpanderSketch, value: torch.Tensor, *, tau: float, capacity: int, spectral: bool = True
) -> torch.Tensor:
    """Return candidates for the heavy rows of columns.

    Args:
        drawn: the map that made the sketches.
        value: `[heads, columns, num_outputs]`, sketches of columns with energy 1 (or of zero
            columns), `key @ drawn.apply(query)^T` for keys so scaled.
        tau: a row is heavy if its square is at least `1 / tau`.
        capacity: candidates of a column at most, those with the largest sums first.
        spectral: part clusters that noise has joined (see `parted_labels`).

    Returns:
        int64 `[heads, columns, C]` with `C <= capacity`, distinct rows of a column, -1 for none.
    Cost: about `num_outputs` comparisons and `4 layers cells buckets` look-ups for a column, and
        memory of that size: ask for some columns at a time. Where reading a value is free, on a
        CPU, graphs with too few edges for a cluster are left out; elsewhere all sizes are known
        beforehand, nothing waits for the device, and one graph of 16 at most is parted.
    """
    layout = drawn.layout
    heads, columns, _ = value.shape
    is_heavy, symbol, named = heavy_names(value, layout, tau=tau)
    strength = value[..., : is_heavy[0, 0].numel()].abs().view(is_heavy.shape)
    graphs = (x.flatten(0, 2) for x in (is_heavy, symbol, named, strength))
    heavy, symbol, named, size = graphs
    target, is_edge = mutual_edges(named, heavy, layout.graph, 1 << CELL_BITS)
    least = max(layout.code.message, layout.num_layers // 2)
    num_graphs = heavy.shape[0]
    can_look = _can_look(value)
    chosen = None
    if can_look:
        chosen = (is_edge.any(dim=1).sum(dim=-1) >= least).nonzero().squeeze(-1)
        target, is_edge, heavy = target[chosen], is_edge[chosen], heavy[chosen]
        symbol, size = symbol[chosen], size[chosen]
    label = component_labels(target, is_edge, heavy)
    if spectral:
        sizes = {"num_layers": layout.num_layers, "least": least}
        needs = is_ambiguous(label, **sizes).any(dim=-1)
        if can_look:
            some = needs.nonzero().squeeze(-1)
        else:
            some = (~needs).to(torch.uint8).sort(stable=True).indices
            some = some[: -(-num_graphs // _PARTED_SHARE)]
        parted = parted_labels(target[some], is_edge[some], label[some], **sizes)
        label = label.index_copy(0, some, parted)
    words = cluster_words(
        label, symbol, num_layers=layout.num_layers, num_slots=MOST_CLUSTERS, least=least
    )
    row, is_near = layout.code.decode(words.symbol, words.is_missing)
    is_found = is_near & (words.root < layout.num_vertices) & (row < drawn.num_rows)
    size = size.gather(-1, words.root.clamp(max=layout.num_vertices - 1))
    size = torch.where(is_found, size, -1)
    if chosen is not None:
        shape = (num_graphs, MOST_CLUSTERS)
        row = row.new_zeros(shape).index_copy_(0, chosen, row)
        size = size.new_full(shape, -1).index_copy_(0, chosen, size)
    return _best_rows(row.view(heads, columns, -1), size.view(heads, columns, -1), capacity)


def _can_look(tensor: torch.Tensor) -> bool:
    """Whether values may be read: on other devices every call would wait, a graph would break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _best_rows(row: torch.Tensor, size: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return the rows of largest size, each once: `[heads, columns, C]`."""
    best, place = size.topk(min(capacity, size.shape[-1]), dim=-1)
    row = torch.where(best >= 0, row.gather(-1, place), -1)
    return distinct(row)


def distinct(row: torch.Tensor) -> torch.Tensor:
    """Return rows in descending order, with -1 for all but the first of equal ones."""
    row = row.sort(dim=-1, descending=True).values
    row[..., 1:] = row[..., 1:].masked_fill(row[..., 1:] == row[..., :-1], -1)
    return row
