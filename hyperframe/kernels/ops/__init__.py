"""Operators registered with torch: opaque to the compiler, with shapes known beforehand.

Each module defines the schema, the shapes (`register_fake`) and the implementations of its
operators. Triton is imported when an operator first runs on a GPU, never before.
"""

from __future__ import annotations

import importlib.util

__all__ = ["has_triton"]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # an import hook that refuses the name
        return False


_HAS_TRITON = _is_installed("triton")  # looked up once, and not inside of compiled code


def has_triton() -> bool:
    """Return whether triton is installed; does not import it."""
    return _HAS_TRITON
