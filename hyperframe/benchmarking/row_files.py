"""Rows in a JSON-lines file, to go on from where a program stopped."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..errors import ArgumentError

__all__ = ["read_rows"]


def read_rows(path: Path, keys: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file that have all of the given keys, in their order.

    Args:
        path: the file; none is no rows.
        keys: of the rows; lines that are rows of something else are skipped.

    Raises:
        ArgumentError: a line is no JSON object.

    A last line without its end, of a program that was killed while it wrote, is cut off the file;
    one that is whole gets its end. What is appended then begins on a line of its own.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    whole, end, last = content.rpartition(b"\n")
    if last:
        whole += end
        if _row(last.decode("utf-8", "replace")) is not None:
            whole += last + b"\n"
        path.write_bytes(whole)
    for number, line in enumerate(whole.decode("utf-8", "replace").splitlines(), start=1):
        if not line.strip():
            continue
        row = _row(line)
        if row is None:
            raise ArgumentError(
                f"--out: line {number} of {path} is no JSON object, {line[:40]!r}; name another "
                "place, or delete that line"
            )
        if all(key in row for key in keys):
            yield row


def _row(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
