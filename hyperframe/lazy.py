"""Public names that are imported when they are first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(
    module: str, targets: Mapping[str, str], *, package: str = "hyperframe"
) -> Callable[[str], Any]:
    """Return a module's `__getattr__` that imports names on first use.

    Args:
        module: the module's own name, for the message.
        targets: name -> `".module"` for a submodule, or `".module:Name"` for something inside one.
        package: what the relative module names start from.
    """

    def getattribute(name: str) -> Any:
        target = targets.get(name)
        if target is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        path, _, inside = target.partition(":")
        found = importlib.import_module(path, package)
        return getattr(found, inside) if inside else found

    return getattribute
