"""Rows of a frontier for people: the Pareto front, a table, a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..report import require
from .configurations import NO_DETECTOR, YARDSTICKS

__all__ = ["check_plotting", "pareto_front", "plot_frontier", "print_frontier"]

Row = dict[str, Any]

_FILE_WIDTH = 184  # of a table that goes to a file or a pipe
_GROUP = (
    "file", "digest", "n", "heads", "causal", "strict", "window", "sinks", "num_samples",
    "tile_size", "min_seq_len", "device", "seed",
)  # fmt: skip


def pareto_front(points: Sequence[tuple[float, float] | None]) -> list[bool]:
    """Say which points no other point is better than, in one coordinate and not worse in the other.

    Args:
        points: two costs of each, smaller is better; None takes no part.

    Example:
        >>> pareto_front([(1.0, 9.0), (2.0, 3.0), (3.0, 3.0), None])
        [True, True, False, False]
    """
    there = [point for point in points if point is not None]
    return [
        point is not None
        and not any(
            other != point and other[0] <= point[0] and other[1] <= point[1] for other in there
        )
        for point in points
    ]


def _keys(row: Row) -> float:
    return float(row["keys"] + row["sampled_keys"])


def _total(row: Row) -> float | None:
    return None if row["ms"] is None else row["ms"]["total"]


def _front(rows: Sequence[Row], cost: Callable[[Row], float | None]) -> list[bool]:
    """Say which rows are Pareto-optimal in a cost and the median error; yardsticks never are."""
    points = []
    for row in rows:
        spent = None if row["detector"] in YARDSTICKS else cost(row)
        points.append(None if spent is None else (spent, row["error"]["median"]))
    return pareto_front(points)


def _groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield the rows that can be compared: of the same heads, window and number of samples."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in _GROUP), []).append(row)
    yield from found.values()


def print_frontier(rows: Sequence[Row], *, width: int | None = None) -> None:
    """Print a table for each problem, sorted by median error, and what could not be measured.

    Under `best`, `keys` marks rows where no other has a smaller error with as few keys, exact and
    sampled, and `time` those where no other has a smaller error in as little time. Under `in`
    stand the layer and the head of the worst error. The total time is that of detecting, planning
    (samples and lists) and attending. Yardsticks stand in brackets.

    Args:
        rows: of `run`.
        width: of the terminal; None asks it.

    Raises:
        MissingDependencyError: rich is not installed.
    """
    rich = require("rich.console", extra="cli", command="frontier")
    console = rich.Console(width=width, highlight=False, markup=False)
    if width is None and not console.is_terminal:
        console = rich.Console(width=_FILE_WIDTH, highlight=False, markup=False)
    if not rows:
        console.print("nothing was measured")
    for group in _groups(rows):
        measured = [row for row in group if row["failure"] is None]
        if measured:
            console.print(_table(sorted(measured, key=lambda row: row["error"]["median"])))
        for row in group:
            if row["failure"] is not None:
                at = "" if row["budget"] is None else f" at {row['budget']}"
                what = f"{row['detector']}{at} + {row['sampler']}"
                console.print(f"not measured: {what}: {row['failure']}")


def _table(rows: Sequence[Row]) -> Any:
    table = require("rich.table", extra="cli", command="frontier").Table(
        title=_title(rows), title_justify="left"
    )
    has_times = any(row["ms"] is not None for row in rows)
    has_oracle = any(row["oracle_ratio"] is not None for row in rows)
    table.add_column("best", no_wrap=True)
    table.add_column("detector", min_width=14, max_width=36, overflow="fold")
    numbers = ["budget", "sampler", "keys", "sampled", "mass", "recall", "error", "p90", "worst"]
    numbers += ["in", "lse"] + (["detect ms", "attend ms", "total ms"] if has_times else [])
    numbers += ["/ oracle"] if has_oracle else []
    for header in numbers:
        is_text = header == "sampler"
        table.add_column(header, justify="left" if is_text else "right", no_wrap=is_text)
    best = zip(rows, _front(rows, _keys), _front(rows, _total), strict=True)
    for row, by_keys, by_time in best:
        error, ms = row["error"], row["ms"] or {}
        cells = [
            " ".join(["keys"] * by_keys + ["time"] * by_time), _name(row),
            _number(row["budget"], "d"), row["sampler"], f"{row['keys']:.0f}",
            f"{row['sampled_keys']:.0f}", f"{row['mass']:.3f}", _number(row["recall"], ".2f"),
            f"{error['median']:.3g}", f"{error['p90']:.2g}", f"{error['worst']:.2g}",
            f"{error['worst_layer']}.{error['worst_head']}", _number(row["lse_error"], ".2g"),
        ]  # fmt: skip
        if has_times:
            cells += [_number(ms.get(name), ",.0f") for name in ("detect", "attend", "total")]
        if has_oracle:
            cells.append(_number(row["oracle_ratio"], ".2f"))
        table.add_row(*cells)
    return table


def _title(rows: Sequence[Row]) -> str:
    row = rows[0]
    causal = {"none": "no mask", "single_pass": "causal, single pass"}.get(
        row["causal"], "causal recursion"
    )
    window = f"window {row['window']} + {row['sinks']} sinks" if row["window"] else "no window"
    timed = next((row["ms"] for row in rows if row["ms"] is not None), None)
    exact = "" if timed is None else f"; exact attention {timed['exact']:,.0f} ms a layer"
    return (
        f"{row['file']}: n = {row['n']:,}, {len(row['layers'])} layers of {row['heads']} heads "
        f"({row['kv_heads']} of keys), {causal}{', strict' if row['strict'] else ''}; {window}, "
        f"{row['num_samples']} samples, seed {row['seed']}; {row['environment']['device']}, torch "
        f"{row['environment']['torch']}{exact}"
    )


def _name(row: Row) -> str:
    """Return what a table calls the detector."""
    if row["detector"] == NO_DETECTOR:
        return "(window alone)"
    if row["detector"] in YARDSTICKS:
        return f"({row['detector']})"
    return str(row["detector"]) + (" (as it is)" if row["budget"] is None else "")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def check_plotting() -> None:
    """Raise what `plot_frontier` would raise without matplotlib, before time is spent on rows."""
    require("matplotlib", extra="plot", command="frontier")


_STRONG = ("red", "blue", "black")  # of the presets, which every other detector is compared with


def plot_frontier(path: Path, rows: Sequence[Row]) -> None:
    """Draw median error against keys of a query, both logarithmic, and write the picture.

    One panel for each problem, one line for each detector and sampler: detectors differ in colour,
    samplers in marks and dashes. Yardsticks are grey, presets of `auto` large, and the Pareto front
    is a wide light line behind the others.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra="plot", command="frontier")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", extra="plot", command="frontier")
    groups = [[row for row in group if row["failure"] is None] for group in _groups(rows)]
    groups = [group for group in groups if group]
    panels = max(1, len(groups))
    figure, axes = pyplot.subplots(
        1, panels, figsize=(4.2 * panels + 2.6, 4.4), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    names = list(dict.fromkeys(row["detector"] for row in rows))
    defaults = [name for name in names if name.partition("(")[0] == "auto"]
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    colours = pyplot.get_cmap("tab20")
    styles = {
        sampler: {"marker": "os^D"[number % 4], "linestyle": ("-", "--", ":", "-.")[number % 4]}
        for number, sampler in enumerate(samplers)
    }
    handles: dict[str, Any] = {}
    for panel, group in zip(axes[0], groups, strict=False):
        best = sorted(
            (_keys(row), row["error"]["median"])
            for row, is_best in zip(group, _front(group, _keys), strict=True)
            if is_best
        )
        if best:
            (handles["Pareto front"],) = panel.plot(
                *zip(*best, strict=True), color="0.87", linewidth=8, zorder=0
            )
        lines: dict[tuple[str, str], list[Row]] = {}
        for row in group:
            lines.setdefault((row["detector"], row["sampler"]), []).append(row)
        for (detector, sampler), points in lines.items():
            points.sort(key=_keys)
            number = names.index(detector)
            look = {"color": colours((2 * number + number // 10) % 20), "markersize": 4}
            if detector in YARDSTICKS:
                look["color"] = "0.3"
            elif detector in defaults:
                strong = _STRONG[defaults.index(detector) % len(_STRONG)]
                look = {"color": strong, "markersize": 9, "markeredgecolor": "black", "zorder": 3}
            (drawn,) = panel.plot(
                [_keys(row) for row in points], [row["error"]["median"] for row in points],
                **look, **styles[sampler],
            )  # fmt: skip
            handles.setdefault(_shown(detector), drawn)
        panel.set(
            xscale="log", yscale="log", xlabel="keys of a query, exact and sampled",
            title=f"{group[0]['file']}, n = {group[0]['n']:,}",
        )  # fmt: skip
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(lambda x, _: f"{x:g}")
            axis.set_minor_formatter(lambda x, _: f"{x:g}")
        panel.grid(visible=True, which="both", alpha=0.2)
        panel.tick_params(which="both", labelsize=7)
    axes[0][0].set_ylabel("relative error of the output, median over heads")
    if len(samplers) > 1:
        for sampler, style in styles.items():
            (handles[f"{sampler} samples"],) = axes[0][0].plot([], [], color="0.6", **style)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _shown(detector: str) -> str:
    """Return what a legend calls a detector."""
    if detector == NO_DETECTOR:
        return "(window alone)"
    return detector if len(detector) < 32 else f"{detector[:29]}..."
