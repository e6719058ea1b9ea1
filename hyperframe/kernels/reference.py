"""The reference backend: the meaning of a plan, computed densely in float64.

Quadratic in time and memory. It is the oracle of every test, and the place to read what a plan
computes. Differentiable by autograd in query, key, value and the summaries.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..plan import TilePlan
from ..precision import without_autocast
from ..state import AttentionState

__all__ = ["attend"]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: TilePlan, *, scale: float
) -> AttentionState:
    """Attend by the plan's dense weight matrix.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        value: `[batch, key_heads, n_k, d_v]`.
        plan: the plan.
        scale: factor of the logits.

    Returns:
        `out` in the dtype of `query` (computed in float64), `lse` in float32, or float64 for
        float64 input.
    """
    with without_autocast(query):
        return _attend(query, key, value, plan, scale)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: TilePlan, scale: float
) -> AttentionState:
    if plan.summary_key is not None and plan.summary_value is not None:
        key = torch.cat([key, plan.summary_key.to(key.dtype)], dim=2)
        value = torch.cat([value, plan.summary_value.to(value.dtype)], dim=2)
    group = query.shape[1] // key.shape[1]
    q = query.double()
    k = key.double().repeat_interleave(group, dim=1)
    v = value.double().repeat_interleave(group, dim=1)

    # what a plan takes out of others is computed like any other
    plan = replace(plan.deduplicated(), is_removed=False)
    heavy = plan.to_dense(part="heavy").log()
    sampled = plan.to_dense(part="sampled").log()
    heavy_values = plan.to_dense(part="heavy", for_values=True).log()
    sampled_values = plan.to_dense(part="sampled", for_values=True).log()

    logits = scale * q @ k.transpose(-1, -2)
    capped = logits
    if plan.log_cap is not None:
        capped = torch.minimum(logits, plan.log_cap.double().unsqueeze(-1))
    # the row sum and the numerator are each shifted by their largest term, so that neither
    # overflows or vanishes; by 0 in empty rows
    top = torch.cat([logits + heavy, capped + sampled], dim=-1).detach().amax(-1, keepdim=True)
    is_empty = top == float("-inf")
    if plan.log_floor is not None:
        top = torch.maximum(top, plan.log_floor.double().unsqueeze(-1))
    top = top.masked_fill(is_empty, 0.0)
    heavy_sum = torch.exp(logits + heavy - top).sum(dim=-1)
    sampled_sum = torch.exp(capped + sampled - top).sum(dim=-1)
    if plan.log_floor is not None:
        floor = torch.exp(plan.log_floor.double() - top.squeeze(-1))
        sampled_sum = torch.maximum(sampled_sum, floor)
    row_sum = (heavy_sum + sampled_sum).masked_fill(is_empty.squeeze(-1), 1.0)
    value_logits = torch.cat([logits + heavy_values, logits + sampled_values], dim=-1)
    value_top = value_logits.detach().amax(dim=-1, keepdim=True)
    value_top = value_top.masked_fill(torch.isinf(value_top), 0.0)
    out = torch.exp(value_logits - value_top) @ torch.cat([v, v], dim=2)
    # beyond exp(700) the quotient has no float64; it stays finite
    out = out / row_sum.unsqueeze(-1) * torch.exp((value_top - top).clamp(max=700.0))
    out = out.masked_fill(is_empty, 0.0)
    lse = (top.squeeze(-1) + row_sum.log()).masked_fill(is_empty.squeeze(-1), float("-inf"))
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return AttentionState(out=out.to(query.dtype), lse=lse.to(lse_dtype))
