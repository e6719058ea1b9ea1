"""Writing an evaluation: pictures, the page, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..benchmarking.report import require
from ..report.drawing import FORMATS, encode
from .figures import FIGURES, draw
from .model import LanguageModel
from .page import page
from .rows import Row
from .settings import EvalSettings
from .tables import failures, left_exact, tables

__all__ = ["ROWS", "Evaluation", "check_plotting", "print_tables", "write"]

ROWS = "rows.jsonl"
"""The file of rows in the folder of an evaluation."""

_FILE_WIDTH = 150  # of a table that goes to a file or a pipe


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured and written.

    Attributes:
        rows: see `EVAL_KEYS`.
        page: the HTML page.
        files: all files that were written, the page first.
    """

    rows: list[Row]
    page: Path
    files: list[Path]


def check_plotting() -> None:
    """Raise what drawing would raise without matplotlib, before time is spent on rows."""
    require("matplotlib", extra="plot", command="eval")


def write(
    model: LanguageModel, settings: EvalSettings, rows: Sequence[Row], *, out: Path,
    form: str = "png", is_whole: bool = True,
) -> Evaluation:  # fmt: skip
    """Draw the figures and write them and the page.

    Args:
        model: that was evaluated.
        settings: what was asked.
        rows: what was measured, all of it or what there is.
        out: the folder; `run` has written the rows there.
        form: of the pictures, "png" or "svg".
        is_whole: whether these are all rows.
    """
    out.mkdir(parents=True, exist_ok=True)
    pictures, files = {}, []
    for name in FIGURES:
        drawn = draw(name, rows)
        if drawn is not None:
            content = encode(drawn, form)
            pictures[name] = FORMATS[form], content
            files.append(out / f"{name}.{form}")
            files[-1].write_bytes(content)
    index = out / "index.html"
    title = f"{type(model.model).__name__} ({Path(model.name).name})"
    text = page(rows, pictures, title=title, facts=_facts(model, settings, rows), is_whole=is_whole)
    index.write_text(text, encoding="utf-8")
    return Evaluation(rows=list(rows), page=index, files=[index, *files, out / ROWS])


def _facts(model: LanguageModel, settings: EvalSettings, rows: Sequence[Row]) -> dict[str, Any]:
    parameters = sum(weight.numel() for weight in model.model.parameters())
    environment = rows[-1]["environment"] if rows else {}
    return {
        "parameters": f"{parameters / 1e6:,.0f} million", "attention layers": model.depth,
        "positions": "?" if model.positions is None else f"{model.positions:,}",
        "device": environment.get("device", model.device), "dtype": model.dtype,
        "seed": settings.seed, "torch": environment.get("torch", "?"),
    }  # fmt: skip


def print_tables(rows: Sequence[Row], *, width: int | None = None) -> None:
    """Print the tables of the page, and what could not be measured.

    Raises:
        MissingDependencyError: rich is not installed.
    """
    console_of = require("rich.console", extra="cli", command="eval").Console
    table_of = require("rich.table", extra="cli", command="eval").Table
    console = console_of(width=width, highlight=False, markup=False)
    if width is None and not console.is_terminal:
        console = console_of(width=_FILE_WIDTH, highlight=False, markup=False)
    for table in tables(rows):
        shown = table_of(title=table.title, title_justify="left")
        for place, header in enumerate(table.head):
            if place == 0:
                shown.add_column(header, min_width=14, max_width=40, overflow="fold")
            else:
                shown.add_column(header, justify="right")
        for line in table.lines:
            shown.add_row(*line)
        console.print(shown)
    for line in left_exact(rows):
        console.print(line)
    for what, why in failures(rows):
        console.print(f"not measured: {what}: {why}")
