"""What a report measures and draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..attention import HyperAttention
from ..component import check_choice, check_non_negative_int, check_positive_int
from ..errors import ArgumentError

__all__ = ["DEFAULT_SPECS", "FIGURES", "ReportSettings"]

FIGURES: dict[str, str] = {
    "masks": "which entries each detector holds, over the attention matrix of one head",
    "alpha": "alpha / n against n",
    "samples": "error against the number of samples",
    "budgets": "error against the budget",
    "heads": "error, mass held and alpha / n of every head",
    "recursion": "what the causal recursion does on rectangles of every size",
}
"""The figures, in the order of the page."""

DEFAULT_SPECS = ("sort_lsh", "sliding_window | heavy_columns", "fast")
"""What is compared unless told otherwise: the published detector, a simple one, a preset."""


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What is measured, and how.

    Attributes:
        specs: detectors as `HyperAttention` takes them: names, spec strings or presets.
        figures: some of `FIGURES`.
        sampler: of the residual; "auto" is the one that goes with the detector.
        num_samples: of every figure but `samples`.
        sample_grid: numbers of samples of that figure.
        budgets: keys that detectors aim at, of that figure; see
            `hyperframe.benchmarking.frontier.budgets`.
        lengths: of the figure `alpha`, prefixes of what was captured; None doubles up to all of
            it, in five steps.
        skip_first: leading columns that this figure also leaves out.
        head: layer and head of the figure `masks`, as the file numbers them; None takes the first
            head of the middle layer.
        leaf: rows of an exact leaf of the causal recursion, at most. None is an eighth of the
            positions or twice the samples, whichever is more, and at most half of the positions.
        cells: that the longer side of a picture of a matrix has at most.
        backend: of the attention.
        seed: of all draws.
        device: where.
    """

    specs: Sequence[str] = DEFAULT_SPECS
    figures: Sequence[str] = tuple(FIGURES)
    sampler: str = "auto"
    num_samples: int = 256
    sample_grid: Sequence[int] = (0, 64, 256, 1024)
    budgets: Sequence[int] = (64, 128, 256, 512)
    lengths: Sequence[int] | None = None
    skip_first: int = 32
    head: tuple[int, int] | None = None
    leaf: int | None = None
    cells: int = 96
    backend: str = "auto"
    seed: int = 0
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        """Check the numbers and names, and that every attention can be made."""
        owner = "report"
        for figure in self.figures:
            check_choice(owner, "figure", figure, tuple(FIGURES))
        for name in ("num_samples", "skip_first"):
            check_non_negative_int(owner, name, getattr(self, name))
        for number in self.sample_grid:
            check_non_negative_int(owner, "samples", number)
        for budget in self.budgets:
            check_positive_int(owner, "budget", budget)
        for length in self.lengths or ():
            check_positive_int(owner, "length", length)
        check_positive_int(owner, "cells", self.cells)
        if self.leaf is not None:
            check_positive_int(owner, "leaf", self.leaf)
        for name in ("specs", "figures", "sample_grid", "budgets"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ArgumentError(
                    f"report: {name}={tuple(values)!r}: name one at least, and each once"
                )
        for spec in self.specs:
            self.attention(spec)

    def attention(self, spec: str) -> HyperAttention:
        """Return the attention of a spec: causal in a single pass, never exact."""
        return HyperAttention(
            detector=spec, sampler=self.sampler, num_samples=self.num_samples, min_seq_len=0,
            backend=self.backend, seed=self.seed,
        )  # fmt: skip

    def shows(self, figure: str) -> bool:
        """Whether a figure was asked for."""
        return figure in self.figures
