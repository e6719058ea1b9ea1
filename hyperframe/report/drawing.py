"""What the figures have in common: sizes that a phone can show, colours, names."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

from ..benchmarking.report import require

__all__ = [
    "FORMATS",
    "WIDTH",
    "check_plotting",
    "colour_of",
    "encode",
    "figure",
    "label_log",
    "log_ticks",
    "panel_title",
]

FORMATS = {"png": "image/png", "svg": "image/svg+xml"}
"""Kinds of picture, and their media types."""

WIDTH = 5.2
"""Inches. On a phone, 9 points then are about 9 pixels."""

_DPI = 170


def check_plotting() -> None:
    """Raise what `figure` would raise without matplotlib, before time is spent on rows."""
    require("matplotlib", extra="plot", command="report")


def figure(height: float) -> Any:
    """Return an empty figure of the common width, which no window knows.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    library = require("matplotlib.figure", extra="plot", command="report")
    return library.Figure(figsize=(WIDTH, height), layout="constrained")


def colour_of(names: Sequence[str], name: str) -> str:
    """Return the colour of one of some names: the same in every figure of a page."""
    return f"C{list(names).index(name) % 10}"


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers to label on a logarithmic axis, at least two.

    Example:
        >>> log_ticks(0.04, 30.0), log_ticks(1.0, 7.0), log_ticks(3.1, 3.9)
        ([0.1, 1.0, 10.0], [1.0, 2.0, 5.0], [3.1, 3.48, 3.9])
    """
    for leading in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        every = (
            float(f"{digit}e{power}")
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for digit in leading
        )
        found = [tick for tick in every if low <= tick <= high]
        if len(found) > 2:
            return found
    return sorted({float(f"{tick:.3g}") for tick in (low, (low * high) ** 0.5, high)})


def label_log(axis: Any) -> None:
    """Label a logarithmic axis (`axes.yaxis`) by `log_ticks` of what it shows."""
    ticks = log_ticks(*sorted(axis.get_view_interval()))
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])


def panel_title(text: str, *, width: int = 34) -> str:
    """Return a title of as many lines as it takes."""
    return "\n".join(textwrap.wrap(text, width, break_long_words=True))


def encode(drawn: Any, form: str) -> bytes:
    """Return the file of a figure, the same bytes for the same figure.

    Args:
        drawn: the figure.
        form: one of `FORMATS`.
    """
    matplotlib = require("matplotlib", extra="plot", command="report")
    buffer = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "hyperframe", "svg.fonttype": "path"}):
        drawn.savefig(buffer, format=form, dpi=_DPI, metadata=metadata)
    return buffer.getvalue()
