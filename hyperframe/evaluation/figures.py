"""The figures of an evaluation, drawn from its rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..report.drawing import colour_of, figure, panel_title
from .panels import (
    bars,
    colour,
    exact_level,
    finish,
    legend_below,
    line_with_errors,
    lines_of_n,
    name_of,
    names_of,
    stacked,
)
from .rows import Row, of_task
from .settings import EXACT

__all__ = ["FIGURES", "Drawing", "draw"]


class Drawing(NamedTuple):
    """A figure of the page.

    Attributes:
        title: above it.
        caption: below it: what it shows, and how to read it.
        draw: makes it from rows; None where they hold nothing to draw.
    """

    title: str
    caption: str
    draw: Callable[[Sequence[Row]], Any]


def draw(name: str, rows: Sequence[Row]) -> Any:
    """Return a figure, or None where the rows hold nothing that it shows."""
    return FIGURES[name].draw(rows)


def _layers(rows: Sequence[Row]) -> Any:
    """Perplexity against the number of replaced layers, a panel for each text and length."""
    rows = [row for row in of_task(rows, "perplexity") if row["layers"] is not None]
    if len({row["layers"] for row in rows}) < 3:
        return None
    specs = [name for name in dict.fromkeys(row["run"] for row in rows) if name != EXACT]
    panels = list(dict.fromkeys((row["input"], row["n"]) for row in rows))
    drawn, axes = stacked(len(panels), 2.4)
    for axis, (text, n) in zip(axes, panels, strict=True):
        of_panel = [row for row in rows if (row["input"], row["n"]) == (text, n)]
        exact = [row for row in of_panel if row["run"] == EXACT]
        for spec in specs:
            line = exact + [row for row in of_panel if row["run"] == spec]
            line.sort(key=lambda row: row["layers"])
            line_with_errors(axis, line, "layers", colour=colour_of(specs, spec), label=spec)
        if exact:
            exact_level(axis, exact[0]["value"])
        axis.set_title(f"{text}, n = {n:,}", fontsize=9)
        axis.set_xticks(sorted({row["layers"] for row in of_panel}))
        finish(axis, "perplexity, base e")
    legend_below(drawn, axes)
    axes[-1].set_xlabel("replaced layers, from the last one", fontsize=8)
    return drawn


def _lengths(rows: Sequence[Row]) -> Any:
    """Perplexity against n, a panel for each text."""
    rows = of_task(rows, "perplexity")
    if len({row["n"] for row in rows}) < 2:
        return None
    panels = list(dict.fromkeys(row["input"] for row in rows))
    drawn, axes = stacked(len(panels), 2.6)
    for axis, text in zip(axes, panels, strict=True):
        of_text = [row for row in rows if row["input"] == text]
        lines_of_n(axis, of_text, names_of(rows))
        axis.set_title(str(text), fontsize=9)
        finish(axis, "perplexity, base e")
    legend_below(drawn, axes)
    axes[-1].set_xlabel("n, tokens", fontsize=8)
    return drawn


def _positions(rows: Sequence[Row]) -> Any:
    """Loss by position, and below what each run adds to it; the longest n of the first text."""
    rows = of_task(rows, "perplexity")
    if not rows:
        return None
    longest = max(row["n"] for row in rows)
    text = rows[0]["input"]
    shown = [row for row in rows if row["n"] == longest and row["input"] == text]
    exact = next((row for row in shown if row["run"] == EXACT), None)
    if exact is None:
        return None
    names = names_of(rows)
    base = [entry["loss"] for entry in exact["details"]["positions"]]
    drawn, axes = stacked(2, 2.2)
    for row in shown:
        entries = row["details"]["positions"]
        where = [(entry["first"] * entry["last"]) ** 0.5 for entry in entries]
        losses = [entry["loss"] for entry in entries]
        style = {"color": colour(names, row), "marker": "o", "markersize": 3, "linewidth": 1.2}
        label = panel_title(name_of(row), width=44)
        axes[0].plot(where, losses, label=label, zorder=3 if row is exact else 2, **style)
        added = [loss - other for loss, other in zip(losses, base, strict=True)]
        axes[1].plot(where, added, **style)
    for axis, label in zip(axes, ("loss, nats", "loss - exact, nats"), strict=True):
        axis.set_xscale("log", base=2)
        ticks = [entry["first"] for entry in exact["details"]["positions"]]
        axis.set_xticks(ticks[::2], [f"{tick:,}" for tick in ticks[::2]])
        axis.minorticks_off()
        finish(axis, label)
    axes[0].set_title(f"{text}, n = {longest:,}", fontsize=9)
    legend_below(drawn, axes)
    axes[1].set_xlabel("position of the predicted token", fontsize=8)
    return drawn


def _prefill(rows: Sequence[Row]) -> Any:
    """Seconds of a prefill: a bar for each run, exact attention's beside it, attention's dark."""
    rows = of_task(rows, "prefill")
    if not rows:
        return None
    drawn, panels = bars(rows)
    names = names_of(rows)
    for axis, of_length in panels:
        for place, row in enumerate(of_length):
            shade, share = colour(names, row), row["details"]["attention"]
            rest = max(row["value"] - share, 0.0)
            axis.barh(place, share, color=shade, height=0.6)
            axis.barh(place, rest, left=share, color=shade, alpha=0.35, height=0.6)
            says = f" {row['value']:.3g} s"
            if row["change"] is not None:
                says += f", {row['change']:.2f}x"
            axis.text(max(share + rest, row["value"]), place, says, va="center", fontsize=7)
        axis.set_xlim(0, 1.3 * max(row["value"] for row in of_length))
    panels[-1][0].set_xlabel("seconds; attention dark, the rest of the model light", fontsize=8)
    return drawn


def _passkey(rows: Sequence[Row]) -> Any:
    """The share of keys that are read, depth by length, a map for each run."""
    rows = of_task(rows, "passkey")
    if not rows:
        return None
    names = names_of(rows)
    lengths, depths = (sorted({row[key] for row in rows}) for key in ("n", "depth"))
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    drawn = figure(0.9 + lines * (0.75 + 0.24 * len(depths)))
    axes = drawn.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        values = {(row["depth"], row["n"]): row["value"] for row in rows if name_of(row) == name}
        grid = [[values.get((depth, n), float("nan")) for n in lengths] for depth in depths]
        axis.imshow(grid, vmin=-0.3, vmax=1.3, cmap="RdYlGn", aspect="auto")
        for (depth, n), value in values.items():
            place = (lengths.index(n), depths.index(depth))
            axis.text(*place, f"{value:.2g}", ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axis.set_title(panel_title(name, width=30), fontsize=8)
        axis.tick_params(labelsize=7)
    drawn.supxlabel("n, tokens", fontsize=8)
    drawn.supylabel("depth of the key", fontsize=8)
    return drawn


def _induction(rows: Sequence[Row]) -> Any:
    """The share of a repeated sequence that is predicted: a bar for each run."""
    rows = of_task(rows, "induction")
    if not rows:
        return None
    drawn, panels = bars(rows)
    names = names_of(rows)
    for axis, of_length in panels:
        for place, row in enumerate(of_length):
            value, error = row["value"], row["standard_error"] or 0.0
            axis.barh(place, value, xerr=error, color=colour(names, row), height=0.6, capsize=2)
            axis.text(value + error, place, f" {value:.3f}", va="center", fontsize=7)
        axis.set_xlim(0, 1.15)
    panels[-1][0].set_xlabel("share predicted", fontsize=8)
    return drawn


FIGURES: dict[str, Drawing] = {
    "layers": Drawing(
        "Perplexity against replaced layers",
        "Base e; dashed: exact attention. Bars are standard errors of the difference to it, by "
        "paired blocks of the text.",
        _layers,
    ),
    "lengths": Drawing(
        "Perplexity against n",
        "Base e. Bars are standard errors of the difference to exact attention, by paired blocks; "
        "what the text itself contributes moves all lines together, and stands in the table.",
        _lengths,
    ),
    "positions": Drawing(
        "Loss by position",
        "Mean loss of positions 1, 2 to 3, 4 to 7, and so on, in nats; below, what each run adds.",
        _positions,
    ),
    "prefill": Drawing(
        "Seconds of a prefill",
        "Medians; each run took turns with exact attention, and the factor is how many times "
        "faster than that the whole prefill is. The bar of exact attention is a run of its own.",
        _prefill,
    ),
    "passkey": Drawing(
        "Passkey",
        "Share of hidden keys that are read; depth 0 is the beginning of the text.",
        _passkey,
    ),
    "induction": Drawing(
        "Induction",
        "Share of a repeated random sequence whose next token is predicted.",
        _induction,
    ),
}
"""The figures, in the order of the page."""
