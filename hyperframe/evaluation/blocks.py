"""Means with standard errors: of numbers in a sequence, which are correlated.

The losses of neighbouring tokens are not independent, so that their variance over n would claim too
much. The sequence is cut into blocks of equal length whose means are nearly so, and the standard
error is that of the mean of the block means (batch means; Schmeiser 1982 finds 10 to 30 blocks
enough, and more of no use). A trend over the blocks counts as spread: the error is then too large,
never too small. Differences of two runs are taken block by block, in which such a trend and the
hard passages of a text cancel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["BLOCKS", "block_means", "difference", "mean_and_error"]

BLOCKS = 32
"""Blocks of a sequence, where it has that many numbers."""


def block_means(values: Tensor, blocks: int = BLOCKS) -> list[float]:
    """Return the means of blocks of equal length.

    Args:
        values: `[n]`, in their order.
        blocks: how many; no more than there are numbers.

    Returns:
        The means. Where the number of blocks does not divide n, the first numbers are left out
        (fewer than there are blocks).

    Example:
        >>> block_means(torch.tensor([9.0, 1.0, 3.0, 5.0, 7.0]), blocks=2)
        [2.0, 6.0]
    """
    blocks = max(1, min(blocks, len(values)))
    size = len(values) // blocks
    kept = values[len(values) - blocks * size :].double()
    means: list[float] = kept.view(blocks, size).mean(dim=1).tolist()
    return means


def mean_and_error(blocks: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of blocks and its standard error; None where there is one block only.

    Example:
        >>> mean_and_error([1.0, 2.0, 3.0])
        (2.0, 0.5773502691896258)
    """
    values = torch.tensor(list(blocks), dtype=torch.float64)
    if len(values) < 2:
        return float(values.mean()), None
    return float(values.mean()), float(values.std(unbiased=True)) / math.sqrt(len(values))


def difference(blocks: Sequence[float], others: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of the differences of paired blocks, and its standard error.

    Example:
        >>> difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])  # the same in every block
        (1.0, 0.0)
    """
    return mean_and_error([one - other for one, other in zip(blocks, others, strict=True)])
