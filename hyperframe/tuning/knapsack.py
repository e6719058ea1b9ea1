"""One option for each item: the least total value whose total weight keeps a limit.

Layers are the items. Under a limit of the loss, values are costs and weights are losses; under a
limit of the cost it is the other way round.

>>> costs = [[10.0, 4.0, 1.0], [10.0, 4.0, 1.0]]
>>> losses = [[0.0, 0.1, 0.2], [0.0, 0.1, 0.9]]
>>> choose(costs, losses, 0.35)
(2, 1)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["choose"]

_GRID = 10_000


def choose(
    values: Sequence[Sequence[float]], weights: Sequence[Sequence[float]], capacity: float,
    *, grid: int = _GRID,
) -> tuple[int, ...] | None:  # fmt: skip
    """Return an option for every item, of the least total value whose total weight fits.

    A dynamic program over weights that are rounded up to a grid: what fits there fits in truth.
    The weight that every item needs at least is taken out first, so that it is not rounded. Single
    exchanges then use what rounding left.

    Args:
        values: of every option of every item, finite.
        weights: likewise, not negative.
        capacity: that the weights may add up to.
        grid: steps of the capacity.

    Returns:
        The index of an option for every item; None where even the lightest do not fit. The total
        value is at most the best possible for a capacity smaller by `len(values) / grid` of what
        the lightest options leave of it.

    Cost: O(options x grid) time, O(items x grid) memory. Deterministic.
    """
    least = [min(of_item) for of_item in weights]
    free = capacity - sum(least)
    rounding = 1e-12 * (abs(capacity) + sum(least))
    if free < -rounding:
        return None
    steps = [
        _steps(of_item, lightest, free, grid)
        for of_item, lightest in zip(weights, least, strict=True)
    ]
    best = np.zeros(grid + 1)  # by capacity: the least value of the items so far
    picks = np.zeros((len(values), grid + 1), dtype=np.int32)
    for item, (of_item, needed) in enumerate(zip(values, steps, strict=True)):
        found = np.full(grid + 1, np.inf)
        for option, (value, step) in enumerate(zip(of_item, needed, strict=True)):
            if step > grid:
                continue
            candidate = np.full(grid + 1, np.inf)
            candidate[step:] = best[: grid + 1 - step] + value
            is_better = candidate < found
            found[is_better], picks[item, is_better] = candidate[is_better], option
        best = found
    left, chosen = grid, []
    for item in reversed(range(len(values))):
        chosen.append(int(picks[item, left]))
        left -= steps[item][chosen[-1]]
    return _exchange(values, weights, capacity, chosen[::-1])


def _steps(weights: Sequence[float], lightest: float, free: float, grid: int) -> list[int]:
    """Return by how many steps options are heavier than the lightest one; grid + 1 is too many."""
    rest = [weight - lightest for weight in weights]
    if free <= 0:
        return [0 if weight <= 0 else grid + 1 for weight in rest]
    return [min(grid + 1, int(np.ceil(weight / free * grid))) for weight in rest]


def _exchange(
    values: Sequence[Sequence[float]], weights: Sequence[Sequence[float]], capacity: float,
    chosen: list[int],
) -> tuple[int, ...]:  # fmt: skip
    """Exchange single options, the largest gain first, as long as one gains and fits."""
    while True:
        left = capacity - sum(of_item[k] for of_item, k in zip(weights, chosen, strict=True))
        gain, item, option = max(
            (
                (values[i][chosen[i]] - value, i, k)
                for i in range(len(values))
                for k, value in enumerate(values[i])
                if weights[i][k] - weights[i][chosen[i]] <= left
            ),
            default=(0.0, 0, 0),
        )
        if gain <= 0:
            return tuple(chosen)
        chosen[item] = option
