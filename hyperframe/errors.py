"""The exceptions of hyperframe.

Every exception derives from `HyperframeError` and, beside it, from the built-in exception that a
caller would expect, so both of these work:

    >>> from hyperframe.errors import ArgumentError, HyperframeError
    >>> issubclass(ArgumentError, HyperframeError) and issubclass(ArgumentError, ValueError)
    True

A message says what was asked (the argument's name and value), what was found, why it cannot work
and what to do. It is composed where it is raised; this module only holds the classes and one
helper for the "did you mean" part.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BackendUnavailableError",
    "HyperframeError",
    "MissingDependencyError",
    "PluginError",
    "SpecError",
    "UnknownComponentError",
    "UnsupportedError",
    "did_you_mean",
]


class HyperframeError(Exception):
    """Base class: ``except HyperframeError`` catches whatever hyperframe raises on purpose."""


class ArgumentError(HyperframeError, ValueError):
    """An argument has the right type and a value that cannot work."""


class ArgumentTypeError(HyperframeError, TypeError):
    """An argument has a type that cannot work."""


class UnknownComponentError(ArgumentError, LookupError):
    """No detector, sampler or estimator has the asked name; the message lists those that exist."""


class SpecError(ArgumentError):
    """A spec string does not parse, or names a parameter that its component does not have."""


class PluginError(HyperframeError, RuntimeError):
    """A plug-in was asked for that cannot be loaded, or whose name has two owners."""


class UnsupportedError(HyperframeError, NotImplementedError, ValueError):
    """A feature was asked for by name that hyperframe does not have (dropout, softcap, ...)."""


class BackendUnavailableError(HyperframeError, RuntimeError):
    """The asked backend cannot run here; an explicit request never falls back to another one."""


class MissingDependencyError(HyperframeError, ImportError):
    """An optional dependency is absent; the message holds the install command."""


def did_you_mean(asked: str, options: Iterable[str]) -> str:
    """Ends a message with the nearest of the options.

    Args:
        asked: what the caller wrote.
        options: what exists.

    Returns:
        `" Did you mean 'x'?"` with a leading space, or the empty string when nothing is near.

    Example:
        >>> from hyperframe.errors import did_you_mean
        >>> did_you_mean("sort_lhs", ["sort_lsh", "kmeans"])
        " Did you mean 'sort_lsh'?"
        >>> did_you_mean("zebra", ["sort_lsh", "kmeans"])
        ''
    """
    # letters and digits only, so that "SortLSH", "sort-lsh" and "big bird" find their names
    folded = {_folded(option): option for option in sorted(options)}
    near = difflib.get_close_matches(_folded(asked), folded, n=1, cutoff=0.6)
    return f" Did you mean {folded[near[0]]!r}?" if near else ""


def _folded(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
