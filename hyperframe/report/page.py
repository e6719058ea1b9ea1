"""One HTML page that holds everything: pictures, captions and a table; nothing is fetched."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .drawing import FORMATS
from .rows import Row, measured
from .settings import FIGURES

__all__ = ["Picture", "Table", "page"]

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 46rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: #222; background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
figure { margin: 0; } figure img { width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
table { overflow-wrap: normal; margin-top: 1rem; } th { vertical-align: bottom; }
td { white-space: nowrap; } td:first-child { white-space: normal; overflow-wrap: anywhere; }
th:first-child, td:first-child { text-align: left; min-width: 9rem; }
@media (max-width: 30rem) { th, td { padding: .3rem .4rem; }
  th:first-child, td:first-child { min-width: 7.5rem; padding-left: 0; } }
code { font-size: .9em; } .failed { color: #a00; }
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
    parts = [f"<h1>{_text(title)}</h1>"]
    if not is_whole:
        parts.append('<p class="failed">Interrupted: numbers are missing.</p>')
    parts.append(_facts(facts))
    parts.append(_table(rows, specs))
    for picture in pictures:
        data = base64.b64encode(picture.content).decode()
        source = f"data:{FORMATS[picture.form]};base64,{data}"
        what = FIGURES[picture.name]
        parts.append(
            f'<h2 id="{picture.name}">{_text(what[0].upper() + what[1:])}</h2>\n'
            f'<figure><img alt="{_text(what)}" src="{source}">'
            f"<figcaption>{_text(picture.caption)}</figcaption></figure>"
        )
        table = (tables or {}).get(picture.name)
        if table is not None:
            lines = [
                [f"<code>{_text(spec)}</code>", *(_text(cell) for cell in cells)]
                for spec, *cells in table.lines
            ]
            parts.append(_grid(table.head, lines))
    parts.append(_failures(rows))
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _facts(facts: Mapping[str, Any]) -> str:
    items = "; ".join(f"{_text(name)} <b>{_text(value)}</b>" for name, value in facts.items())
    return f'<p class="note">{items}.</p>'


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
                f"<code>{_text(spec)}</code>", f"{numbers['error', 'median']:.3g}",
                f"{worst['value']:.3g} ({worst['layer']}.{worst['head']})",
                f"{numbers['mass', 'median']:.3f}", f"{numbers['keys', 'mean']:,.0f}",
            ])  # fmt: skip
    if not lines:
        return ""
    head = (
        "detector",
        "error, median head",
        "worst (layer.head)",
        "mass held, median",
        "keys held",
    )
    return _grid(head, lines)


def _grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table whose cells are markup; one too wide for its page scrolls by itself."""
    header = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" for cells in lines
    )
    return f'<div class="wide"><table><tr>{header}</tr>\n{body}</table></div>'


def _failures(rows: Sequence[Row]) -> str:
    failed: dict[tuple[str, str, str], None] = {}
    for row in rows:
        if row["failure"] is not None:
            failed[row["figure"], str(row["spec"] or row["quantity"]), row["failure"]] = None
    if not failed:
        return ""
    items = "\n".join(
        f"<li>{_text(figure)}: <code>{_text(what)}</code>: {_text(why)}</li>"
        for figure, what, why in failed
    )
    return f'<h2>Not measured</h2>\n<ul class="note">\n{items}\n</ul>'
