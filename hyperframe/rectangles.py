"""The geometry of Algorithm 4: a causal matrix as leaves on the diagonal and rectangles below it.

A causal `n x n` matrix is two causal halves and, below the diagonal, one square without a mask;
the halves split again. With equal leaves, all squares of one level have the same size `S`: the
queries of every odd run of `S` positions against the keys of the even run before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .tables import kept

__all__ = [
    "Level",
    "Places",
    "causal_levels",
    "even_runs",
    "leaf_size",
    "level_rectangles",
    "odd_runs",
]

Places = tuple[int, int, int, int]
"""A rectangle: `(query_start, query_stop, key_start, key_stop)`."""


@dataclass(frozen=True)
class Level:
    """The rectangles of one level: queries `[(2r+1)S, (2r+2)S)`, keys `[2rS, (2r+1)S)`.

    Attributes:
        size: `S`.
        full: how many rectangles are whole; they come first and can be batched.
        ragged: number of query rows of the one cut rectangle behind them, or 0.
    """

    size: int
    full: int
    ragged: int


def leaf_size(length: int, longest: int) -> int:
    """Return the length of equal leaves, a power of two of them, none above `longest`."""
    leaves = 1
    while -(-length // leaves) > max(1, longest):
        leaves *= 2
    return -(-length // leaves)


def causal_levels(length: int, leaf: int) -> list[Level]:
    """Return the levels above leaves of a given size, the smallest rectangles first.

    Example:
        >>> causal_levels(10, 3)
        [Level(size=3, full=1, ragged=1), Level(size=6, full=0, ragged=4)]
    """
    levels = []
    size = leaf
    while size < length:
        # no divmod: torch.compile refuses it for a length that it does not know
        full, rest = length // (2 * size), length % (2 * size)
        levels.append(Level(size=size, full=full, ragged=max(0, rest - size)))
        size *= 2
    return levels


@kept
def level_rectangles(level: Level, length: int) -> tuple[Places, ...]:
    """Return the rectangles of a level, the cut one last.

    Example:
        >>> [level_rectangles(level, 10) for level in causal_levels(10, 3)]
        [((3, 6, 0, 3), (9, 10, 6, 9)), ((6, 10, 0, 6),)]
    """
    size = level.size
    starts = (2 * size * number for number in range(level.full + (level.ragged > 0)))
    return tuple(
        (start + size, min(start + 2 * size, length), start, start + size) for start in starts
    )


def odd_runs(tensor: torch.Tensor, level: Level) -> torch.Tensor:
    """Stack the query side of a level's whole rectangles: `[batch * full, heads, S, d]`."""
    return _runs(tensor, level)[:, :, :, 1].transpose(1, 2).flatten(0, 1)


def even_runs(tensor: torch.Tensor, level: Level) -> torch.Tensor:
    """Stack the key side of a level's whole rectangles: `[batch * full, heads, S, d]`."""
    return _runs(tensor, level)[:, :, :, 0].transpose(1, 2).flatten(0, 1)


def _runs(tensor: torch.Tensor, level: Level) -> torch.Tensor:
    batch, heads = tensor.shape[:2]
    whole = tensor[:, :, : 2 * level.size * level.full]
    return whole.reshape(batch, heads, level.full, 2, level.size, *tensor.shape[3:])
