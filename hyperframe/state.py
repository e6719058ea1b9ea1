"""Attention states `(out, lse)` and their merge.

Attention over a set of keys is summarised by its normalised output and the logarithm of its
normaliser. States over disjoint sets of keys merge into the state of the union; the merge is
associative and commutative, so plans, recursion levels and devices may be combined in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .errors import ArgumentError

__all__ = ["AttentionState", "empty_state", "merge"]


class AttentionState(NamedTuple):
    """Output and log normaliser of attention over one set of keys.

    Attributes:
        out: `[batch, query_heads, n_q, d_v]`, the normalised output; 0 for a row without keys.
        lse: `[batch, query_heads, n_q]`, natural logarithm of the row's weighted sum of
            `exp(scale * q k^T)`; `-inf` for a row without keys.
    """

    out: torch.Tensor
    lse: torch.Tensor


def empty_state(query: torch.Tensor, value: torch.Tensor) -> AttentionState:
    """Return the neutral element of `merge`: zeros and `-inf`, for every row of `query`."""
    rows = query.shape[:-1]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return AttentionState(
        out=query.new_zeros((*rows, value.shape[-1])),
        lse=torch.full(rows, float("-inf"), dtype=dtype, device=query.device),
    )


def merge(
    *states: AttentionState, removed: Sequence[AttentionState] = ()
) -> AttentionState:  # fmt: skip
    """Merge states over disjoint key sets into the state of their union.

    `lse = log sum_s exp(lse_s)` and `out = sum_s exp(lse_s - lse) out_s`. The row maximum is
    subtracted first, so any two finite values merge without overflow or saturation however far
    apart they are, and gradients flow through both `out` and `lse` of every state.

    Args:
        states: one or more states with equal shapes.
        removed: states over parts of what those hold, which are taken out again; what is left
            must not be much less than what is taken out, or digits are lost.

    Returns:
        The merged state, in the dtypes of the first.

    Example:
        >>> import torch
        >>> a = AttentionState(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1))
        >>> b = AttentionState(torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1))
        >>> merge(a, b).out.tolist()
        [[[[0.5, 0.5]]]]
    """
    if not states:
        raise ArgumentError("merge: no states were given; pass at least one, or `empty_state(...)`")
    if len(states) == 1 and not removed:
        return states[0]
    every = (*states, *removed)
    lses = torch.stack([state.lse for state in every])  # [S, B, H, n_q]
    top = lses.detach().amax(dim=0)
    # rows empty in every state: subtract 0 instead of -inf, so that no NaN is born
    top = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    weights = torch.exp(lses - top)
    if removed:
        weights = torch.cat([weights[: len(states)], -weights[len(states) :]])
    total = weights.sum(dim=0)
    is_empty = total <= 0
    safe_total = torch.where(is_empty, torch.ones_like(total), total)
    shares = weights / safe_total
    # accumulated in the precision of the log normalisers, returned in that of the outputs
    out = shares[0].unsqueeze(-1) * states[0].out
    for share, state in zip(shares[1:], every[1:], strict=True):
        out = out + share.unsqueeze(-1) * state.out
    lse = torch.where(is_empty, torch.full_like(top, float("-inf")), top + torch.log(safe_total))
    return AttentionState(out=out.to(states[0].out.dtype), lse=lse)
