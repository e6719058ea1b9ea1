"""Algorithms 2 and 4 of the paper, line by line in float64: one head, lists and loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

Matrix = Sequence[Sequence[float]]


def entries(query: torch.Tensor, key: torch.Tensor, scale: float) -> list[list[float]]:
    """`A = exp(scale Q K^T)` of one head, `[n_q, d]` and `[n_k, d]`."""
    logits = scale * query.double() @ key.double().T
    return [[math.exp(x) for x in row] for row in logits.tolist()]


def kappa_of(sums: Sequence[float], num_rows: int) -> float:
    """`kappa="auto"` of some unmasked row sums, as the class says; infinite: no floor."""
    positive = [x for x in sums if x > 0]
    if len(positive) < 8:
        return math.inf
    reach = max(1.0, math.log(num_rows) / math.log(len(positive)))
    return math.exp(reach * math.log(max(positive) / min(positive)))


def approx_d(
    a: Matrix, mask: Matrix, rows: Sequence[int], columns: Sequence[int], *,
    kappa: float | str, epsilon: float, constant: float, unit: Sequence[float] | None = None,
) -> list[float]:  # fmt: skip
    """Algorithm 2 given its random choices.

    Args:
        a: the matrix.
        mask: `M`, of zeros and ones.
        rows: T.
        columns: `l_1 .. l_m`.
        kappa: the parameter.
        epsilon: the parameter.
        constant: behind the Theta of line 6.
        unit: a factor of each row in which unmasked row sums are measured; None is 1 (the paper).
    """
    n, m = len(a[0]), len(columns)
    unit = [1.0] * len(a) if unit is None else unit
    # line 3
    sums = [sum((1 - mask[i][j]) * a[i][j] for j in range(n)) / unit[i] for i in rows]
    tau = max(sums)
    ratio = kappa_of(sums, len(a)) if isinstance(kappa, str) else kappa
    found = []
    for i in range(len(a)):
        masked = sum(mask[i][j] * a[i][j] for j in range(n))
        if all(mask[i]):  # the departure: such a row is known
            found.append(masked)
            continue
        floor = tau / ratio * unit[i]
        # line 6
        cap = constant * epsilon**2 * m / (n * math.log(n)) * (masked + floor)
        if masked + floor == 0:  # nothing is known of the row
            cap = math.inf
        # line 7
        d = n / m * sum((1 - mask[i][j]) * min(a[i][j], cap) for j in columns)
        # line 8
        found.append(masked + max(d, floor))
    return found


def prefix_approx_d(
    a: Matrix, mask: Matrix, rows: Sequence[int], columns: Sequence[Sequence[int]], *,
    kappa: float | str, epsilon: float, constant: float, unit: Sequence[float] | None = None,
) -> list[float]:  # fmt: skip
    """Algorithm 2 under a causal mask, square, where every row samples its own prefix.

    Args: as `approx_d`; `columns` are those of each row. A unit of 1 is that of mean entries.
    """
    unit = [1.0] * len(a) if unit is None else unit
    found, sums = [], []
    for i in range(len(a)):
        n, m = i + 1, len(columns[i])
        unmasked = [j for j in range(n) if not mask[i][j]]
        if i in rows and unmasked:
            sums.append(sum(a[i][j] for j in unmasked) / len(unmasked) / unit[i])
        masked = sum(a[i][j] for j in range(n) if mask[i][j])
        if n <= m or not unmasked:
            found.append(masked + sum(a[i][j] for j in unmasked))
            continue
        floor = 0.0
        if sums:
            ratio = kappa_of(sums, n) if isinstance(kappa, str) else kappa
            floor = max(sums) / ratio * unit[i] * len(unmasked)
        cap = constant * epsilon**2 * m / (n * math.log(n)) * (masked + floor)
        if masked + floor == 0:
            cap = math.inf
        d = n / m * sum(min(a[i][j], cap) for j in columns[i] if not mask[i][j])
        found.append(masked + max(d, floor))
    return found


def causal_approx_d(
    a: Matrix, leaf: int, unmasked: Callable[[range, range], Sequence[float]]
) -> list[float]:
    """Algorithm 4 for the row sums of a square matrix.

    Args:
        a: the matrix.
        leaf: rows of a leaf.
        unmasked: estimates the row sums of a rectangle, rows and columns of `a`.
    """

    def solve(rows: range) -> list[float]:
        if len(rows) <= leaf:
            return [sum(a[i][rows.start : i + 1]) for i in rows]
        half = leaf
        while 2 * half < len(rows):
            half *= 2
        earlier, later = rows[:half], rows[half:]
        d_11, d_22 = solve(earlier), solve(later)
        d_21 = unmasked(later, earlier)
        return d_11 + [x + y for x, y in zip(d_21, d_22, strict=True)]

    return solve(range(len(a)))
