"""Figure and table: what the causal recursion does on rectangles of every size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..diagnostics.recursion import RectangleReport, recursion_report
from .alpha import QUANTITY as ALPHA
from .curves import draw_curves
from .page import Table
from .rows import Row, Task, measured, over_heads
from .source import Source

__all__ = ["CAPTION", "draw", "leaf_of", "summary", "table", "tasks"]

CAPTION = (
    "Algorithm 4: the causal matrix is exact leaves on the diagonal, and below it rectangles "
    "without a mask, each solved by itself. Drawn is the relative error of a rectangle's own "
    "output, with its quartiles. The table has medians over layers and heads for each size: that "
    "error; the softmax mass held; the rectangle's share of its rows' normalisers, which is how "
    "much of the error the output sees; alpha / n; and log10 of kappa, as defined and after the "
    "mean key is taken away. A rectangle of no more keys than samples is exact."
)
_CENTRED = "log10 kappa, centred"
_COLUMNS = {
    "error": "{:.3g}", "mass": "{:.3f}", "weight": "{:.2f}", ALPHA: "{:.3g}",
    "log10 kappa": "{:.1f}", _CENTRED: "{:.1f}",
}  # fmt: skip
_LEAVES = 8  # of the recursion at most, unless a length is given


def leaf_of(source: Source) -> int:
    """Return how many rows a leaf has at most; see `ReportSettings`."""
    settings, length = source.settings, source.problem.length
    if settings.leaf is not None:
        return settings.leaf
    return max(1, min(max(-(-length // _LEAVES), 2 * settings.num_samples), -(-length // 2)))


def tasks(source: Source) -> Iterator[Task]:
    """Yield the rectangles of every spec and layer; none of heads without a causal mask."""
    if not source.problem.is_causal:
        return
    for index, spec in enumerate(source.settings.specs):
        for number, layer in enumerate(source.problem.layers):
            yield Task(
                f"recursion of {spec}, layer {layer.layer_idx}", (index, number),
                lambda spec=spec, n=number: _rows(source, spec, n),  # type: ignore[misc]
                source.row("recursion", "error", spec=spec, number=number),
            )  # fmt: skip


def _rows(source: Source, spec: str, number: int) -> Iterator[Row]:
    layer, settings = source.layer(number), source.settings
    attention = settings.attention(spec).replace(causal="recursive", min_seq_len=leaf_of(source))
    report = recursion_report(attention, layer.query, layer.key, layer.value, scale=layer.scale)
    by_size: dict[int, list[RectangleReport]] = {}
    for one in report.rectangles:
        by_size.setdefault(one.places[3] - one.places[2], []).append(one)
    for size, some in by_size.items():
        for quantity in _COLUMNS:
            values = torch.stack([_value(one, quantity, size) for one in some]).mean(dim=(0, 1))
            yield from source.head_rows(
                "recursion", quantity, values.tolist(), spec=spec, number=number, n=size,
                num_samples=settings.num_samples,
            )  # fmt: skip
        yield source.row(
            "recursion", "calls", statistic="layer", spec=spec, number=number, n=size,
            value=len(some),
        )  # fmt: skip


def _value(one: RectangleReport, quantity: str, size: int) -> torch.Tensor:
    """Return a quantity of a rectangle: float64 `[batch, query_heads]`."""
    if quantity == ALPHA:
        return one.alpha / size
    if quantity in ("log10 kappa", _CENTRED):
        kappa = one.centred_kappa if quantity == _CENTRED else one.kappa
        return kappa.log() / math.log(10)
    found: torch.Tensor = getattr(one, quantity)
    return found.double()


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return median and quartiles over layers and heads."""
    shown = [row for row in measured(rows, "recursion") if row["quantity"] != "calls"]
    return over_heads(shown, by=("spec", "quantity", "num_samples", "n"))


def draw(rows: Sequence[Row], specs: Sequence[str]) -> Any:
    """Draw the error of every spec against the size; None where there are no rows."""
    return draw_curves(rows, specs, figure_name="recursion", x="n", label="keys of a rectangle")


def table(rows: Sequence[Row], specs: Sequence[str]) -> Table | None:
    """Return a line for each spec and size, the largest first; None where there are no rows."""
    medians = {
        (row["spec"], row["n"], row["quantity"]): row["value"]
        for row in measured(rows, "recursion", statistic="median")
    }
    calls = {
        (row["spec"], row["n"]): row["value"]
        for row in measured(rows, "recursion", quantity="calls")
    }
    lines = []
    for spec in specs:
        sizes = sorted({n for of, n, _ in medians if of == spec}, reverse=True)
        for n in sizes:
            cells = [form.format(medians[spec, n, name]) for name, form in _COLUMNS.items()]
            lines.append([spec, f"{n:,}", str(calls[spec, n]), *cells])
    if not lines:
        return None
    head = ["detector", "keys", "calls", *_COLUMNS]
    return Table(head=head, lines=lines)
