"""The parts of a page of one HTML file: nothing is fetched, and nothing from outside is markup."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["STYLE", "document", "escape", "facts_line", "failure_list", "grid", "picture"]

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: #222; background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
figure img { width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th { vertical-align: bottom; } th:first-child, td:first-child { text-align: left; min-width: 9rem; }
tr.exact { background: #f4f4f4; } code { font-size: .9em; } .failed { color: #a00; }
"""
"""What all pages share; a page adds its widths."""


def document(title: str, parts: Iterable[str], *, style: str, is_whole: bool) -> str:
    """Return a page.

    Args:
        title: of the page.
        parts: markup, below the title; empty ones are left out.
        style: of this page, behind `STYLE`.
        is_whole: False says that what it shows was interrupted.
    """
    warning = "" if is_whole else '<p class="failed">Interrupted: numbers are missing.</p>'
    body = "\n".join(part for part in (f"<h1>{escape(title)}</h1>", warning, *parts) if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def escape(value: object) -> str:
    """Return a text whose characters are no markup."""
    return html.escape(str(value), quote=True)


def facts_line(facts: Mapping[str, Any]) -> str:
    """Return a line of names and values."""
    items = "; ".join(f"{escape(name)} <b>{escape(value)}</b>" for name, value in facts.items())
    return f'<p class="note">{items}.</p>'


def picture(content: bytes, media: str, *, title: str, caption: str) -> str:
    """Return a figure that holds its file.

    Args:
        content: of the file.
        media: its media type.
        title: instead of the picture, where that cannot be seen.
        caption: below it.
    """
    data = base64.b64encode(content).decode()
    return (
        f'<figure><img alt="{escape(title)}" src="data:{media};base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def grid(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table; one too wide for its page scrolls by itself.

    Args:
        head: names of the columns.
        lines: cells as text; the first one of a line is a spec, and that of exact attention is
            "exact".
    """
    header = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = []
    for first, *rest in lines:
        kind = ' class="exact"' if first == "exact" else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        body.append(f"<tr{kind}><td><code>{escape(first)}</code></td>{cells}</tr>")
    rows = "\n".join(body)
    return f'<div class="wide"><table><tr>{header}</tr>\n{rows}</table></div>'


def failure_list(failures: Iterable[tuple[str, str]]) -> str:
    """Return what could not be measured, and why; nothing where there is nothing."""
    items = "\n".join(f"<li>{escape(what)}: {escape(why)}</li>" for what, why in failures)
    return items and f'<h2>Not measured</h2>\n<ul class="note">\n{items}\n</ul>'
