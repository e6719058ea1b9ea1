"""Counting what an attention call computed: exact and sampled keys for each query.

>>> import torch
>>> from hyperframe.attention import hyper_attention
>>> from hyperframe.trace import tracing
>>> q = k = v = torch.randn(1, 1, 64, 8)
>>> with tracing() as trace:
...     _ = hyper_attention(
...         q, k, v, detector="oracle(budget=4)", num_samples=0, min_seq_len=0)
>>> trace.keys_per_query
4.0
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

__all__ = ["Trace", "active_trace", "tracing"]


@dataclass
class Trace:
    """Sums over the attention calls made while the trace was open.

    Attributes:
        queries: query rows, over batch items and heads.
        keys: keys that counted for them (weight above 0), exact and sampled.
        exact_calls: calls answered by exact attention alone.
        approximate_calls: all others.
    """

    queries: int = 0
    keys: int = 0
    exact_calls: int = 0
    approximate_calls: int = 0

    @property
    def keys_per_query(self) -> float:
        """Mean number of keys that counted for a query; nan before the first call."""
        return self.keys / self.queries if self.queries else float("nan")


_ACTIVE: ContextVar[Trace | None] = ContextVar("hyperframe_trace", default=None)


def active_trace() -> Trace | None:
    """Return the open trace of this context, or None; compiled code is not counted."""
    if torch.compiler.is_compiling():
        return None
    return _ACTIVE.get()


@contextmanager
def tracing() -> Iterator[Trace]:
    """Count the work of the attention calls in this block; costs one pass over the plans."""
    trace = Trace()
    token = _ACTIVE.set(trace)
    try:
        yield trace
    finally:
        _ACTIVE.reset(token)
