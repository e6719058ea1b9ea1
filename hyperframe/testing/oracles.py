"""Float64 dense oracles: what attention means, written to be read and not to be fast."""

from __future__ import annotations

import torch

from ..plan import TilePlan
from ..state import AttentionState

__all__ = ["causal_mask", "dense_attention", "masked_attention", "plan_attention"]


def causal_mask(num_queries: int, num_keys: int) -> torch.Tensor:
    """Return the bottom-right aligned causal mask: bool `[n_q, n_k]`."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weight: torch.Tensor, *,
    scale: float | None = None,
) -> AttentionState:  # fmt: skip
    """Return attention with every entry of `A` multiplied by a weight, in float64.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        value: `[batch, key_heads, n_k, d_v]`.
        weight: bool or floating point, broadcast to `[batch, query_heads, n_q, n_k]`.
        scale: factor of the logits; None is `1 / sqrt(d)`.

    Returns:
        The state in float64; a row without weight is 0 and `-inf`.
    """
    group = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    k = key.double().repeat_interleave(group, dim=1)
    v = value.double().repeat_interleave(group, dim=1)
    logits = scale * query.double() @ k.transpose(-1, -2) + weight.double().log()
    top = logits.detach().amax(dim=-1, keepdim=True)
    top = torch.where(torch.isinf(top), 0.0, top)
    terms = torch.exp(logits - top)
    total = terms.sum(dim=-1, keepdim=True)
    is_empty = total == 0
    safe_total = torch.where(is_empty, 1.0, total)  # so that gradients stay finite too
    lse = (top + safe_total.log()).masked_fill(is_empty, float("-inf"))
    return AttentionState(out=terms @ v / safe_total, lse=lse.squeeze(-1))


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None = None,
    is_causal: bool = False, key_padding_mask: torch.Tensor | None = None,
) -> AttentionState:  # fmt: skip
    """Return exact attention in float64; arguments as for `HyperAttention`."""
    allowed = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    if is_causal:
        allowed = causal_mask(query.shape[2], key.shape[2]).to(query.device)
    if key_padding_mask is not None:
        allowed = allowed & key_padding_mask[:, None, None, :]
    return masked_attention(query, key, value, allowed, scale=scale)


def plan_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *plans: TilePlan,
    scale: float | None = None,
) -> AttentionState:  # fmt: skip
    """Return what plans with disjoint support mean together: attention by the sum of their `W`.

    For plans without separate value weights, caps, floors and summary keys.
    """
    weight = torch.stack([plan.to_dense() for plan in plans]).sum(dim=0)
    return masked_attention(query, key, value, weight, scale=scale)
