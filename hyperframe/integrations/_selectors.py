"""Selectors: the ways to say which attention layers of a model are meant.

"all", "none", "first:4", "last:8"; a slice of layer indices such as "2:30:3"; an index, negative
ones counting from the end; a wildcard on the name of the layer's module such as "*.layers.1?.*";
a list of any of these; and in Python a callable `(layer index, module) -> bool`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from ..errors import ArgumentError, ArgumentTypeError

__all__ = ["Selector", "check_selector", "choose_layers"]

Selector: TypeAlias = "str | int | slice | Iterable[str | int] | Callable[[int, nn.Module], bool]"
"""What may say which layers are meant, see the docstring of the module."""

_ENDS = re.compile(r"(first|last):(\d+)")
_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?")
_FORMS = (
    "'all', 'none', 'first:N', 'last:N', a slice of layer indices such as '2:30:3', a wildcard on "
    "module names such as '*.layers.1?.*'"
)


def check_selector(layers: Any, owner: str = "layers") -> Any:
    """Check the form of a selector, without a model, and bring it into one shape.

    Args:
        layers: the selector.
        owner: what it is called in messages.

    Returns:
        Text, an int, a callable, or a tuple of text and ints; equal selectors are equal.

    Raises:
        ArgumentError: text that is not understood.
        ArgumentTypeError: anything else.

    Example:
        >>> check_selector(slice(2, None, 3)), check_selector([0, "last:2"])
        ('2::3', (0, 'last:2'))
    """
    if isinstance(layers, slice):
        parts = (layers.start, layers.stop, layers.step)
        layers = ":".join("" if part is None else str(part) for part in parts)
    if isinstance(layers, str):
        return _check_text(layers, owner)
    if isinstance(layers, nn.Module):
        raise ArgumentTypeError(
            f"{owner} is a {type(layers).__name__}; pass the index or the name of the layer, or a "
            "callable (layer index, module) -> bool."
        )
    if callable(layers):
        return layers
    index = _index(layers)
    if index is not None:
        return index
    if not isinstance(layers, Iterable):
        raise ArgumentTypeError(
            f"{owner}={layers!r} of type {type(layers).__name__} names no layers: use {_FORMS}, a "
            "layer index, or a list of these."
        )
    checked: list[str | int] = []
    for item in layers:
        index = _index(item)
        if index is None and not isinstance(item, str):
            raise ArgumentTypeError(
                f"{owner} holds {item!r} of type {type(item).__name__}: layer indices are "
                "integers, and everything else in a list is text."
            )
        checked.append(_check_text(item, owner) if index is None else index)
    return tuple(checked)


def choose_layers(
    layers: Any, existing: Sequence[int], *, names: Sequence[str] | None = None,
    modules: Sequence[nn.Module] | None = None, owner: str = "layers",
) -> tuple[int, ...]:  # fmt: skip
    """Resolve a selector.

    Args:
        layers: the selector.
        existing: indices of the attention layers that there are, ascending, at least one. They may
            have gaps, as in models where other layers stand between; "first:4" counts the layers
            that exist, a slice goes by their indices.
        names: of the layers' modules, in the same order, for wildcards.
        modules: these modules, for callables.
        owner: what the selector is called in messages.

    Returns:
        The chosen indices, ascending, each once. A slice, "none" and an empty list may give none.

    Raises:
        ArgumentError: an index or a name that the model does not have, or more layers than it has.
        ArgumentTypeError: no selector.

    Example:
        >>> choose_layers("last:2", [0, 1, 2, 3]), choose_layers([0, -1], [0, 1, 2, 3])
        ((2, 3), (0, 3))
        >>> choose_layers("*.1?.attn", [9, 10, 11], names=["h.9.attn", "h.10.attn", "h.11.attn"])
        (10, 11)
    """
    layers = check_selector(layers, owner)
    if callable(layers):
        if modules is None:
            raise ArgumentError(
                f"{owner} is a callable, which needs the modules of a model; pass modules=."
            )
        pairs = zip(existing, modules, strict=True)
        return tuple(index for index, module in pairs if layers(index, module))
    if isinstance(layers, str):
        return tuple(sorted(_by_text(layers, existing, names, f"{owner}={layers!r}")))
    if isinstance(layers, int):
        return (_by_index(layers, existing, f"{owner}={layers!r}"),)
    chosen: set[int] = set()
    for item in layers:
        said = f"{owner} holds {item!r}"
        if isinstance(item, int):
            chosen.add(_by_index(item, existing, said))
        else:
            chosen |= _by_text(item, existing, names, said)
    return tuple(sorted(chosen))


def _index(item: Any) -> int | None:
    """The integer that an item is, bool excluded; None for anything else."""
    if isinstance(item, bool):
        return None
    try:
        return operator.index(item)
    except TypeError:
        return None


def _check_text(text: str, owner: str) -> str:
    compact = text.replace(" ", "")
    if compact in ("all", "none") or _ENDS.fullmatch(compact):
        return compact
    match = _SLICE.fullmatch(compact)
    if match is not None and (match[3] is None or int(match[3]) != 0):
        return compact
    is_name = "." in text or any(sign in text for sign in "*?[")
    if match is not None or not is_name or ":" in text:
        raise ArgumentError(
            f"{owner}={text!r} is not understood: use {_FORMS}, a layer index, or a list of these."
        )
    return text


def _by_index(index: int, existing: Sequence[int], said: str) -> int:
    if -len(existing) <= index < 0:
        return existing[index]
    if index not in existing:
        raise ArgumentError(
            f"{said}, but the model has {_count(existing)}. Use those indices, or "
            f"-{len(existing)} to -1."
        )
    return index


def _by_text(
    text: str, existing: Sequence[int], names: Sequence[str] | None, said: str
) -> set[int]:
    if text in ("all", "none"):
        return set(existing) if text == "all" else set()
    if match := _ENDS.fullmatch(text):
        count = int(match[2])
        if count > len(existing):
            raise ArgumentError(
                f"{said} asks for {count} layers, but the model has {_count(existing)}. Ask for at "
                f"most {len(existing)}, or for 'all'."
            )
        return set(existing[:count] if match[1] == "first" else existing[len(existing) - count :])
    if match := _SLICE.fullmatch(text):
        start, stop, step = (None if part is None else int(part) for part in match.groups())
        picked = range(*slice(start, stop, step).indices(existing[-1] + 1))
        return {index for index in existing if index in picked}
    if names is None:
        raise ArgumentError(
            f"{said} goes by the names of modules, which are not known here; pass names=."
        )
    found = {i for i, name in zip(existing, names, strict=True) if fnmatchcase(name, text)}
    if not found:
        raise ArgumentError(
            f"{said} matches none of the model's attention layers, {names[0]!r} to {names[-1]!r}; "
            "* stands for any text, ? for one character."
        )
    return found


def _count(existing: Sequence[int]) -> str:
    shown = f"{existing[0]} to {existing[-1]}" if len(existing) > 4 else str(list(existing))
    return f"{len(existing)} attention layers ({shown})"
