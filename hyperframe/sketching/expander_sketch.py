"""ExpanderSketch: rows are known by names, a name leads to the next, and a cluster spells the row.

A hash puts the rows into buckets. The place of a row in its bucket is encoded by an
error-correcting code, and layer `k` gets one symbol of the word: the row's cell in this layer,
`h_k(i)`. What layer `k` knows of row `i` is its name

    z(i)_k = (h_k(i), h_G(k,1)(i), ..., h_G(k,d)(i))

where `G(k, s)` is the `s`-th neighbour of `k` in a `d`-regular expander on the layers. From the
sketch each layer learns the names of heavy rows. They are vertices `(k, h_k)` of a graph, each
suggesting `d` edges, and an edge that both ends suggest is kept. A heavy row is then a copy of the
expander, up to what noise spoils: a cluster (`clusters`), whose cells the code decodes to
the row (`codes`), wrong and missing ones put right. No layer needs to be right with more than
constant probability, so none is repeated `log n` times: that is the point of the method.

The names in a layer are found by one point query for every cell and one for every bit of its name.
Rows enter a cell with random signs; the counter of a bit is the same sum, in which the rows whose
name has the bit enter with the opposite sign. If one row outweighs the rest of the cell, its bit is
whether the two sums differ in sign, and all 13 sums have about the same size; where two rows meet,
some are doubled and some cancel. So a cell that speaks for one row is told from one that does not.

Source: Larsen, Nelson, Nguyen and Thorup, Heavy hitters via cluster-preserving clustering (2016,
arXiv 1604.01357), Section 4. Constants are practical choices: see `Layout`. Departures: the search
over the names of a layer is by bits and not down a tree, so that a cell yields one name (the paper,
too, keeps one for each value of `h_k`); the symbols of the code are the hash functions themselves,
so that a name needs no symbol beside its cells, cells are filled alike and no two rows of a bucket
meet in more than `message - 1` layers; rows are put into buckets by a pairwise independent
permutation, so that sums need no atomics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..kernels.ops.names import CELLS, LAYERS, NUM_OUTPUTS, VERTICES
from ..kernels.sketch import runs_kernels
from ..precision import without_autocast
from ..randomness import Stream
from .clusters import GRAPH
from .codes import SYMBOL_BITS, CellCode
from .hashing import next_prime, pairwise_permutations, random_signs

__all__ = ["ExpanderSketch", "Layout", "name_bits", "torch_name_sums"]

MOST_PLACES = (1 << 15) - 1024
"""Rows of a bucket at most: 5 symbols, and a code that puts 3 missing ones right."""

_CHUNK_BYTES = 256 << 20  # of arranged rows held at once


class Layout(NamedTuple):
    """Sizes that follow from the number of rows and from `tau`, and why they are what they are.

    There are 8 layers of 8 cells a bucket, so that a bucket's graph has 64 vertices: a set of them
    is a word, and clusters are found by exclusive ors and shifts. About `width * tau` cells are in
    a layer. The rest of a cell has an energy of `1 / (width * tau)` in the mean; with `width = 8` a
    bit of a row at the bound is then wrong with probability `2 Q(sqrt(8)) = 0.5 %` (Q the normal
    tail), an edge with 3 %. The paper has Theta(log n / log log n) layers and buckets with O(log n)
    heavy rows; here a bucket has one, in the mean.

    Attributes:
        code: of the places in a bucket.
        num_buckets: buckets of the rows.
        num_places: rows of a bucket, at most.
    """

    code: CellCode
    num_buckets: int
    num_places: int

    @classmethod
    def of(cls, num_rows: int, *, tau: float, width: float) -> Layout:
        """Return the layout for `num_rows` rows."""
        buckets = min(math.ceil(width * tau / CELLS), -(-num_rows // CELLS))
        buckets = max(1, buckets, -(-num_rows // MOST_PLACES))
        # eight places that follow each other lie in eight cells of every layer
        places = -(-next_prime(num_rows) // (buckets * CELLS)) * CELLS
        return cls(code=CellCode.of(places), num_buckets=buckets, num_places=places)

    @property
    def num_outputs(self) -> int:
        """Numbers that are the sketch of a column."""
        return NUM_OUTPUTS * VERTICES * self.num_buckets


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpanderSketch:
    """A drawn linear map from rows to sketches, one for every head.

    Args:
        num_rows: number of rows, n.
        layout: sizes and code.
        sign_words: int64 `[heads, n]`; bit `k` says with which sign a row enters layer `k`.
        bucket_order: int64 `[heads, buckets * places]`: the rows, bucket by bucket; numbers from
            `n` on stand for none. A row is known by its bucket and its place in it.

    Example:
        >>> drawn = ExpanderSketch.draw(2, num_rows=1000, tau=4, device=torch.device("cpu"))
        >>> drawn.layout.num_buckets, drawn.layout.num_places, drawn.layout.code.radius
        (4, 256, 4)
        >>> drawn.apply(torch.ones(2, 1000, 5)).shape == (2, 4, 13, 64, 5)
        True
    """

    num_rows: int
    layout: Layout
    sign_words: torch.Tensor
    bucket_order: torch.Tensor

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
            generator: source of two draws.
        """
        layout = Layout.of(num_rows, tau=tau, width=width)
        words = random_signs((heads,), LAYERS, num_rows, device=device, generator=generator)
        order = pairwise_permutations((heads,), num_rows, device=device, generator=generator)
        missing = layout.num_buckets * layout.num_places - order.shape[-1]
        order = torch.nn.functional.pad(order, (0, missing), value=order.shape[-1])
        return cls(num_rows=num_rows, layout=layout, sign_words=words[:, 0], bucket_order=order)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sketch of rows.

        Linear in `x`: sketches of two parts of the rows, zeros elsewhere, add up to that of both.

        Args:
            x: floating point `[heads, n, m]`.

        Returns:
            `[heads, buckets, 13, 64, m]`: for every vertex of a bucket the plain sum, then one for
            every bit of its name, the highest bit first. No gradient.
        Cost: O(layers * name bits * n * m) time. On CUDA with Triton one launch for float32, whose
            products are of 11 significant bits (the sums nominate: what they find is tested). No
            atomic sums: the same bits for the same draw.
        """
        found: torch.Tensor = torch.ops.hyperframe.name_sums(
            x, self.sign_words, self.bucket_order, self.layout.num_buckets, self.layout.code.message
        )
        return found


def name_bits(words: torch.Tensor, layer: int) -> torch.Tensor:
    """Return the names of rows in a layer, beside their own cell.

    Args:
        words: integer tensor of any shape, words of the code, 3 bits a layer.
        layer: the layer.

    Returns:
        The same shape: bits `3 s` to `3 s + 2` are the cell in the `s`-th neighbouring layer.
    """
    total = torch.zeros_like(words)
    for place, other in enumerate(GRAPH.neighbours[layer]):
        total |= ((words >> (SYMBOL_BITS * other)) & (CELLS - 1)) << (SYMBOL_BITS * place)
    return total


@torch.library.impl("hyperframe::name_sums", "default")
def _run(
    x: torch.Tensor, sign_words: torch.Tensor, bucket_order: torch.Tensor, num_buckets: int,
    message: int,
) -> torch.Tensor:  # fmt: skip
    places = bucket_order.shape[1] // num_buckets
    words = CellCode(message=message).words(places, x.device)
    if runs_kernels(x) and x.shape[-1] <= 256:
        from ..kernels.triton import names as kernels

        with torch.cuda.device(x.device):
            names = torch.stack([name_bits(words, layer) for layer in range(LAYERS)])
            return kernels.triton_name_sums(x, sign_words, bucket_order, num_buckets, words, names)
    return torch_name_sums(x, sign_words, bucket_order, num_buckets, words)


def torch_name_sums(
    x: torch.Tensor, sign_words: torch.Tensor, bucket_order: torch.Tensor, num_buckets: int,
    words: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Do what `ExpanderSketch.apply` says, on any device; `words` are those of all places."""
    heads, num_rows, m = x.shape
    out = x.new_empty((heads, num_buckets, NUM_OUTPUTS, LAYERS, CELLS, m))
    bit = torch.arange(NUM_OUTPUTS - 2, -1, -1, device=x.device)
    step = max(1, _CHUNK_BYTES // max(1, 4 * x.element_size() * num_rows * m))
    for first in range(0, heads, step):
        part = slice(first, first + step)
        order = bucket_order[part].clamp(max=num_rows)
        head = torch.arange(order.shape[0], device=x.device).unsqueeze(-1)
        rows = torch.nn.functional.pad(x[part], (0, 0, 0, 1))[head, order]
        signs = torch.nn.functional.pad(sign_words[part], (0, 1)).gather(1, order)
        rows, signs = (y.unflatten(1, (num_buckets, -1)) for y in (rows, signs))
        for layer in range(LAYERS):
            # places, cell by cell: the cells are filled alike
            place = ((words >> (SYMBOL_BITS * layer)) & (CELLS - 1)).argsort(stable=True)
            name = (name_bits(words, layer)[place].unsqueeze(-1) >> bit) & 1
            plain = ((signs[:, :, place] >> layer) & 1).unsqueeze(-1)
            flips = torch.cat([plain, plain ^ name], dim=-1)
            pattern = (1 - 2 * flips).to(x.dtype).unflatten(2, (CELLS, -1))
            placed = rows[:, :, place].unflatten(2, (CELLS, -1))
            with without_autocast(x):
                sums = torch.matmul(pattern.transpose(-1, -2), placed)
            out[part, :, :, layer] = sums.transpose(2, 3)
    return out.flatten(3, 4)
