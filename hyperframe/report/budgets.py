"""Figure: error against the budget of the detector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .curves import draw_curves
from .rows import Row, Task, measured, over_heads
from .source import Source

__all__ = ["CAPTION", "draw", "summary", "tasks"]

CAPTION = (
    "Relative Frobenius error of a head's output against the budget: the keys that a detector aims "
    "at, for blocks of keys their common size. Median over layers and heads, with their quartiles; "
    "the number of samples stays."
)
_NO_RULE = "has no rule that makes a budget of keys a parameter"


def tasks(source: Source) -> Iterator[Task]:
    """Yield the errors of every spec, layer and budget; a row says which specs have no budget."""
    for index, spec in enumerate(source.settings.specs):
        if not source.takes_budget(spec):
            known = source.row("budgets", "error", spec=spec)
            yield Task(f"{spec} at no budget", (index,), lambda k=known: [  # type: ignore[misc]
                k | {"failure": _NO_RULE}
            ], known)  # fmt: skip
            continue
        for number, layer in enumerate(source.problem.layers):
            for budget in sorted(source.settings.budgets):
                fields = {"spec": spec, "number": number, "budget": budget}
                yield Task(
                    f"{spec} at {budget}, layer {layer.layer_idx}", (index, number, budget),
                    lambda fields=fields: _rows(source, **fields),  # type: ignore[misc]
                    source.row("budgets", "error", **fields),
                )  # fmt: skip


def _rows(source: Source, spec: str, number: int, budget: int) -> list[Row]:
    num_samples = source.settings.num_samples
    errors = source.errors(spec, number, num_samples=num_samples, budget=budget)
    return source.head_rows(
        "budgets", "error", errors, spec=spec, number=number, num_samples=num_samples,
        budget=budget,
    )  # fmt: skip


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return median and quartiles over layers and heads."""
    return over_heads(measured(rows, "budgets"), by=("spec", "budget", "num_samples", "n"))


def draw(rows: Sequence[Row], specs: Sequence[str]) -> Any:
    """Draw a line for each spec; None where there are no rows."""
    return draw_curves(
        rows, specs, figure_name="budgets", x="budget", label="budget, keys the detector aims at"
    )
