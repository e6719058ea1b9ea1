"""Heavy rows of many columns from their sketches: a descent of the tree, all columns at once.

For every bucket of every repetition a byte says how much of a heavy row's energy its square may
hold, clipped at all of it. A node's score is the sum of its bytes over the repetitions. From
the top level on, the nodes that score enough are kept, the best `capacity` of a column; then their
children are looked at, down to the rows. All shapes are known beforehand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..kernels.sketch import candidate_bytes, packed_places, sketch_candidates
from .count_sketch import BRANCHING, CountSketch

__all__ = ["MAX_REPETITIONS", "RowSearch", "miss_bound", "repetitions_for"]

PASS_SHARE = 5
"""A node must show a fifth of a heavy row's energy, on average over the repetitions.

Energy spread thinly over `8 tau` buckets shows 1/8. Lower, and all nodes pass; higher, and more
repetitions must agree.
"""

MAX_REPETITIONS = 255
"""The bytes of all repetitions add up to a byte."""

_LARGEST, _LARGEST_SUM = 15, 127
"""Of a share, and of the sum of those of a node.

Half a byte halves the memory of a search on a GPU, and seven bits are compared four at a time.
Finer shares find no more: a heavy row's bucket shows all of it with probability 1/2 anyway.
"""

_MOST_TAU = 1e18  # of the search, whose squares must not overflow


def _unit(repetitions: int) -> int:
    """Return the byte of a square that has all the energy of a heavy row."""
    return min(_LARGEST, max(1, _LARGEST_SUM // repetitions))


def _least_score(repetitions: int) -> int:
    return -(-repetitions * _unit(repetitions) // PASS_SHARE)


def miss_bound(repetitions: int, num_levels: int) -> float:
    """Return a bound of the probability that a heavy row is missed, whatever else there is.

    In each repetition a heavy row's bucket has all its energy with probability 1/2 at least (see
    `count_sketch`), and it is missed at a level only if fewer than a fifth do: a
    binomial tail, times the levels. (Unless more than `capacity` nodes score higher.) With other
    energy spread thinly, as it mostly is, the probability is many times smaller.

    Example:
        >>> round(miss_bound(8, 1), 4), miss_bound(114, 4) < 131_072**-2
        (0.0352, True)
    """
    needed = -(-_least_score(repetitions) // _unit(repetitions))
    tail = sum(math.comb(repetitions, passed) for passed in range(needed))
    return num_levels * math.ldexp(tail, -repetitions)


def repetitions_for(probability: float, num_levels: int) -> int | None:
    """Return the least number of repetitions whose `miss_bound` is at most a probability.

    None if `MAX_REPETITIONS` do not suffice.
    """
    for repetitions in range(1, MAX_REPETITIONS + 1):
        if miss_bound(repetitions, num_levels) <= probability:
            return repetitions
    return None


@dataclass(frozen=True, kw_only=True, eq=False)
class RowSearch:
    """Sketches of queries, and where to look in them; finds candidates for heavy rows.

    Args:
        drawn: the map that made the sketches.
        top: the sketches of the top level, `[heads, repetitions, nodes, d]`, in the dtype of the
            products.
        hashed: those of all others, `[heads, levels, repetitions, width, d]`.
        places: for every node above a hashed level the blocks of its children; see
            `kernels.sketch.packed_places`.
    """

    drawn: CountSketch
    top: torch.Tensor
    hashed: torch.Tensor
    places: torch.Tensor

    @property
    def sketches(self) -> tuple[torch.Tensor, ...]:
        """The sketches of the queries, the top level first."""
        return self.top, *self.hashed.unbind(dim=1)

    @classmethod
    def of(
        cls, drawn: CountSketch, query: torch.Tensor, dtype: torch.dtype | None = None
    ) -> RowSearch:
        """Sketch queries, `[heads, n_q, d]`; `dtype` is for the products, None is that of query."""
        top, *rest = (part.to(dtype or part.dtype) for part in drawn.apply(query))
        shape = (query.shape[0], 0, drawn.repetitions, drawn.width, query.shape[-1])
        hashed = torch.stack(rest, dim=1) if rest else top.new_empty(shape)
        places = [drawn.blocks(level).transpose(1, 2) for level in range(len(drawn.orders))]
        none = torch.zeros((shape[0], 0, drawn.repetitions), dtype=torch.int64, device=query.device)
        packed = packed_places(torch.cat([none, *places], dim=1), drawn.width // BRANCHING)
        return cls(drawn=drawn, top=top, hashed=hashed, places=packed)

    def candidates(
        self, key: torch.Tensor, *, tau: float, capacity: int, decoder: str = "torch"
    ) -> torch.Tensor:  # fmt: skip
        """Return candidates for the heavy rows of columns.

        Args:
            key: `[heads, columns, d]`, scaled so that every column `Q k` has energy 1, or is zero.
            tau: a row is heavy if its square is at least `1 / tau`.
            capacity: nodes of a column that are kept at each level. Where more score enough, the
                best are; see `kernels.sketch.sketch_candidates` for ties.
            decoder: `"torch"` or `"numba"`, see `sketching.decoders`.

        Returns:
            int64 `[heads, columns, C]`, distinct rows, -1 for none; `C` is at most `capacity`.
        Cost: `d` products for every column and row of the sketch, `BRANCHING * repetitions` bytes
            for every kept node. Memory of that size: ask for some columns at a time. No host
            synchronisation.
        """
        drawn = self.drawn
        unit = _unit(drawn.repetitions)
        # squares of products are scores; the half lets a heavy row reach `unit` despite rounding
        factor = math.sqrt(min(tau, _MOST_TAU) * (unit + 0.5))
        if decoder == "numba":
            from .numba_decoder import numba_candidates

            return numba_candidates(
                key, self.top, self.hashed, self.places, factor, unit,
                _least_score(drawn.repetitions), capacity, drawn.num_rows,
            )  # fmt: skip
        return sketch_candidates(
            key, self.top, self.hashed, self.places, factor=factor, unit=unit,
            least=_least_score(drawn.repetitions), capacity=capacity, num_rows=drawn.num_rows,
        )  # fmt: skip

    def column_bytes(self, capacity: int) -> int:
        """Return about how many bytes are held for each column while it is searched."""
        return candidate_bytes(self.top, self.hashed, capacity)
