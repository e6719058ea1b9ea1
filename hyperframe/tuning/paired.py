"""How far apart two runs over the same tokens are, with an error that correlations do not hide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

from ..evaluation.blocks import BLOCKS, block_means, mean_and_error

__all__ = ["Increase", "paired_increase"]


@dataclass(frozen=True, kw_only=True)
class Increase:
    """The mean increase of a loss, in nats for each token.

    Attributes:
        mean: the increase.
        error: its standard error, over blocks of positions.
    """

    mean: float
    error: float

    def upper(self, confidence: float) -> float:
        """Return a limit that the expected increase keeps with this probability.

        The mean of the blocks is taken as normal.

        Example:
            >>> round(Increase(mean=0.01, error=0.002).upper(0.975), 5)
            0.01392
        """
        return self.mean + NormalDist().inv_cdf(confidence) * self.error

    @property
    def percent(self) -> float:
        """The increase of the perplexity, in percent."""
        return 100 * math.expm1(self.mean)

    @property
    def percent_error(self) -> float:
        """The standard error of `percent`."""
        return 100 * math.exp(self.mean) * self.error


def paired_increase(runs: Sequence[Tensor], bases: Sequence[Tensor]) -> Increase:
    """Compare the losses of the same tokens, sequence by sequence.

    What two runs have in common (hard words, easy words) cancels position by position. Neighbours
    are still correlated, so that the standard error is that of means of blocks
    (`hyperframe.evaluation.blocks`).

    Args:
        runs: losses of every sequence, `[n - 1]` each.
        bases: losses of the same sequences that they are compared with.

    Example:
        >>> base = torch.rand(4096, dtype=torch.float64)
        >>> paired_increase([base + 0.5], [base]).error < 1e-6
        True
    """
    blocks: list[float] = []
    total, count = 0.0, 0
    for run, base in zip(runs, bases, strict=True):
        difference = run.double() - base.double()
        blocks += block_means(difference, max(2, BLOCKS // len(runs)))
        total, count = total + float(difference.sum()), count + len(difference)
    _, error = mean_and_error(blocks)
    return Increase(mean=total / count, error=math.inf if error is None else error)
