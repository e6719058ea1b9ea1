"""One HTML page that holds everything: pictures, captions and a table; nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .drawing import FORMATS
from .html import document, escape, facts_line, failure_list, grid, picture
from .rows import Row, measured
from .settings import FIGURES

__all__ = ["Picture", "Table", "page"]

_STYLE = """
body { max-width: 46rem; } figure { margin: 0; } table { overflow-wrap: normal; margin-top: 1rem; }
td { white-space: nowrap; } td:first-child { white-space: normal; overflow-wrap: anywhere; }
@media (max-width: 30rem) { th, td { padding: .3rem .4rem; }
  th:first-child, td:first-child { min-width: 7.5rem; padding-left: 0; } }
"""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure as a file.

    Attributes:
        name: one of `FIGURES`.
        form: one of `FORMATS`.
        content: the file.
        caption: what it shows, and how to read it.
    """

    name: str
    form: str
    content: bytes
    caption: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Numbers below a figure.

    Attributes:
        head: names of the columns.
        lines: cells as text; the first one of a line is a spec.
    """

    head: Sequence[str]
    lines: Sequence[Sequence[str]]


def page(
    rows: Sequence[Row], pictures: Sequence[Picture], *, title: str, facts: Mapping[str, Any],
    specs: Sequence[str], tables: Mapping[str, Table | None] | None = None, is_whole: bool = True,
) -> str:  # fmt: skip
    """Return the page.

    Args:
        rows: of the report.
        pictures: in their order.
        tables: below pictures, by their names.
        title: of the page.
        facts: what was measured on, by name.
        specs: in the order of the table.
        is_whole: False says that the report was interrupted.

    Returns:
        HTML that needs no other file and no network.
    """
    parts = [facts_line(facts), _table(rows, specs)]
    for each in pictures:
        what = FIGURES[each.name]
        parts.append(f'<h2 id="{each.name}">{escape(what[0].upper() + what[1:])}</h2>')
        parts.append(picture(each.content, FORMATS[each.form], title=what, caption=each.caption))
        table = (tables or {}).get(each.name)
        if table is not None:
            parts.append(grid(table.head, table.lines))
    failed = {
        (f"{row['figure']}: {row['spec'] or row['quantity']}", row["failure"]): None
        for row in rows
        if row["failure"] is not None
    }
    parts.append(failure_list(failed))
    return document(title, parts, style=_STYLE, is_whole=is_whole)


def _table(rows: Sequence[Row], specs: Sequence[str]) -> str:
    """Return the medians of the figure `heads`, errors beside keys; nothing where it is absent."""
    shown = measured(rows, "heads")
    lines = []
    for spec in specs:
        of_spec = [row for row in shown if row["spec"] == spec]
        numbers = {
            (row["quantity"], row["statistic"]): row["value"]
            for row in of_spec
            if row["statistic"] in ("median", "mean")
        }
        if numbers:
            errors = measured(of_spec, "heads", quantity="error", statistic="head")
            worst = max(errors, key=lambda row: float(row["value"]))
            lines.append([
                spec, f"{numbers['error', 'median']:.3g}",
                f"{worst['value']:.3g} ({worst['layer']}.{worst['head']})",
                f"{numbers['mass', 'median']:.3f}", f"{numbers['keys', 'mean']:,.0f}",
            ])  # fmt: skip
    if not lines:
        return ""
    head = (
        "detector", "error, median head", "worst (layer.head)", "mass held, median", "keys held"
    )  # fmt: skip
    return grid(head, lines)
