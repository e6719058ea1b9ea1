"""Key padding: padded keys are cut out, so that no detector or sampler ever sees one.

Batch items with equal masks run together. Under a causal mask, rows whose own key is real form a
causal problem over the real keys; a row at a padded position sees the real keys before it, and
rows that see the same keys are solved together, as a rectangle. Every part knows where it lies in
the call, so that detectors that go by positions count them as without the cut.

There is no mask of queries: rows at padded positions are computed like others, and where keys are
not causal they take part in the choice of a shared key list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .state import AttentionState, empty_state

__all__ = ["Part", "Place", "solve_padded"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a part lies in the call that it was cut from.

    Attributes:
        first_row: row of the part's first query.
        key_start: position of the part's first key.
        num_queries: `n_q` of the call.
        num_keys: `n_k` of the call, padding included.
        is_contiguous: whether the real keys, and so the rows and keys of the part, follow one
            another without a gap.
        is_rectangle: whether all keys come before all rows.
    """

    first_row: int
    key_start: int
    num_queries: int
    num_keys: int
    is_contiguous: bool
    is_rectangle: bool = False

    @property
    def query_start(self) -> int:
        """Position of the part's first query."""
        return self.first_row + self.num_keys - self.num_queries


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A problem without padding: the whole call, or what was cut from it.

    Attributes:
        query: `[batch, query_heads, rows, d]`.
        key: `[batch, key_heads, keys, d]`.
        value: `[batch, key_heads, keys, d_v]`.
        is_causal: bottom-right aligned causality inside the part.
        place: where the part lies; None is the whole call.
        earlier_query: the queries at real positions before a rectangle, or None without any.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    is_causal: bool
    place: Place | None = None
    earlier_query: torch.Tensor | None = None


_Solve = Callable[[Part], AttentionState]


def solve_padded(
    solve: _Solve, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: torch.Tensor, *, is_causal: bool,
) -> AttentionState:  # fmt: skip
    """Attend to the keys where `mask` is True.

    Args:
        solve: attends without padding, in a part.
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        value: `[batch, key_heads, n_k, d_v]`.
        mask: bool `[batch, n_k]`.
        is_causal: bottom-right aligned causality, in the positions before cutting.
    """
    if bool(mask.all()):
        return solve(Part(query=query, key=key, value=value, is_causal=is_causal))
    num_queries = query.shape[2]
    patterns, group = torch.unique(mask, dim=0, return_inverse=True)
    out, lse = empty_state(query, value)
    for number, pattern in enumerate(patterns):
        items = (group == number).nonzero().squeeze(-1)
        keys = pattern.nonzero().squeeze(-1)
        q, k, v = query[items], key[items][:, :, keys], value[items][:, :, keys]
        is_contiguous = len(keys) == 0 or int(keys[-1] - keys[0]) == len(keys) - 1
        real_rows = keys.new_empty(0)
        for rows, num_keys, causal in _row_groups(pattern, num_queries, is_causal):
            is_rectangle = is_causal and not causal
            real_rows = rows if causal else real_rows
            earlier = real_rows[real_rows < rows[0]]
            place = Place(
                first_row=int(rows[0]), key_start=int(keys[0]), num_queries=num_queries,
                num_keys=key.shape[2], is_contiguous=is_contiguous, is_rectangle=is_rectangle,
            )  # fmt: skip
            part = Part(
                query=q[:, :, rows], key=k[:, :, :num_keys], value=v[:, :, :num_keys],
                is_causal=causal, place=place,
                earlier_query=q[:, :, earlier] if is_rectangle and len(earlier) else None,
            )  # fmt: skip
            state = solve(part)
            where = (items[:, None], slice(None), rows[None, :])
            # advanced indices around a slice put their dimensions first: [items, rows, heads, d]
            out[where] = state.out.transpose(1, 2)
            if state.lse.numel():
                lse[where] = state.lse.transpose(1, 2)
    return AttentionState(out=out, lse=lse)


def _row_groups(
    pattern: torch.Tensor, num_queries: int, is_causal: bool
) -> list[tuple[torch.Tensor, int, bool]]:
    """Split the rows into (rows, number of leading real keys, causal) problems."""
    every_row = torch.arange(num_queries, device=pattern.device)
    total = int(pattern.sum())
    if not is_causal:
        return [(every_row, total, False)] if total else []
    position = every_row + pattern.shape[0] - num_queries
    seen = pattern.cumsum(0)[position.clamp(min=0)]
    seen = torch.where(position < 0, 0, seen)
    is_real = pattern[position.clamp(min=0)] & (position >= 0)
    groups = []
    if bool(is_real.any()):
        groups.append((every_row[is_real], total, True))
    padded = every_row[~is_real & (seen > 0)]
    return groups + [
        (padded[seen[padded] == count], int(count), False)
        for count in torch.unique(seen[padded]).tolist()
    ]
