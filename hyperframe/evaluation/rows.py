"""The rows of an evaluation: their keys, and which of them a file already holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..benchmarking.row_files import read_rows

__all__ = ["EVAL_KEYS", "KEY_FIELDS", "Row", "key_of", "known_rows", "of_task"]

Row = dict[str, Any]

_KEYS = {
    "task": "perplexity, prefill, passkey, induction, or questions (of a task file)",
    "model": "as it was asked for",
    "weights": "digest of the weights: shapes, and the first numbers of each",
    "input": "name of the file; null where the input is made",
    "digest": "of what was read, and of all that the task was asked: 12 digits of SHA-256",
    "n": "tokens; of questions the most there may be",
    "depth": "of the passkey: share of the filler before it; null elsewhere",
    "example": "of a task file; null elsewhere",
    "run": "exact, a spec, or the name of a policy file",
    "layers": "how many of the last layers are replaced; null where a policy says which",
    "policy": "digest of the policy, or null",
    "seed": "of all draws",
    "device": "cpu or cuda",
    "dtype": "of the weights",
}

KEY_FIELDS = tuple(_KEYS)
"""What makes two rows the same measurement, all of it."""

EVAL_KEYS: dict[str, str] = {
    **_KEYS,
    "quantity": "perplexity (base e), seconds, accuracy (a share), or the name of a metric",
    "value": "the number",
    "standard_error": "of the value; null where there is none",
    "exact": "the value of exact attention in the same run; null where it could not be had",
    "change": "of a perplexity in percent; of seconds how many times faster than exact attention; "
    "value - exact elsewhere; null for exact attention itself",
    "change_error": "its standard error, by paired blocks; null where there is none",
    "blocks": "means of blocks: of losses in nats, or of what is right; see "
    "`hyperframe.evaluation.blocks`",
    "details": "what else was measured, by task; see docs/evaluation.md",
    "failure": "why it could not be measured, or null",
    "refused": "whether that was a refusal by name, which stays as it is",
    "environment": "device, driver and versions",
    "time": "when the row was made, UTC",
}
"""The keys of a row and what they hold. Values that do not apply are null, never absent."""


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what makes two rows the same measurement."""
    return tuple(row[name] for name in KEY_FIELDS)


def of_task(rows: Iterable[Row], task: str, **fields: Any) -> list[Row]:
    """Return the rows of a task that have a number, and the given values under the given keys."""
    return [
        row
        for row in rows
        if row["task"] == task
        and row["failure"] is None
        and all(row[name] == value for name, value in fields.items())
    ]


def known_rows(path: Path) -> dict[tuple[Any, ...], Row]:
    """Return the rows of a file by `key_of`, the last of each; no file is no rows.

    Rows that failed are left out, to be tried again, but those that were refused by name.

    Raises:
        ArgumentError: a line is no JSON object.
    """
    found: dict[tuple[Any, ...], Row] = {}
    for row in read_rows(path, EVAL_KEYS):
        found.pop(key_of(row), None)
        if row["failure"] is None or row["refused"]:
            found[key_of(row)] = row
    return found
