"""One HTML page that holds an evaluation: tables beside pictures; nothing is fetched."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from .figures import FIGURES
from .rows import Row
from .tables import Table, failures, tables

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: #222; background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
figure { margin: 1rem 0; max-width: 42rem; } figure img { width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd;
  overflow-wrap: normal; white-space: nowrap; }
th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; min-width: 9rem; white-space: normal;
  overflow-wrap: break-word; }
@media (max-width: 32rem) {
  table { font-size: .75rem; } th, td { padding: .2rem .35rem; }
  th:first-child, td:first-child { min-width: 7rem; }
}
tr.exact { background: #f4f4f4; } code { font-size: .9em; } .failed { color: #a00; }
"""

_SECTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("perplexity", ("layers", "lengths", "positions")),
    ("prefill", ("prefill",)),
    ("passkey", ("passkey",)),
    ("induction", ("induction",)),
    ("questions", ()),
)
_NOTES = {
    "perplexity": "Base e. ± is one standard error, of the change over paired blocks of the text.",
    "prefill": "Medians in seconds, exact attention in the same process in turn. Memory is the "
    "peak beyond the weights: what torch allocated on a GPU; elsewhere what the process took from "
    "the system, which is rough.",
    "passkey": "Five digits in filler; a key is read if every digit is the most likely token.",
    "induction": "A random sequence, twice; ± is one standard error.",
    "questions": "Answers by the most likely token each time; ± is one standard error.",
}


def page(
    rows: Sequence[Row], pictures: Mapping[str, tuple[str, bytes]], *, title: str,
    facts: Mapping[str, Any], is_whole: bool = True,
) -> str:  # fmt: skip
    """Return the page.

    Args:
        rows: of the evaluation.
        pictures: media type and content of the figures that there are, by name.
        title: of the page.
        facts: what was measured on, by name.
        is_whole: False says that the evaluation was interrupted.

    Returns:
        HTML that needs no other file and no network.
    """
    parts = [f"<h1>{_text(title)}</h1>"]
    if not is_whole:
        parts.append('<p class="failed">Interrupted: numbers are missing.</p>')
    parts.append(_facts(facts))
    made = {table.name: table for table in tables(rows)}
    for name, figures in _SECTIONS:
        if name in made:
            parts += [_table(made[name]), f'<p class="note">{_text(_NOTES[name])}</p>']
            parts += [_picture(each, *pictures[each]) for each in figures if each in pictures]
    failed = failures(rows)
    if failed:
        items = "\n".join(f"<li>{_text(what)}: {_text(why)}</li>" for what, why in failed)
        parts.append(f'<h2>Not measured</h2>\n<ul class="note">\n{items}\n</ul>')
    body = "\n".join(parts)
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


def _picture(name: str, media: str, content: bytes) -> str:
    data, drawing = base64.b64encode(content).decode(), FIGURES[name]
    return (
        f'<figure id="{name}"><img alt="{_text(drawing.title)}" src="data:{media};base64,{data}">'
        f"<figcaption>{_text(drawing.title)}. {_text(drawing.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    header = "".join(f"<th>{_text(name)}</th>" for name in table.head)
    lines = []
    for first, *rest in table.lines:
        kind = ' class="exact"' if first == "exact" else ""
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in rest)
        lines.append(f"<tr{kind}><td><code>{_text(first)}</code></td>{cells}</tr>")
    body = "\n".join(lines)
    return (
        f'<h2 id="{table.name}-table">{_text(table.title)}</h2>\n'
        f'<div class="wide"><table><tr>{header}</tr>\n{body}</table></div>'
    )
