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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from .masks import HeavyMask
from .state import AttentionState

__all__ = ["Solved", "Trace", "active_trace", "tracing"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Solved:
    """Rectangles of the causal recursion that were solved together.

    Either equal rectangles stacked along the batch (`[batch * count]`, each two lengths of its keys
    behind the one before); or a whole level, where `mask` is a `BlockMask` over all rows and keys
    of a square problem, whose rectangles these are, and other rows are empty.

    Attributes:
        query: `[batch * count, query_heads, rows, d]`.
        key: `[batch * count, key_heads, keys, d]`.
        value: `[batch * count, key_heads, keys, d_v]`.
        mask: what the detector found.
        state: of the rows.
        first_row: row of the first query in the whole call; 0 for a level, which is over its last
            rows and keys, as many of both as there are.
        first_key: place of the first key in the whole call; 0 for a level.
        is_level: whether it is a whole level.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: HeavyMask
    state: AttentionState
    first_row: int = 0
    first_key: int = 0
    is_level: bool = False


@dataclass
class Trace:
    """Sums over the attention calls made while the trace was open.

    Attributes:
        queries: query rows, over batch items and heads.
        keys: keys that counted for them (weight above 0), exact and sampled.
        exact_calls: calls answered by exact attention alone.
        approximate_calls: all others.
        on_solved: called with every stack of rectangles that the causal recursion solves, or None.
    """

    queries: int = 0
    keys: int = 0
    exact_calls: int = 0
    approximate_calls: int = 0
    on_solved: Callable[[Solved], None] | None = None

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
def tracing(on_solved: Callable[[Solved], None] | None = None) -> Iterator[Trace]:
    """Count the work of the attention calls in this block; costs one pass over the plans.

    Args:
        on_solved: told of the rectangles of the causal recursion; where a detector finds all levels
            at once, each is then attended once more by itself.
    """
    trace = Trace(on_solved=on_solved)
    token = _ACTIVE.set(trace)
    try:
        yield trace
    finally:
        _ACTIVE.reset(token)
