"""Runs of powers of two that cut every prefix, and how many groups each of them gets."""

from __future__ import annotations

__all__ = ["group_counts", "num_levels"]


def num_levels(units: int) -> int:
    """Return how many sizes of runs are needed to cut prefixes of up to `units` units.

    A prefix of `u` units is one run of `2^l` units for every bit `l` of `u`, the longest first.
    """
    return units.bit_length()


def group_counts(levels: int, unit: int, budget: int, smallest: int = 1) -> list[int]:
    """Return how many groups a run of each level has: powers of two, `budget` in all at most.

    The level with the largest groups gets more until the budget is spent, so that a group has about
    as many keys on all levels; at least one for every level.

    Args:
        levels: number of levels; runs of level `l` have `unit * 2^l` keys.
        unit: keys of the smallest runs.
        budget: groups of one run of each level, together.
        smallest: keys of a group, at least.

    Example:
        >>> group_counts(3, 64, 28)
        [4, 8, 16]
    """
    counts = [1] * levels
    while True:
        sizes = [(unit << level) // counts[level] for level in range(levels)]
        # of equal sizes the longest runs first: they are met by most rows
        order = sorted(range(levels), key=lambda level: (-sizes[level], -level))
        for level in order:
            is_divisible = (unit << level) % (2 * counts[level]) == 0
            fits = sum(counts) + counts[level] <= budget
            if is_divisible and fits and sizes[level] // 2 >= smallest:
                counts[level] *= 2
                break
        else:
            return counts
