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

from ..precision import without_autocast
from .count_sketch import BRANCHING, CountSketch

__all__ = ["MAX_REPETITIONS", "RowSearch", "miss_bound", "repetitions_for"]

PASS_SHARE = 5
"""A node must show a fifth of a heavy row's energy, on average over the repetitions.

Energy spread thinly over `8 tau` buckets shows 1/8. Lower, and all nodes pass; higher, and more
repetitions must agree.
"""

MAX_REPETITIONS = 255
"""The bytes of all repetitions add up to a byte."""

_MOST_TAU = 1e18  # of the search, whose squares must not overflow


def _unit(repetitions: int) -> int:
    """Return the byte of a square that has all the energy of a heavy row."""
    return MAX_REPETITIONS // repetitions


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
        sketches: of the queries, the top level first; their dtype is that of the products.
        places: for every hashed level the words of each node's children, as places among the
            words of all repetitions: int64 `[heads, nodes, repetitions]`.
    """

    drawn: CountSketch
    sketches: tuple[torch.Tensor, ...]
    places: tuple[torch.Tensor, ...]

    @classmethod
    def of(
        cls, drawn: CountSketch, query: torch.Tensor, dtype: torch.dtype | None = None
    ) -> RowSearch:
        """Sketch queries, `[heads, n_q, d]`; `dtype` is for the products, None is that of query."""
        sketches = tuple(part.to(dtype or part.dtype) for part in drawn.apply(query))
        first = torch.arange(drawn.repetitions, device=query.device) * (drawn.width // BRANCHING)
        places = tuple(
            drawn.blocks(level).transpose(1, 2) + first for level in range(len(drawn.orders))
        )
        return cls(drawn=drawn, sketches=sketches, places=places)

    def candidates(self, key: torch.Tensor, *, tau: float, capacity: int) -> torch.Tensor:
        """Return candidates for the heavy rows of columns.

        Args:
            key: `[heads, columns, d]`, scaled so that every column `Q k` has energy 1, or is zero.
            tau: a row is heavy if its square is at least `1 / tau`.
            capacity: nodes of a column that are kept at each level.

        Returns:
            int64 `[heads, columns, C]`, distinct rows, -1 for none; `C` is at most `capacity`.
        Cost: `d` products for every column and row of the sketch, `BRANCHING * repetitions` bytes
            for every kept node. Memory of that size: ask for some columns at a time. No host
            synchronisation.
        """
        drawn = self.drawn
        heads, columns, _ = key.shape
        unit, least = _unit(drawn.repetitions), _least_score(drawn.repetitions)
        # squares of products are scores; the half lets a heavy row reach `unit` despite rounding
        factor = math.sqrt(min(tau, _MOST_TAU) * (unit + 0.5))
        key = (key * factor).to(self.sketches[0].dtype)
        score = _scores(self.sketches[0], key, unit).sum(dim=2, dtype=torch.uint8)
        node, is_kept = _best(score, None, least, capacity)
        for sketch, places in zip(self.sketches[1:], self.places, strict=True):
            # the bytes of eight siblings are a word; words add up without carries
            words = _scores(sketch, key, unit).view(torch.int64).flatten(2)
            parents = node.view(heads, -1, 1).expand(-1, -1, drawn.repetitions)
            place = places.gather(1, parents).view(heads, columns, -1)
            total = words.gather(-1, place).unflatten(-1, (-1, drawn.repetitions)).sum(dim=-1)
            score = torch.where(is_kept, total, 0).view(torch.uint8)
            node, is_kept = _best(score, node, least, capacity)
        return torch.where(is_kept & (node < drawn.num_rows), node, -1)


def _scores(sketch: torch.Tensor, key: torch.Tensor, unit: int) -> torch.Tensor:
    """Return the bytes of all buckets: `[heads, columns, repetitions, buckets]`."""
    with without_autocast(key):
        value = key @ sketch.flatten(1, 2).transpose(-1, -2)
    score = value.square_().clamp_(max=unit).to(torch.uint8)
    by_bucket: torch.Tensor = score.unflatten(-1, sketch.shape[1:3])
    return by_bucket


def _best(
    score: torch.Tensor, node: torch.Tensor | None, least: int, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best nodes, `[heads, columns, C]`, and which of them score enough.

    Args:
        score: uint8 `[heads, columns, nodes]`, of all children of `node`.
        node: int64, the parents; None for the nodes themselves.
        least: what is enough.
        capacity: how many are kept.
    """
    best, place = score.topk(min(capacity, score.shape[-1]), dim=-1, sorted=False)
    if node is not None:
        place = node.gather(-1, place // BRANCHING) * BRANCHING + place % BRANCHING
    return place, best >= least
