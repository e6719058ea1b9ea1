"""A CountSketch for every level of a tree over the rows: linear, and made in one pass.

The rows are the leaves of a tree in which every node has `BRANCHING` children. At each level the
nodes of that level are hashed into buckets, and a bucket holds the sum of all rows below its nodes,
each row with a random sign. This is done several times over, independently. The sketch of `Q` is
then some `Q'` with far fewer rows, and `Q' k` is the sketch of the column `Q k`, for any `k`.

The square of a bucket estimates the energy below its nodes. And whatever else lies in the bucket
of a row `x`, with probability 1/2 at least the square is no less than `x^2`: `max |c + x|, |c - x|`
is at least `|x|`, and which of the two it is, is decided by the sign of `x` alone.

Source: Charikar, Chen and Farach-Colton, Finding frequent items in data streams (2002); Cormode and
Hadjieleftheriou, Finding frequent items in data streams (2008) for the hierarchy. Their hash
functions are of bounded independence; here placement is pairwise, and signs are independent
altogether, without which the probability above would be smaller (1/13 for four-wise signs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.bucket_sums import bucket_sums
from ..kernels.sketch import BRANCHING as _BRANCHING
from ..kernels.sketch import runs_kernels
from ..randomness import Stream
from .hashing import SIGNS_IN_A_WORD, pairwise_permutations, random_signs

__all__ = ["BRANCHING", "CountSketch", "level_sizes", "sketch_size"]

BRANCHING = _BRANCHING
"""Children of a node.

What a search looks at grows with `b / log b`, the number of sketches falls with `1 / log b`. The
scores of eight children, a byte each, are one word: it takes one look to know them all.
"""

_CHUNK_BYTES = 256 << 20  # of signed rows held at once


def level_sizes(num_rows: int, width: int) -> list[int]:
    """Return the number of nodes of every level of the tree, the top first.

    The top level is the largest one with no more than `width` nodes; nothing is hashed there.

    Example:
        >>> level_sizes(131_072, 512), level_sizes(100, 128)
        ([256, 2048, 16384, 131072], [100])
    """
    sizes = [num_rows]
    while sizes[0] > width:
        sizes.insert(0, -(-sizes[0] // BRANCHING))
    # so that every node has all its children; the rows that this adds are zero
    return [sizes[0] * BRANCHING**level for level in range(len(sizes))]


def sketch_size(num_rows: int, width: int, repetitions: int) -> int:
    """Return the number of rows of a sketch, all levels and repetitions together.

    Example:
        >>> sketch_size(131_072, 512, 8)
        14336
    """
    sizes = level_sizes(num_rows, width)
    return repetitions * (sizes[0] + (len(sizes) - 1) * width)


@dataclass(frozen=True, kw_only=True, eq=False)
class CountSketch:
    """A drawn linear map from rows to sketches, one for every head.

    Siblings lie side by side: a hashed level has `width / BRANCHING` blocks, and all children of a
    node are in one block, in their order. Two nodes meet in a bucket with probability
    `BRANCHING / width` if they are the same child of their parents, and never otherwise.

    Args:
        num_rows: number of rows.
        width: buckets of a level, a multiple of `BRANCHING`.
        repetitions: independent sketches of each level.
        sign_words: int64 `[heads, words, num_rows]`, see `random_signs`; the same for all levels.
        orders: for every hashed level, the higher ones first, its blocks as a list of nodes of the
            level above: int64 `[heads, repetitions, blocks * members]`; numbers beyond the nodes
            stand for none.

    Example:
        >>> drawn = CountSketch.draw(2, num_rows=1000, width=64, repetitions=3,
        ...                          device=torch.device("cpu"))
        >>> [tuple(level.shape) for level in drawn.apply(torch.ones(2, 1000, 5))]
        [(2, 3, 16, 5), (2, 3, 64, 5), (2, 3, 64, 5)]
    """

    num_rows: int
    width: int
    repetitions: int
    sign_words: torch.Tensor
    orders: tuple[torch.Tensor, ...]

    @classmethod
    def draw(
        cls, heads: int, *, num_rows: int, width: int, repetitions: int, device: torch.device,
        generator: torch.Generator | Stream | None = None,
    ) -> CountSketch:  # fmt: skip
        """Draw a map for each of some heads; memory O(num_rows + repetitions * num_rows / 7)."""
        words = random_signs((heads,), repetitions, num_rows, device=device, generator=generator)
        blocks = width // BRANCHING
        orders = []
        for nodes in level_sizes(num_rows, width)[:-1]:
            order = pairwise_permutations(
                (heads, repetitions), nodes, device=device, generator=generator
            )
            missing = -order.shape[-1] % blocks
            orders.append(torch.nn.functional.pad(order, (0, missing), value=order.shape[-1]))
        return cls(
            num_rows=num_rows, width=width, repetitions=repetitions, sign_words=words,
            orders=tuple(orders),
        )  # fmt: skip

    @property
    def levels(self) -> list[int]:
        """Number of nodes of every level, the top first."""
        return level_sizes(self.num_rows, self.width)

    def signs(self, repetition: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the sign of every row: `[heads, num_rows]`."""
        word = self.sign_words[:, repetition // SIGNS_IN_A_WORD]
        return (1 - 2 * ((word >> repetition % SIGNS_IN_A_WORD) & 1)).to(dtype)

    def blocks(self, level: int) -> torch.Tensor:
        """Return the block of every node above a hashed level: int64 `[heads, repetitions, nodes]`.

        Args:
            level: number of the hashed level; 0 is the one below the top.
        """
        order, nodes = self.orders[level], self.levels[level]
        members = order.shape[-1] // (self.width // BRANCHING)
        place = torch.arange(order.shape[-1], device=order.device) // members
        # nodes that do not exist write behind the others
        block = order.new_zeros((*order.shape[:2], nodes + 1))
        block.scatter_(-1, order.clamp(max=nodes), place.expand_as(order))
        return block[..., :nodes]

    def apply(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the sketches of rows, the top level first.

        Linear in `x`: sketches of two parts of the rows, zeros elsewhere, add up to that of both.

        Args:
            x: floating point `[heads, num_rows, m]`.

        Returns:
            `[heads, repetitions, nodes or width, m]` for each level.
        Cost: O(repetitions * num_rows * m) time; a bounded number of rows is signed at once, those
            of one head at least. No atomic sums: the same bits for the same draw.
        """
        heads, _, m = x.shape
        sizes = self.levels
        buckets = [sizes[0]] + [self.width] * len(self.orders)
        out = [x.new_empty((heads, self.repetitions, count, m)) for count in buckets]
        if self.orders and runs_kernels(x):
            return self._applied(x, out)
        step = max(1, _CHUNK_BYTES // max(1, 3 * x.element_size() * sizes[-1] * m))
        for first in range(0, heads, step):
            part = slice(first, first + step)
            for repetition in range(self.repetitions):
                signed = x[part] * self.signs(repetition, x.dtype)[part].unsqueeze(-1)
                signed = torch.nn.functional.pad(signed, (0, 0, 0, sizes[-1] - self.num_rows))
                for level in range(len(self.orders), 0, -1):
                    siblings = signed.unflatten(1, (-1, BRANCHING))
                    order = self.orders[level - 1][part, repetition]
                    out[level][part, repetition] = self._bucket_sums(siblings, order)
                    signed = siblings.sum(dim=2)
                out[0][part, repetition] = signed
        return out

    def _applied(self, x: torch.Tensor, out: list[torch.Tensor]) -> list[torch.Tensor]:
        """Do what `apply` says by kernels, for some repetitions of all heads at a time."""
        sizes = self.levels
        held = sizes[-2] * x.shape[0] * x.shape[-1] * x.element_size()
        step = max(1, _CHUNK_BYTES // max(1, held))
        for first in range(0, self.repetitions, step):
            part = slice(first, first + step)
            rows, words = x.unsqueeze(1), self.sign_words
            for level in range(len(self.orders), 0, -1):
                out[level][:, part], rows = bucket_sums(
                    rows, words if level == len(self.orders) else None,
                    self.orders[level - 1][:, part], nodes=sizes[level - 1],
                    blocks=self.width // BRANCHING, first=first, word_bits=SIGNS_IN_A_WORD,
                )  # fmt: skip
            out[0][:, part] = rows
        return out

    def _bucket_sums(self, siblings: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Sum the children of nodes, `[heads, nodes, 8, m]`, over the blocks of an order."""
        siblings = torch.nn.functional.pad(siblings, (0, 0, 0, 0, 0, 1))
        order = order.clamp(max=siblings.shape[1] - 1)
        head = torch.arange(order.shape[0], device=order.device).unsqueeze(-1)
        placed = siblings[head, order].unflatten(1, (self.width // BRANCHING, -1))
        sums: torch.Tensor = placed.sum(dim=2).flatten(1, 2)
        return sums

    def estimate(self, sketch: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Return estimates of single rows from the sketch of the lowest level: a point query.

        Args:
            sketch: `[heads, repetitions, buckets, m]`, the last one of `apply`.
            row: int64 `[heads, R]`.

        Returns:
            `[heads, R, m]`, the median over the repetitions of the row's bucket times its sign.
            One repetition errs by more than `sqrt(8 E BRANCHING / width)` in an entry of a column
            with probability 1/8 at most, where `E` is the energy of the column's other entries that
            are the same child of their parents.
        """
        found = []
        for repetition in range(self.repetitions):
            bucket = row
            if self.orders:
                block = self.blocks(len(self.orders) - 1)[:, repetition]
                bucket = block.gather(1, row // BRANCHING) * BRANCHING + row % BRANCHING
            sign = self.signs(repetition, sketch.dtype).gather(1, row)
            index = bucket.unsqueeze(-1).expand(-1, -1, sketch.shape[-1])
            found.append(sketch[:, repetition].gather(1, index) * sign.unsqueeze(-1))
        return torch.stack(found).median(dim=0).values
