"""Diagnostics: what an approximation costs in accuracy."""

from .errors import relative_error

__all__ = ["relative_error"]
