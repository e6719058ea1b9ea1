"""ExpanderSketch: rows are known by names, a name leads to the next, and a cluster spells the row.

Row `i` is encoded, `enc(i)`, by an error-correcting code; layer `k` gets one symbol of the word.
A hash puts the rows into buckets; inside of its bucket every layer hashes them anew, into cells,
`h_k(i)`. What layer `k` knows of row `i` is its name

    z(i)_k = (h_k(i), enc(i)_k, h_G(k,1)(i), ..., h_G(k,d)(i))

where `G(k, s)` is the `s`-th neighbour of `k` in a `d`-regular expander on the layers. From the
sketch each layer learns the names of heavy rows. They are vertices `(k, h_k)` of a graph, each
suggesting `d` edges, and an edge that both ends suggest is kept. A heavy row is then a copy of the
expander, up to what noise spoils: a cluster (`clusters`), whose symbols the code decodes to
the row (`codes`), wrong and missing ones put right. No layer needs to be right with more than
constant probability, so none is repeated `log n` times: that is the point of the method.

The names in a layer are found by one point query for every cell and one for every bit of its name.
Rows enter a cell with random signs; the counter of a bit is the same sum, in which the rows whose
name has the bit enter with the opposite sign. If one row outweighs the rest of the cell, its bit is
whether the two sums differ in sign. So the sketch of a column is `1 + name bits` numbers a cell.

Source: Larsen, Nelson, Nguyen and Thorup, Heavy hitters via cluster-preserving clustering (2016,
arXiv 1604.01357), Section 4. Constants are practical choices: see `Layout`. Departures: the search
over the names of a layer is by bits and not down a tree, so that a cell yields one name (the paper,
too, keeps one for each value of `h_k`); rows are placed by permutations, pairwise independent
within a bucket, in place of hash functions: cells are filled alike, and sums need no atomics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..precision import without_autocast
from ..randomness import Stream
from .codes import ReedSolomon
from .expander_graph import ExpanderGraph
from .hashing import SIGNS_IN_A_WORD, pairwise_permutations, random_signs

__all__ = ["ExpanderSketch", "Layout"]

CHUNK_BITS = 4
"""Bits of a code symbol: the paper's log log n is 3.3 to 4.3 for n between 2^10 and 2^20."""

CELL_BITS = 3
"""Bits of `h_k`: 8 cells. The paper's poly(log n) would hold all rows of a bucket apart."""

DEGREE = 4
"""Neighbours of a layer. With 3, twice as many heavy rows are lost; 6 cost a third more."""

FEWEST_LAYERS = 8
"""Layers; twice the symbols of an index where those are more than four."""

_CHUNK_BYTES = 256 << 20  # of arranged rows held at once


class Layout(NamedTuple):
    """Sizes that follow from the number of rows and from `tau`, and why they are what they are.

    The paper has Theta(log n / log log n) layers: here twice the symbols of an index, 8 layers up
    to 2^16 rows and 10 up to 2^20, so that the code puts 2 wrong or 4 missing symbols right. There
    are about `width * tau` cells in a layer, in buckets of 8. The rest of a cell has an energy of
    `1 / (width * tau)` in the mean; with `width = 8` a bit of a row at the bound is then wrong with
    probability `2 Q(sqrt(8)) = 0.5 %` (Q the normal tail), an edge with 3 %. The paper reduces to
    buckets with O(log n) heavy rows; here it is one, in the mean.

    Attributes:
        code: of the indices; its length is the number of layers.
        graph: the expander on the layers.
        num_buckets: buckets of the rows.
    """

    code: ReedSolomon
    graph: ExpanderGraph
    num_buckets: int

    @classmethod
    def of(cls, num_rows: int, *, tau: float, width: float) -> Layout:
        """Return the layout for `num_rows` rows."""
        message = max(1, -(-(num_rows - 1).bit_length() // CHUNK_BITS))
        length = max(FEWEST_LAYERS, 2 * message)
        buckets = min(math.ceil(width * tau / (1 << CELL_BITS)), -(-num_rows // (1 << CELL_BITS)))
        return cls(
            code=ReedSolomon(length=length, message=message, bits=CHUNK_BITS),
            graph=ExpanderGraph.make(length, DEGREE), num_buckets=max(1, buckets),
        )  # fmt: skip

    @property
    def num_layers(self) -> int:
        """Number of layers, m."""
        return self.code.length

    @property
    def num_vertices(self) -> int:
        """Cells of all layers of a bucket."""
        return self.num_layers << CELL_BITS

    @property
    def name_bits(self) -> int:
        """Bits of a name beside `h_k`: a symbol, and a cell in each neighbouring layer."""
        return self.code.bits + CELL_BITS * self.graph.degree

    @property
    def num_outputs(self) -> int:
        """Numbers that are the sketch of a column."""
        return (1 + self.name_bits) * self.num_buckets * self.num_vertices


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpanderSketch:
    """A drawn linear map from rows to sketches, one for every head.

    Args:
        num_rows: number of rows, n.
        layout: sizes, code and graph.
        sign_words: int64 `[heads, words, n]`; bit `k` says with which sign a row enters layer `k`.
        bucket_order: int64 `[heads, buckets * members]`: the rows, bucket by bucket; numbers from
            `n` on stand for none. A row is known by its bucket and its place in it.
        cell_order: int64 `[heads, layers, cells * members']`: places in a bucket, cell by cell;
            the same for all buckets; numbers beyond the places stand for none.

    Example:
        >>> drawn = ExpanderSketch.draw(2, num_rows=1000, tau=4, device=torch.device("cpu"))
        >>> drawn.layout.num_layers, drawn.layout.num_buckets, drawn.layout.name_bits
        (8, 4, 16)
        >>> drawn.apply(torch.ones(2, 1000, 5)).shape == (2, 17 * 4 * 64, 5)
        True
    """

    num_rows: int
    layout: Layout
    sign_words: torch.Tensor
    bucket_order: torch.Tensor
    cell_order: torch.Tensor

    @classmethod
    def draw(
        cls, heads: int, *, num_rows: int, tau: float, width: float = 8, device: torch.device,
        generator: torch.Generator | Stream | None = None,
    ) -> ExpanderSketch:  # fmt: skip
        """Draw a map for each of some heads; memory O(num_rows) words a head.

        Args:
            heads: how many.
            num_rows: number of rows.
            tau: a row is heavy in a column if its square is at least `1 / tau` of the energy.
            width: cells of a layer, times `tau`.
            device: where the map lies.
            generator: source of three draws.
        """
        layout = Layout.of(num_rows, tau=tau, width=width)
        words = random_signs(
            (heads,), layout.num_layers, num_rows, device=device, generator=generator
        )
        order = pairwise_permutations((heads,), num_rows, device=device, generator=generator)
        order = _in_equal_runs(order, layout.num_buckets)
        cells = pairwise_permutations(
            (heads, layout.num_layers), order.shape[-1] // layout.num_buckets, device=device,
            generator=generator,
        )  # fmt: skip
        return cls(
            num_rows=num_rows, layout=layout, sign_words=words, bucket_order=order,
            cell_order=_in_equal_runs(cells, 1 << CELL_BITS),
        )  # fmt: skip

    @property
    def num_places(self) -> int:
        """Rows of a bucket, at most."""
        return self.bucket_order.shape[-1] // self.layout.num_buckets

    def cells(self) -> torch.Tensor:
        """Return `h_k` of every place of a bucket: int64 `[heads, layers, places + 1]`.

        The last one stands for no row; its cell means nothing.
        """
        order, places = self.cell_order, self.num_places
        cell = torch.arange(order.shape[-1], device=order.device) // (order.shape[-1] >> CELL_BITS)
        found = order.new_zeros((*order.shape[:2], places + 1))
        return found.scatter_(-1, order.clamp(max=places), cell.expand_as(order))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sketch of rows.

        Linear in `x`: sketches of two parts of the rows, zeros elsewhere, add up to that of both.

        Args:
            x: floating point `[heads, n, m]`.

        Returns:
            `[heads, num_outputs, m]`; the outputs are laid out as `[1 + name bits, buckets, layers,
            cells]`, the plain sums first.
        Cost: O(layers * name bits * n * m) time; the rows of some heads, at least of one, are
            arranged at once. Products instead of atomic sums: the same bits for the same draw.
        """
        layout = self.layout
        heads, _, m = x.shape
        shape = (heads, 1 + layout.name_bits, layout.num_buckets, layout.num_layers, 8, m)
        out = x.new_empty(shape)
        step = max(1, _CHUNK_BYTES // max(1, 4 * x.element_size() * x.shape[1] * m))
        cells = self.cells()
        for first in range(0, heads, step):
            part = slice(first, first + step)
            order = self.bucket_order[part].clamp(max=self.num_rows)
            rows = torch.nn.functional.pad(x[part], (0, 0, 0, 1))
            head = torch.arange(order.shape[0], device=x.device).unsqueeze(-1)
            rows = self._by_bucket(rows[head, order])
            word = self._by_bucket(layout.code.encode(order))
            signs = torch.nn.functional.pad(self.sign_words[part], (0, 1))
            for layer in range(layout.num_layers):
                sign = signs[:, layer // SIGNS_IN_A_WORD].gather(1, order)
                sign = self._by_bucket((sign >> layer % SIGNS_IN_A_WORD) & 1)
                out[part, :, :, layer] = self._cell_sums(
                    layer, rows, word[..., layer], sign, cells[part], self.cell_order[part, layer]
                )
        return out.flatten(1, -2)

    def _by_bucket(self, rows: torch.Tensor) -> torch.Tensor:
        """Split `[heads, buckets * places, ...]`; a last place of zeros stands for no row."""
        rows = rows.unflatten(1, (self.layout.num_buckets, -1))
        return torch.cat([rows, torch.zeros_like(rows[:, :, :1])], dim=2)

    def _cell_sums(
        self, layer: int, rows: torch.Tensor, symbol: torch.Tensor, sign: torch.Tensor,
        cells: torch.Tensor, order: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Return the sums of one layer: `[heads, 1 + name bits, buckets, cells, m]`."""
        order = order.clamp(max=self.num_places)
        index = order.unsqueeze(1).expand(-1, rows.shape[1], -1)
        neighbours, _ = self.layout.graph.tables(cells.device)
        near = cells[:, neighbours[layer]]
        near = near.gather(-1, order.unsqueeze(1).expand(-1, near.shape[1], -1))
        # every bit of a name as a sign: [heads, buckets, members, bits]
        own = _bits(symbol.gather(2, index), self.layout.code.bits)
        other = _bits(near.transpose(1, 2), CELL_BITS).flatten(2)
        other = other.unsqueeze(1).expand(-1, rows.shape[1], -1, -1)
        plain = sign.gather(2, index).unsqueeze(-1)
        flips = torch.cat([plain, plain ^ own, plain ^ other], dim=-1)
        pattern = (1 - 2 * flips).to(rows.dtype).unflatten(2, (1 << CELL_BITS, -1))
        placed = rows.gather(2, index.unsqueeze(-1).expand(*index.shape, rows.shape[-1]))
        with without_autocast(rows):
            placed = placed.unflatten(2, (1 << CELL_BITS, -1))
            sums = torch.matmul(pattern.transpose(-1, -2), placed)
        return sums.movedim(3, 1)


def _in_equal_runs(order: torch.Tensor, runs: int) -> torch.Tensor:
    """Lengthen an order to a multiple of `runs`; what is added stands for nothing."""
    missing = -order.shape[-1] % runs
    return torch.nn.functional.pad(order, (0, missing), value=order.shape[-1])


def _bits(number: torch.Tensor, count: int) -> torch.Tensor:
    """Return the lowest `count` bits of numbers in a new last dimension."""
    return (number.unsqueeze(-1) >> torch.arange(count, device=number.device)) & 1
