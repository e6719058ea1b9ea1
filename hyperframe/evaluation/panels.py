"""What the figures of an evaluation have in common: names, colours, panels, bars and lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..report.drawing import colour_of, figure, panel_title
from .rows import Row
from .settings import EXACT

__all__ = [
    "bars",
    "colour",
    "error_of_change",
    "exact_level",
    "finish",
    "legend_below",
    "line_with_errors",
    "lines_of_n",
    "name_of",
    "names_of",
    "stacked",
]

_GREY = "0.25"
_LEAST = 0.002  # length of a vertical axis, as a share of its values


def name_of(row: Row) -> str:
    """Return what a table calls the run of a row."""
    if row["run"] == EXACT or row["layers"] is None:
        return str(row["run"])
    return f"{row['run']}, last {row['layers']}"


def names_of(rows: Sequence[Row]) -> list[str]:
    """Return the names of runs, each once, in their order."""
    return list(dict.fromkeys(name_of(row) for row in rows))


def lines_of_n(axis: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Draw the value of every run against n, with the standard error of its change."""
    for name in names:
        line = sorted((row for row in rows if name_of(row) == name), key=lambda row: row["n"])
        if line:
            line_with_errors(axis, line, "n", colour=colour(names, line[0]), label=name)
    ticks = sorted({row["n"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axis.minorticks_off()


def line_with_errors(axis: Any, line: Sequence[Row], key: str, *, colour: str, label: str) -> None:
    """Draw values against what stands under a key, with the standard errors of their changes.

    Those are of the difference to exact attention: the text's own spread moves all lines together.
    """
    axis.errorbar(
        [row[key] for row in line], [row["value"] for row in line],
        yerr=[error_of_change(row) for row in line], marker="o", markersize=3.5, linewidth=1.3,
        capsize=2, color=colour, label=panel_title(label, width=44),
    )  # fmt: skip


def exact_level(axis: Any, value: float) -> None:
    """Draw a level line at the value of exact attention."""
    axis.axhline(value, color=_GREY, linestyle="--", linewidth=1, label=EXACT)


def bars(rows: Sequence[Row]) -> tuple[Any, list[tuple[Any, list[Row]]]]:
    """Return a figure with a panel for each n, and the rows of each: one bar for every row."""
    lengths = sorted({row["n"] for row in rows})
    groups = [[row for row in rows if row["n"] == n] for n in lengths]
    drawn, axes = stacked(len(lengths), 0.6 + 0.36 * max(map(len, groups)))
    for axis, n, group in zip(axes, lengths, groups, strict=True):
        axis.set_yticks(range(len(group)), [panel_title(name_of(row), width=26) for row in group])
        axis.set_ylim(len(group) - 0.5, -0.5)
        axis.set_title(f"n = {n:,}", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.tick_params(axis="y", labelsize=6)
        axis.spines[["top", "right"]].set_visible(False)
    return drawn, list(zip(axes, groups, strict=True))


def legend_below(drawn: Any, axes: Sequence[Any]) -> None:
    """Name the lines of all panels below the figure, where they hide nothing."""
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found = dict(zip(labels, handles, strict=True)) | found
    columns = 2 if len(found) > 2 else 1
    lines = max(label.count("\n") + 1 for label in found) * -(-len(found) // columns)
    drawn.set_figheight(drawn.get_figheight() + 0.14 * lines)
    drawn.legend(found.values(), found, loc="outside lower center", fontsize=7, ncols=columns)


def colour(names: Sequence[str], row: Row) -> str:
    """Return grey for exact attention, and a colour of its own for every other run."""
    if row["run"] == EXACT:
        return _GREY
    return colour_of([name for name in names if name != EXACT], name_of(row))


def stacked(count: int, height: float) -> tuple[Any, list[Any]]:
    """Return a figure and its panels, one below the other, each of a height in inches."""
    drawn = figure(0.7 + height * count)
    return drawn, list(drawn.subplots(count, 1, squeeze=False)[:, 0])


def finish(axis: Any, label: str) -> None:
    """Name the vertical axis, and draw a grid.

    The axis is at least 0.2 % of its values long: less would blow rounding up to a trend.
    """
    low, high = axis.get_ylim()
    middle = (low + high) / 2
    half = max(high - low, _LEAST * max(abs(middle), 1.0)) / 2
    axis.set_ylim(middle - half, middle + half)
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.set_ylabel(label, fontsize=8)
    axis.grid(visible=True, alpha=0.25)
    axis.tick_params(labelsize=8)


def error_of_change(row: Row) -> float:
    """Return the standard error of a change in percent, in units of the value."""
    if row["change_error"] is None or row["exact"] is None:
        return 0.0
    return float(row["change_error"]) * float(row["exact"]) / 100
