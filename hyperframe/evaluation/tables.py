"""The tables of an evaluation: cells of text, exact attention beside every approximate number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .blocks import mean_and_error
from .panels import name_of
from .rows import Row, of_task
from .settings import EXACT

__all__ = ["Table", "failures", "left_exact", "tables"]


class Table(NamedTuple):
    """A table.

    Attributes:
        name: of the task.
        title: above it.
        head: names of the columns.
        lines: cells; the first says what ran.
    """

    name: str
    title: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return the tables that the rows have numbers for."""
    made = [_perplexity(rows), _prefill(rows), _passkey(rows), _induction(rows), _questions(rows)]
    return [table for table in made if table.lines]


def failures(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return what could not be measured and why, each once."""
    found: dict[tuple[str, str], None] = {}
    for row in rows:
        if row["failure"] is not None:
            found[f"{row['task']}, n = {row['n']:,}, {name_of(row)}", row["failure"]] = None
    return list(found)


def left_exact(rows: Sequence[Row]) -> list[str]:
    """Return what stayed exact though it was to be replaced, a line for each run."""
    found: dict[str, int] = {}
    for row in rows:
        kept = (row["details"] or {}).get("left_exact", ())
        if kept:
            found[name_of(row)] = max(len(kept), found.get(name_of(row), 0))
    return [
        f"{name}: up to {count} layers stayed exact, whose sliding window is shorter than the input"
        for name, count in found.items()
    ]


def _number(value: float | None, error: float | None, form: str) -> str:
    if value is None:
        return "-"
    shown = format(value, form)
    return shown if error is None else f"{shown} ± {format(abs(error), form.replace('+', ''))}"


def _perplexity(rows: Sequence[Row]) -> Table:
    lines = [
        [
            name_of(row), f"{row['n']:,}",
            "" if row["run"] == EXACT else _number(row["change"], row["change_error"], "+.2f"),
            _number(row["value"], row["standard_error"], ".3f"),
            _number(row["exact"], None, ".3f"), str(row["input"]),
        ]
        for row in of_task(rows, "perplexity")
    ]  # fmt: skip
    head = ("attention", "n", "change, %", "perplexity", "exact", "text")
    return Table("perplexity", "Perplexity", head, lines)


def _prefill(rows: Sequence[Row]) -> Table:
    lines = []
    for row in of_task(rows, "prefill"):
        details, is_exact = row["details"], row["run"] == EXACT
        beside = details if is_exact else {
            "attention": details["exact_attention"], "peak_bytes": details["exact_peak_bytes"]
        }  # fmt: skip
        lines.append([
            name_of(row), f"{row['n']:,}", "" if is_exact else f"{row['change']:.2f}x",
            f"{row['value']:.3g}", f"{row['exact']:.3g}",
            f"{details['attention']:.3g}", f"{beside['attention']:.3g}",
            f"{100 * beside['attention'] / row['exact']:.0f}",
            _megabytes(details["peak_bytes"]), _megabytes(beside["peak_bytes"]),
        ])  # fmt: skip
    head = (
        "attention", "n", "faster", "seconds", "exact", "in attention", "exact's",
        "exact's share, %", "peak MB", "exact's",
    )  # fmt: skip
    return Table("prefill", "Prefill", head, lines)


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.0f}"


def _passkey(rows: Sequence[Row]) -> Table:
    shown = of_task(rows, "passkey")
    depths = sorted({row["depth"] for row in shown})
    lines = []
    for n in sorted({row["n"] for row in shown}):
        of_length = [row for row in shown if row["n"] == n]
        for name in dict.fromkeys(name_of(row) for row in of_length):
            cells = {row["depth"]: row for row in of_length if name_of(row) == name}
            known = [row for row in cells.values() if row["exact"] is not None]
            lines.append([
                name, f"{n:,}", _mean([row["value"] for row in cells.values()]),
                _mean([row["exact"] for row in known]),
                "" if name == EXACT else _relative(known),
                *(_number(cells[depth]["value"], None, ".2f") if depth in cells else "-"
                  for depth in depths),
            ])  # fmt: skip
    head = (
        "attention", "n", "mean", "exact", "of exact, %", *(f"depth {depth:g}" for depth in depths)
    )  # fmt: skip
    return Table("passkey", "Passkey: share of keys read", head, lines)


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f}" if values else "-"


def _relative(rows: Sequence[Row]) -> str:
    """Return what the values are of exact attention's, in percent."""
    exact = sum(row["exact"] for row in rows)
    return f"{100 * sum(row['value'] for row in rows) / exact:.1f}" if exact else "-"


def _induction(rows: Sequence[Row]) -> Table:
    lines = [
        [
            name_of(row), f"{row['n']:,}",
            "" if row["run"] == EXACT else _number(row["change"], row["change_error"], "+.3f"),
            _number(row["value"], row["standard_error"], ".3f"),
            _number(row["exact"], None, ".3f"),
            "" if row["run"] == EXACT or row["exact"] is None else _relative([row]),
        ]
        for row in of_task(rows, "induction")
    ]  # fmt: skip
    head = ("attention", "n", "change", "predicted", "exact", "of exact, %")
    return Table("induction", "Induction: share of a repetition predicted", head, lines)


def _questions(rows: Sequence[Row]) -> Table:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in of_task(rows, "questions"):
        key = (row["input"], row["details"]["dataset"], row["quantity"], row["n"], name_of(row))
        groups.setdefault(key, []).append(row)
    lines = []
    for (file, dataset, metric, n, name), group in groups.items():
        known = [row for row in group if row["exact"] is not None]
        pairs = [row["value"] - row["exact"] for row in known]
        what = f"{file}, {dataset}" if dataset else file
        lines.append([
            name, what, "" if name == EXACT or not pairs
            else _number(*mean_and_error(pairs), "+.3f"),
            _number(*mean_and_error([row["value"] for row in group]), ".3f"),
            _mean([row["exact"] for row in known]), "" if name == EXACT else _relative(known),
            metric, str(len(group)), f"{n:,}",
        ])  # fmt: skip
    head = (
        "attention", "questions", "change", "score", "exact", "of exact, %", "metric", "number",
        "n at most",
    )  # fmt: skip
    return Table("questions", "Questions", head, lines)
