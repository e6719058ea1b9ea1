"""Key padding: padded keys are cut out, so that no detector or sampler ever sees one.

Batch items with equal masks run together. Under a causal mask, rows whose own key is real form a
causal problem over the real keys; a row at a padded position sees the real keys before it, and
rows that see the same keys are solved together.

There is no mask of queries: rows at padded positions are computed like others, and where keys are
not causal they take part in the choice of a shared key list.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .state import AttentionState, empty_state

__all__ = ["solve_padded"]

_Solve = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], AttentionState]


def solve_padded(
    solve: _Solve, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    mask: torch.Tensor, *, is_causal: bool,
) -> AttentionState:  # fmt: skip
    """Attend to the keys where `mask` is True.

    Args:
        solve: attends without padding: `solve(query, key, value, is_causal)`.
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        value: `[batch, key_heads, n_k, d_v]`.
        mask: bool `[batch, n_k]`.
        is_causal: bottom-right aligned causality, in the positions before cutting.
    """
    if bool(mask.all()):
        return solve(query, key, value, is_causal)
    patterns, group = torch.unique(mask, dim=0, return_inverse=True)
    out, lse = empty_state(query, value)
    for number, pattern in enumerate(patterns):
        items = (group == number).nonzero().squeeze(-1)
        keys = pattern.nonzero().squeeze(-1)
        q, k, v = query[items], key[items][:, :, keys], value[items][:, :, keys]
        for rows, num_keys, causal in _row_groups(pattern, query.shape[2], is_causal):
            state = solve(q[:, :, rows], k[:, :, :num_keys], v[:, :, :num_keys], causal)
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
