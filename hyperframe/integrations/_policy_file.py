"""Reading JSON strictly: what is wrong is said with the file and the place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, ArgumentTypeError, did_you_mean

__all__ = ["check_info", "check_keys", "kind_of_json", "read_json"]


def read_json(file: Path, *, missing: str) -> Any:
    """Read a file of strict JSON: no key twice, no NaN.

    Args:
        file: its path.
        missing: what to do where there is none.

    Raises:
        ArgumentError: the file is missing or is not JSON.
    """
    try:
        return json.loads(
            file.read_text(encoding="utf-8"), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except (FileNotFoundError, NotADirectoryError):
        raise ArgumentError(f"{file}: there is no such file; {missing}") from None
    except json.JSONDecodeError as error:
        raise ArgumentError(
            f"{file}: is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{file}: is not text in UTF-8: {error}") from error
    except RecursionError as error:
        raise ArgumentError(f"{file}: is nested too deeply") from error
    except (OSError, _StrictError) as error:
        raise ArgumentError(f"{file}: cannot be read: {error}") from error


def check_keys(form: Any, known: set[str], needed: set[str], place: str) -> None:
    """Check that a JSON value is an object with the keys that there are.

    Args:
        form: the value.
        known: keys that it may have.
        needed: keys that it must have.
        place: what it is called in messages.

    Raises:
        ArgumentError: another kind of value, an unknown or a missing key.
    """
    if not isinstance(form, dict):
        raise ArgumentError(f"{place} is {kind_of_json(form)}, not an object")
    for key in form:
        if key not in known:
            raise ArgumentError(
                f"{place}: there is no key {key!r}; the keys are {', '.join(sorted(known))}."
                f"{did_you_mean(str(key), known)}"
            )
    for key in sorted(needed - form.keys()):
        raise ArgumentError(f"{place}: the key {key!r} is missing")


def check_info(info: Any) -> dict[str, Any]:
    """Return free JSON as it comes back from a file.

    Raises:
        ArgumentTypeError: no mapping, or something in it that JSON does not have.
    """
    if not isinstance(info, Mapping):
        raise ArgumentTypeError(f"info is {kind_of_json(info)}, not an object")
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(info), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"info holds something that JSON does not have: {error}") from None
    return found


def kind_of_json(value: Any) -> str:
    """Return what a value is called in JSON, with its article."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "a boolean"
    for kinds, name in (((str,), "text"), ((int, float), "a number"), ((list, tuple), "a list")):
        if isinstance(value, kinds):
            return name
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"


class _StrictError(ValueError):
    """What JSON in Python lets pass and this does not."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _StrictError(f"the key {twice!r} stands twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise _StrictError(f"{name} is no number of JSON")
