"""The rows of a report: one for every number that a figure shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["ROW_KEYS", "Row", "Task", "make_row", "measured", "over_heads"]

Row = dict[str, Any]

ROW_KEYS: dict[str, str] = {
    "figure": "the figure that shows it, see `FIGURES`",
    "file": "name of the file with the captured heads",
    "digest": "of its content, the first 12 digits of SHA-256",
    "quantity": "error, mass, keys, density, held, attention, or alpha / n; of rectangles also "
    "log10 kappa (and centred), weight, calls",
    "statistic": "head: of one head (mean over batch items); layer: mean over its heads; mean: "
    "over layers; median, low, high: over heads, low and high are quartiles; map: a picture",
    "spec": "the detector as it was asked for; null where the number has none",
    "budget": "keys that the detector aims at; null where it is taken as it is",
    "num_samples": "sampled keys of a row; null where nothing is sampled",
    "n": "keys; of a rectangle, where the figure is recursion",
    "skip_first": "leading columns left out; null where that means nothing",
    "layer": "the layer; null for a statistic over all",
    "head": "the query head, as the model numbers it where the file says so; null likewise",
    "value": "the number; null in a map, or where there is a failure",
    "values": "rows of a map, null where no entry is visible; null elsewhere",
    "failure": "why it could not be measured, or null",
    "seed": "of all draws",
}
"""The keys of a row and what they hold. Values that do not apply are null, never absent."""

_QUARTILES = {"median": 0.5, "low": 0.25, "high": 0.75}


@dataclass(frozen=True)
class Task:
    """A few rows to measure.

    Attributes:
        label: words for a progress bar.
        order: tasks are done in this order: those of one detector and layer after each other, so
            that it looks for its mask once.
        run: returns the rows.
        known: what the row of a failure says.
    """

    label: str
    order: tuple[int, ...]
    run: Callable[[], Iterable[Row]]
    known: Row


def make_row(**fields: Any) -> Row:
    """Return a row with the given fields, null elsewhere."""
    return dict.fromkeys(ROW_KEYS) | fields


def measured(rows: Iterable[Row], figure: str, **fields: Any) -> list[Row]:
    """Return the rows of a figure that have numbers, and the given values under the given keys."""
    return [
        row
        for row in rows
        if row["figure"] == figure
        and row["failure"] is None
        and all(row[name] == value for name, value in fields.items())
    ]


def over_heads(rows: Iterable[Row], *, by: Sequence[str]) -> list[Row]:
    """Return median and quartiles of the rows of single heads.

    Args:
        rows: of one figure.
        by: the keys that tell apart what is summarised; the others but those of a file stay null.

    Returns:
        Three rows for each group, whose `statistic` is `median`, `low` or `high`.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["statistic"] == "head" and row["failure"] is None:
            groups.setdefault(tuple(row[name] for name in by), []).append(row)
    found = []
    for group in groups.values():
        first = group[0]
        kept = {name: first[name] for name in ("figure", "file", "digest", "quantity", "seed", *by)}
        numbers = torch.tensor([row["value"] for row in group], dtype=torch.float64)
        found += [
            make_row(**kept, statistic=name, value=float(numbers.quantile(share)))
            for name, share in _QUARTILES.items()
        ]
    return found
