"""Figure: error against the number of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .curves import draw_curves
from .rows import Row, Task, measured, over_heads
from .source import Source

__all__ = ["CAPTION", "draw", "summary", "tasks"]

CAPTION = (
    "Relative Frobenius error of a head's output against the number m of sampled keys, 0 drops "
    "everything that is not heavy: median over layers and heads, with their quartiles. One draw."
)


def tasks(source: Source) -> Iterator[Task]:
    """Yield the errors of every spec and layer, for all numbers of samples."""
    grid = sorted(source.settings.sample_grid)
    for index, spec in enumerate(source.settings.specs):
        for number, layer in enumerate(source.problem.layers):
            yield Task(
                f"{spec}, layer {layer.layer_idx}, {len(grid)} numbers of samples",
                (index, number),
                lambda spec=spec, n=number: _rows(source, spec, n, grid),  # type: ignore[misc]
                source.row("samples", "error", spec=spec, number=number),
            )


def _rows(source: Source, spec: str, number: int, grid: Sequence[int]) -> Iterator[Row]:
    for num_samples in grid:
        errors = source.errors(spec, number, num_samples=num_samples)
        yield from source.head_rows(
            "samples", "error", errors, spec=spec, number=number, num_samples=num_samples
        )


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return median and quartiles over layers and heads."""
    return over_heads(measured(rows, "samples"), by=("spec", "num_samples", "n"))


def draw(rows: Sequence[Row], specs: Sequence[str]) -> Any:
    """Draw a line for each spec; None where there are no rows."""
    return draw_curves(
        rows, specs, figure_name="samples", x="num_samples", label="m, sampled keys of a row"
    )
