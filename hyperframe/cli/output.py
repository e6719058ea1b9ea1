"""What a program reads: one JSON document on stdout, with nothing else there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import typer

__all__ = ["echo_json"]


def echo_json(document: Any) -> None:
    """Print one JSON document; numbers that are not finite, which JSON lacks, are null.

    Tables, bars and messages go elsewhere: with `--json` a command prints nothing else on stdout.
    """
    typer.echo(json.dumps(_plain(document), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
