"""Backends: one function `attend(query, key, value, plan, scale=...)` each."""

from .backends import attend, attend_all, available_backends, resolve_backend
from .exact import exact_attention
from .torch_backend import visible_keys

__all__ = [
    "attend",
    "attend_all",
    "available_backends",
    "exact_attention",
    "resolve_backend",
    "visible_keys",
]
