"""Figure: alpha / n against n, on prefixes of what was captured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import ArgumentError
from .drawing import colour_of, figure, label_log
from .rows import Row, Task, measured, over_heads
from .source import Source

__all__ = ["CAPTION", "QUANTITY", "alpha_rows", "draw", "lengths_of", "summary", "tasks"]

CAPTION = (
    "alpha = n max_j ||D^-1 A e_j||^2 over n, on prefixes of the captured positions: one line for "
    "each layer, the median over its heads, with their quartiles. The theory asks for a small "
    "alpha, so that this falls with n. A column that most queries attend to keeps it up, which is "
    "why the first columns are left out below. On prefixes of a causal head it cannot fall: a "
    "longer one only adds rows to every column. After the paper's Figure 5."
)
QUANTITY = "alpha / n"
_STEPS = 5
_SHORTEST = 16


def lengths_of(source: Source) -> list[int]:
    """Return the lengths of the prefixes, ascending.

    Raises:
        ArgumentError: one is longer than what was captured, or has no columns left.
    """
    settings, length = source.settings, source.problem.length
    if settings.lengths is None:
        least = min(length, max(_SHORTEST, settings.skip_first + 1))
        return sorted({max(least, length >> step) for step in range(_STEPS)})
    for asked in settings.lengths:
        if not settings.skip_first < asked <= length:
            raise ArgumentError(
                f"--lengths {asked}: {source.problem.file} holds {length} positions, of which "
                f"{settings.skip_first} are left out; ask for {settings.skip_first + 1} to {length}"
            )
        source.problem.cut(length=asked)
    return sorted(set(settings.lengths))


def tasks(source: Source) -> Iterator[Task]:
    """Yield alpha / n of every layer and length."""
    count = len(source.settings.specs)
    if source.problem.length <= source.settings.skip_first:
        raise ArgumentError(
            f"--skip-first {source.settings.skip_first}: {source.problem.file} holds "
            f"{source.problem.length} positions, and one has to be left; leave out fewer"
        )
    square = source.layer(0).query.shape[2] == source.problem.length
    for length in lengths_of(source) if square else [source.problem.length]:
        for number, layer in enumerate(source.problem.layers):
            yield Task(
                f"alpha of layer {layer.layer_idx}, n = {length}", (count, number, length),
                lambda n=number, length=length: alpha_rows(  # type: ignore[misc]
                    source, n, length, "alpha"
                ),
                source.row("alpha", QUANTITY, number=number, n=length),
            )  # fmt: skip


def alpha_rows(source: Source, number: int, length: int, figure_name: str) -> list[Row]:
    """Return alpha / n of the heads of a layer, over all columns and without the first ones."""
    return [
        row
        for skipped, values in source.alpha_over_n(number, length).items()
        for row in source.head_rows(
            figure_name, QUANTITY, values, number=number, n=length, skip_first=skipped
        )
    ]


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return median and quartiles over the heads of each layer."""
    return over_heads(measured(rows, "alpha"), by=("layer", "n", "skip_first"))


def draw(rows: Sequence[Row], specs: Sequence[str]) -> Any:
    """Draw one panel for all columns and one without the first; None where there are no rows."""
    shown = measured(rows, "alpha", statistic="median")
    if not shown:
        return None
    layers = [str(layer) for layer in sorted({row["layer"] for row in shown})]
    skips = sorted({row["skip_first"] for row in shown})
    drawn = figure(0.6 + 2.6 * len(skips))
    axes = drawn.subplots(len(skips), 1, squeeze=False, sharex=True)[:, 0]
    for axis, skipped in zip(axes, skips, strict=True):
        for layer in layers:
            lines = {
                name: sorted(
                    (row["n"], row["value"])
                    for row in measured(
                        rows, "alpha", statistic=name, skip_first=skipped, layer=int(layer)
                    )
                )
                for name in ("median", "low", "high")
            }
            x = [n for n, _ in lines["median"]]
            median, low, high = ([y for _, y in line] for line in lines.values())
            colour = colour_of(layers, layer)
            axis.plot(x, median, marker="o", markersize=3, color=colour, label=f"layer {layer}")
            axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.set(xscale="log", yscale="log")
        axis.set_ylabel(QUANTITY, fontsize=9)
        what = "all columns" if skipped == 0 else f"without the first {skipped} columns"
        axis.set_title(what, fontsize=9)
        axis.set_xticks(x, [f"{n:,}" for n in x])
        label_log(axis.yaxis)
        axis.minorticks_off()
        axis.grid(visible=True, alpha=0.25)
        axis.tick_params(labelsize=8)
    axes[-1].set_xlabel("n, positions", fontsize=9)
    axes[0].legend(fontsize=7, ncols=2)
    return drawn
