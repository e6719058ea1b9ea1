"""What commands say at their end: one JSON document, or that there is nothing to say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import typer

from .codes import ExitCode

__all__ = ["echo_json", "fail_if_nothing"]


def echo_json(document: Any) -> None:
    """Print one JSON document; numbers that are not finite, which JSON lacks, are null.

    Tables, bars and messages go elsewhere: with `--json` a command prints nothing else on stdout.
    """
    typer.echo(json.dumps(_plain(document), indent=2, allow_nan=False))


def fail_if_nothing(rows: Iterable[Mapping[str, Any]]) -> None:
    """End the command with a code of its own where every row is a failure."""
    if all(row["failure"] is not None for row in rows):
        typer.echo("hyperframe: nothing could be measured; every row says why", err=True)
        raise typer.Exit(ExitCode.FAILED)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
