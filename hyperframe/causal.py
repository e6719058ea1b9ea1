"""Causal attention by recursion (Algorithm 4).

The causal matrix splits into causal leaves on the diagonal and, on `log2(n / leaf)` levels,
squares below it that have no mask: each is a problem of its own, solved by any approximation.
Their states are disjoint in keys and merge by log-sum-exp.

Where Algorithm 4 halves the sequence, here all leaves are equally long, so that the rectangles of
a level have one size and run as one batch; lengths that do not divide leave one shorter rectangle
on each level. A detector that finds the entries of all levels at once (`find_levels`) has them
attended at once, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .rectangles import Level, causal_levels, even_runs, leaf_size, odd_runs
from .state import AttentionState, empty_state, merge

__all__ = ["Rectangle", "attend_recursively"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rectangle:
    """Queries against keys that all come before them; several stacked along the batch.

    Attributes:
        query: `[batch * count, query_heads, rows, d]`.
        key: `[batch * count, key_heads, keys, d]`.
        value: `[batch * count, key_heads, keys, d_v]`.
        earlier_query: the queries at the positions of the keys, or None if they are not known.
        query_start: position of the first query (of the first rectangle of a stack).
        key_start: position of the first key.
        first_row: row of the first query in the whole call.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    earlier_query: torch.Tensor | None
    query_start: int
    key_start: int
    first_row: int


Solver = Callable[[Rectangle], AttentionState]
LeafSolver = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], AttentionState]
SquareSolver = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, int, Sequence[Level]], AttentionState | None
]
"""Attends in all leaves (of a length) and levels of a square problem, or says None: it cannot."""


def attend_recursively(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, longest_leaf: int,
    solve: Solver, solve_leaf: LeafSolver, solve_square: SquareSolver | None = None,
    stacked: bool = True, skipped: int = 0, key_start: int = 0,
) -> AttentionState:  # fmt: skip
    """Attend causally, bottom-right aligned.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        value: `[batch, key_heads, n_k, d_v]`.
        longest_leaf: leaves on the diagonal are at most this long.
        solve: attends in a rectangle.
        solve_leaf: attends causally in leaves, stacked along the batch.
        solve_square: attends in all leaves and rectangles of as many queries as keys at once; None,
            or where it returns None, has `solve` and `solve_leaf` do it.
        stacked: whether equal rectangles may be solved as one batch; False solves each by itself,
            with its position.
        skipped: rows of the whole call that come before `query`.
        key_start: position of the first key in the whole call.

    Returns:
        The state of all rows; rows before every key are empty.
    """
    offset = key.shape[2] - query.shape[2]
    if offset < 0:
        # the first rows come before every key
        rest = attend_recursively(
            query[:, :, -offset:], key, value, longest_leaf=longest_leaf, solve=solve,
            solve_leaf=solve_leaf, solve_square=solve_square, stacked=stacked,
            skipped=skipped - offset, key_start=key_start,
        )  # fmt: skip
        first = empty_state(query[:, :, :-offset], value)
        return _stack_rows([first, rest])
    own_key, own_value = key[:, :, offset:], value[:, :, offset:]
    leaf = leaf_size(query.shape[2], longest_leaf)
    levels = causal_levels(query.shape[2], leaf)
    state = None
    if solve_square is not None and levels:
        state = solve_square(query, own_key, own_value, leaf, levels)
    if state is None:
        state = _square(
            query, own_key, own_value, leaf, levels, solve, solve_leaf, stacked,
            key_start + offset, skipped,
        )  # fmt: skip
    if offset > 0:
        before = Rectangle(
            query=query, key=key[:, :, :offset], value=value[:, :, :offset], earlier_query=None,
            query_start=key_start + offset, key_start=key_start, first_row=skipped,
        )  # fmt: skip
        state = merge(state, solve(before))
    return state


def _square(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, leaf: int, levels: list[Level],
    solve: Solver, solve_leaf: LeafSolver, stacked: bool, offset: int, skipped: int,
) -> AttentionState:  # fmt: skip
    state = _leaves(query, key, value, leaf, solve_leaf)
    for level in levels:
        size, batch = level.size, query.shape[0]
        pieces = []
        if level.full and stacked:
            rectangle = Rectangle(
                query=odd_runs(query, level), key=even_runs(key, level),
                value=even_runs(value, level), earlier_query=even_runs(query, level),
                query_start=offset + size, key_start=offset, first_row=skipped + size,
            )  # fmt: skip
            solved = _unstack(solve(rectangle), batch)
            pieces.append(
                AttentionState(out=solved.out.flatten(2, 3), lse=solved.lse.flatten(2, 3))
            )
        singles = range(0 if not stacked else level.full, level.full + (level.ragged > 0))
        query_runs, key_runs, value_runs = (x.split(size, dim=2) for x in (query, key, value))
        for number in singles:
            start, even, odd = 2 * size * number, 2 * number, 2 * number + 1
            part = Rectangle(
                query=query_runs[odd], key=key_runs[even], value=value_runs[even],
                earlier_query=query_runs[even], query_start=offset + start + size,
                key_start=offset + start, first_row=skipped + start + size,
            )  # fmt: skip
            pieces.append(solve(part))
        state = _merge_odd_runs(state, pieces, level)
    return state


def _leaves(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, leaf: int, solve_leaf: LeafSolver
) -> AttentionState:
    batch, _, length = query.shape[:3]
    full, rest = length // leaf, length % leaf

    def runs(tensor: torch.Tensor) -> torch.Tensor:
        batch, heads, _, dim = tensor.shape
        whole = tensor[:, :, : full * leaf].reshape(batch, heads, full, leaf, dim)
        return whole.transpose(1, 2).flatten(0, 1)

    solved = _unstack(solve_leaf(runs(query), runs(key), runs(value)), batch)
    parts = [AttentionState(out=solved.out.flatten(2, 3), lse=solved.lse.flatten(2, 3))]
    if rest:
        tail = slice(full * leaf, length)
        parts.append(solve_leaf(query[:, :, tail], key[:, :, tail], value[:, :, tail]))
    return _stack_rows(parts)


def _unstack(state: AttentionState, batch: int) -> AttentionState:
    """Return `[batch, heads, count, rows, ...]` from a state stacked along the batch."""
    return AttentionState(
        out=state.out.unflatten(0, (batch, -1)).transpose(1, 2),
        lse=state.lse.unflatten(0, (batch, -1)).transpose(1, 2),
    )


def _stack_rows(states: list[AttentionState]) -> AttentionState:
    if len(states) == 1:
        return states[0]
    return AttentionState(
        out=torch.cat([state.out for state in states], dim=2),
        lse=torch.cat([state.lse for state in states], dim=2),
    )


def _merge_odd_runs(
    state: AttentionState, pieces: list[AttentionState], level: Level
) -> AttentionState:
    """Merge the rectangles of a level, in their order, into the rows of the odd runs."""
    # split, not slices: the backward of each slice would fill a tensor of all rows
    runs = [
        AttentionState(out=out, lse=lse)
        for out, lse in zip(
            state.out.split(level.size, dim=2), state.lse.split(level.size, dim=2), strict=True
        )
    ]
    merged = merge(_stack_rows(runs[1::2]), _stack_rows(pieces))
    runs[1::2] = [
        AttentionState(out=out, lse=lse)
        for out, lse in zip(
            merged.out.split(level.size, dim=2), merged.lse.split(level.size, dim=2), strict=True
        )
    ]
    return _stack_rows(runs)
