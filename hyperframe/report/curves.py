"""Lines of errors, one for each detector: what `samples`, `budgets` and `recursion` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .drawing import colour_of, figure, label_log, panel_title
from .rows import Row, measured

__all__ = ["draw_curves"]

_ROUNDING = 1e-5  # what is exact up to rounding lies below the axis


def draw_curves(
    rows: Sequence[Row], specs: Sequence[str], *, figure_name: str, x: str, label: str
) -> Any:
    """Draw the median error of every spec, with quartiles, both axes logarithmic.

    Args:
        rows: of a report.
        specs: in the order of their colours.
        figure_name: whose rows.
        x: the key of the horizontal axis; a 0 stands at its left end.
        label: of this axis.

    Returns:
        The figure; None where there are no rows.
    """
    shown = measured(rows, figure_name, statistic="median", quantity="error")
    if not shown:
        return None
    ticks = sorted({row[x] for row in shown})
    drawn = figure(3.9)
    axis = drawn.subplots()
    for spec in specs:
        lines = [
            sorted(
                (row[x], row["value"])
                for row in measured(rows, figure_name, statistic=name, spec=spec, quantity="error")
            )
            for name in ("median", "low", "high")
        ]
        if not lines[0]:
            continue
        where = [point for point, _ in lines[0]]
        median, low, high = ([y for _, y in line] for line in lines)
        colour = colour_of(specs, spec)
        axis.plot(
            where, median, marker="o", markersize=4, color=colour, label=panel_title(spec, width=44)
        )
        axis.fill_between(where, low, high, color=colour, alpha=0.12, linewidth=0)
    positive = [tick for tick in ticks if tick > 0]
    if len(positive) < len(ticks):
        axis.set_xscale("symlog", linthresh=min(positive, default=1), linscale=0.4)
    else:
        axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    if axis.get_ylim()[0] < _ROUNDING:
        axis.set_ylim(bottom=_ROUNDING)
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    label_log(axis.yaxis)
    axis.minorticks_off()
    axis.set_xlabel(label, fontsize=9)
    axis.set_ylabel("relative error of a head's output", fontsize=9)
    axis.grid(visible=True, alpha=0.25)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7)
    return drawn
