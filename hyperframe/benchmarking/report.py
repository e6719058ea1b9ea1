"""Rows for people: a table, the break-even lengths, a plot; and for programs: JSON lines."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingDependencyError
from .rows import MODES
from .stages import STAGES

__all__ = [
    "append_rows",
    "break_even",
    "check_plotting",
    "failed_gates",
    "plot_rows",
    "print_report",
    "require",
]

Row = dict[str, Any]

_HEADERS = {
    "forward": "fwd ms", "forward_graph": "fwd graph ms",
    "forward_backward": "fwd+bwd ms", "forward_backward_graph": "fwd+bwd graph ms",
}  # fmt: skip


_FILE_WIDTH = 140  # of a table that goes to a file or a pipe


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a JSON-lines file; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def failed_gates(rows: Iterable[Row]) -> list[Row]:
    """Return the rows whose accuracy gate failed."""
    return [row for row in rows if row["gate"]["passed"] is False]


def break_even(rows: Sequence[Row]) -> dict[tuple[str, int, str], int | None]:
    """Return the first length from which a method stays faster than the fastest exact kernel.

    Args:
        rows: of one run.

    Returns:
        By (label, head_dim, mode), for what has a speed-up at two lengths or more: the length, or
        None where the longest is not faster.
    """
    ratios: dict[tuple[str, int, str], list[tuple[int, float]]] = {}
    for row in rows:
        for mode, ratio in row["speed_up"].items():
            if ratio is not None:
                case = (row["label"], row["head_dim"], mode)
                ratios.setdefault(case, []).append((row["n"], ratio))
    found: dict[tuple[str, int, str], int | None] = {}
    for case, measured in ratios.items():
        if len(measured) > 1:
            slower = max((n for n, ratio in measured if ratio <= 1), default=0)
            found[case] = min((n for n, _ in measured if n > slower), default=None)
    return found


def print_report(rows: Sequence[Row], *, width: int | None = None) -> None:
    """Print the table, the stages, the break-even lengths and what was not timed.

    Args:
        rows: of one run.
        width: of the terminal; None asks it.

    Raises:
        MissingDependencyError: rich is not installed.
    """
    rich = require("rich.console", extra="cli")
    console = rich.Console(width=width, highlight=False, markup=False)
    if width is None and not console.is_terminal:
        console = rich.Console(width=_FILE_WIDTH, highlight=False, markup=False)
    if not rows:
        console.print("nothing was measured")
        return
    modes = [mode for mode in MODES if any(row[mode] for row in rows)]
    console.print(_times(rows, modes))
    staged = [row for row in rows if row["stages"]]
    if staged:
        console.print(_stages(staged))
    for (label, head_dim, mode), length in break_even(rows).items():
        where = f"from n = {length}" if length else "not in this range"
        console.print(f"faster than exact, {label}, d = {head_dim}, {_word(mode)}: {where}")
    said: dict[str, None] = {}
    for row in rows:
        for mode, reason in row["not_timed"].items():
            what = "" if mode == "all" else f", {_word(mode)}"
            said[f"not timed: {row['label']}{what}: {reason}"] = None
        for reason in row["gate"]["reasons"]:
            said[f"no speed-up reported: {row['label']}, n = {row['n']}: {reason}"] = None
    for line in said:
        console.print(line)


def _times(rows: Sequence[Row], modes: Sequence[str]) -> Any:
    table = _table(_title(rows[0]))
    has_peak = any(row["peak_extra_bytes"] is not None for row in rows)
    numbers = [*(_HEADERS[mode] for mode in modes), "error", "kernel error"]
    numbers += ["peak MiB"] if has_peak else []
    for header in ("n", "d", "mask"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("what")
    for header in numbers:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("speed-up: " + " / ".join(_word(mode) for mode in modes))
    for row in rows:
        if not any(row[mode] for mode in modes) and not row["gate"]["reasons"]:
            continue
        cells = [
            f"{row['n']:,}", str(row["head_dim"]), "causal" if row["is_causal"] else "",
            row["label"], *(_ms(row[mode]) for mode in modes),
            _error(row["error"], "median"), _error(row["kernel_error"], "ours"),
        ]  # fmt: skip
        if has_peak:
            peak = row["peak_extra_bytes"]
            cells.append("" if peak is None else f"{peak / 2**20:,.1f}")
        table.add_row(*cells, _speed_up(row, modes))
    return table


def _stages(rows: Sequence[Row]) -> Any:
    table = _table("stages of a forward, ms (leaves and merge are parts of attend)")
    names = [name for name in STAGES if any(name in row["stages"] for row in rows)]
    for header in ("n", "d", "what", *names, "whole call"):
        is_text = header == "what"
        table.add_column(header, justify="left" if is_text else "right", no_wrap=not is_text)
    for row in rows:
        table.add_row(
            f"{row['n']:,}", str(row["head_dim"]), row["label"],
            *(_ms(row["stages"].get(name)) for name in names), _ms(row["forward"]),
        )  # fmt: skip
    return table


def _table(title: str) -> Any:
    return require("rich.table", extra="cli").Table(title=title, title_justify="left")


def _title(row: Row) -> str:
    where = row["environment"]
    return (
        f"{row['suite']}: {where['device']}, torch {where['torch']}; batch {row['batch']}, "
        f"{row['heads']} heads ({row['kv_heads']} of keys), {row['dtype']}, {row['inputs']} "
        f"inputs, seed {row['seed']}; medians"
    )


def _ms(timing: Row | None) -> str:
    if timing is None:
        return ""
    median = timing["median_ms"]
    return f"{median:,.0f}" if median >= 100 else f"{median:.3g}"


def _error(error: Row | None, name: str) -> str:
    return "" if error is None else f"{error[name]:.2g}"


def _speed_up(row: Row, modes: Sequence[str]) -> str:
    if row["gate"]["passed"] is False:
        return "refused: " + "; ".join(row["gate"]["reasons"])
    ratios = [row["speed_up"][mode] for mode in modes]
    if all(ratio is None for ratio in ratios):
        return ""
    return " / ".join("-" if ratio is None else f"{ratio:.3g}x" for ratio in ratios)


def _word(mode: str) -> str:
    return _HEADERS.get(mode, mode).removesuffix(" ms")


def check_plotting() -> None:
    """Raise what `plot_rows` would raise without matplotlib, before time is spent on rows."""
    require("matplotlib", extra="plot")


def plot_rows(path: Path, rows: Sequence[Row]) -> None:
    """Draw milliseconds against n, both on logarithmic axes, and write the picture.

    One panel for each mode, one line for each label and head dimension: exact kernels in grey,
    methods that failed the gate dotted.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra="plot")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", extra="plot")
    modes = [mode for mode in MODES if any(row[mode] for row in rows)]
    suites = {row["suite"] for row in rows}
    exact = dict.fromkeys(row["label"] for row in rows if row["kind"] == "exact")
    markers = dict(zip(exact, "sv^Dx", strict=False))
    figure, axes = pyplot.subplots(
        1, max(1, len(modes)), figsize=(6 * max(1, len(modes)), 4.5), squeeze=False
    )
    for panel, mode in zip(axes[0], modes, strict=False):
        lines: dict[tuple[str, str, str, bool, int], list[Row]] = {}
        for row in rows:
            if row[mode]:
                case = (
                    row["suite"], row["kind"], row["label"], row["is_causal"], row["head_dim"]
                )  # fmt: skip
                lines.setdefault(case, []).append(row)
        for (of_suite, kind, label, is_causal, head_dim), points in lines.items():
            points.sort(key=lambda row: int(row["n"]))
            has_failed = bool(failed_gates(points))
            panel.plot(
                [row["n"] for row in points], [row[mode]["median_ms"] for row in points],
                marker=markers.get(label, "o"), markersize=4, alpha=0.6 if kind == "exact" else 1.0,
                color="0.5" if kind == "exact" else None,
                linestyle=":" if has_failed else "--" if is_causal else "-",
                label=f"{label}{', causal' if is_causal else ''}, d = {head_dim}"
                + (f" ({of_suite})" if len(suites) > 1 else "")
                + (" (accuracy gate failed)" if has_failed else ""),
            )  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel="n", ylabel="ms", title=_word(mode))
        panel.grid(visible=True, which="both", alpha=0.2)
        panel.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def require(name: str, *, extra: str, command: str = "bench") -> Any:
    """Return a module that comes with an extra.

    Raises:
        MissingDependencyError: it is not installed; names the command and the extra.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingDependencyError(
            f"hyperframe {command} needs {package}, which is not installed; "
            f"pip install 'hyperframe-attention[{extra}]'"
        ) from error
