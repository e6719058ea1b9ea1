"""One HTML page that holds an evaluation: tables beside pictures; nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report.html import document, escape, facts_line, failure_list, grid, picture
from .figures import FIGURES
from .rows import Row
from .tables import failures, left_exact, tables

__all__ = ["page"]

_STYLE = """
body { max-width: 64rem; } figure { margin: 1rem 0; max-width: 42rem; }
th, td { overflow-wrap: normal; white-space: nowrap; }
th:first-child, td:first-child { white-space: normal; overflow-wrap: break-word; }
@media (max-width: 32rem) {
  table { font-size: .75rem; } th, td { padding: .2rem .35rem; }
  th:first-child, td:first-child { min-width: 7rem; }
}
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
    parts = [facts_line(facts)]
    parts += [f'<p class="note">{escape(line)}</p>' for line in left_exact(rows)]
    made = {table.name: table for table in tables(rows)}
    for name, figures in _SECTIONS:
        if name in made:
            table = made[name]
            parts.append(f'<h2 id="{name}-table">{escape(table.title)}</h2>')
            parts.append(grid(table.head, table.lines))
            parts.append(f'<p class="note">{escape(_NOTES[name])}</p>')
            for each in figures:
                if each in pictures:
                    (media, content), drawing = pictures[each], FIGURES[each]
                    caption = f"{drawing.title}. {drawing.caption}"
                    parts.append(picture(content, media, title=drawing.title, caption=caption))
    parts.append(failure_list(failures(rows)))
    return document(title, parts, style=_STYLE, is_whole=is_whole)
