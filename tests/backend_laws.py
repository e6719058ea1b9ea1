"""What the tests of every backend share: gradients of a fixed function, plain torch, rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch

from hyperframe.plan import RankRanges, TilePlan
from hyperframe.state import AttentionState
from hyperframe.testing.strategies import AttentionInputs, Problem

Attend = Callable[..., AttentionState]

SCALE = 0.7


def leaves(inputs: AttentionInputs, plan: TilePlan) -> tuple[list[torch.Tensor], TilePlan]:
    """Copies of all differentiable inputs, and the plan over the copies."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    if plan.summary_key is not None and plan.summary_value is not None:
        tensors += [
            summary.detach().clone().requires_grad_()
            for summary in (plan.summary_key, plan.summary_value)
        ]
        plan = replace(plan, summary_key=tensors[3], summary_value=tensors[4])
    return tensors, plan


def with_gradients(
    attend: Attend, inputs: AttentionInputs, plan: TilePlan
) -> tuple[AttentionState, list[torch.Tensor]]:
    """The state, and the gradient of one fixed random function of `out` and `lse`."""
    tensors, plan = leaves(inputs, plan)
    state = attend(*tensors[:3], plan, scale=SCALE)
    generator = torch.Generator().manual_seed(inputs.seed)
    weights = [
        torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        for tensor in state
    ]
    # rows without keys have no normaliser to differentiate
    lse = state.lse.masked_fill(torch.isinf(state.lse), 0)
    total = (state.out * weights[0].to(state.out)).sum().double() + (lse * weights[1]).sum()
    return state, list(torch.autograd.grad(total, tensors))


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: TilePlan, *, scale: float
) -> AttentionState:
    """What a plan means, in a few lines of dense torch in the dtype of the inputs."""
    if plan.summary_key is not None and plan.summary_value is not None:
        key = torch.cat([key, plan.summary_key], dim=2)
        value = torch.cat([value, plan.summary_value], dim=2)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    heavy, sampled = (plan.to_dense(part=part).log().to(query) for part in ("heavy", "sampled"))
    heavy_values, sampled_values = (
        plan.to_dense(part=part, for_values=True).log().to(query) for part in ("heavy", "sampled")
    )
    logits = scale * (query @ key.mT)
    capped, floor = logits, -torch.inf
    if plan.log_cap is not None:
        capped = torch.minimum(logits, plan.log_cap.to(query).unsqueeze(-1))
    top = torch.maximum(logits + heavy, capped + sampled).detach().amax(dim=-1, keepdim=True)
    is_empty = torch.isinf(top)
    if plan.log_floor is not None:
        floor = plan.log_floor.to(query).unsqueeze(-1).masked_fill(is_empty, -torch.inf)
        top = torch.maximum(top, floor)
    top = top.masked_fill(is_empty, 0)
    row_sum = torch.exp(capped + sampled - top).sum(dim=-1, keepdim=True)
    row_sum = torch.maximum(row_sum, torch.exp(floor - top))
    row_sum = row_sum + torch.exp(logits + heavy - top).sum(dim=-1, keepdim=True)
    lse = top + row_sum.masked_fill(is_empty, 1).log()
    weights = torch.exp(logits + heavy_values - lse) + torch.exp(logits + sampled_values - lse)
    out = (weights @ value).masked_fill(is_empty, 0)
    return AttentionState(out=out, lse=lse.masked_fill(is_empty, -torch.inf).squeeze(-1))


# enough rows and keys for a root mean square error to be typical of its precision
TYPICAL = Problem(
    batch=1, query_heads=4, key_heads=2, num_queries=40, num_keys=48, head_dim=16, value_dim=12
)


def rounded(inputs: AttentionInputs, dtype: torch.dtype) -> AttentionInputs:
    q, k, v = (tensor.to(dtype) for tensor in inputs)
    return replace(inputs, query=q, key=k, value=v)


def in_dtype(plan: TilePlan, dtype: torch.dtype) -> TilePlan:
    if plan.summary_key is None or plan.summary_value is None:
        return plan
    # both precisions start from the same numbers
    return replace(
        plan, summary_key=plan.summary_key.bfloat16().to(dtype),
        summary_value=plan.summary_value.bfloat16().to(dtype),
    )  # fmt: skip




def on(inputs: AttentionInputs, device: torch.device) -> AttentionInputs:
    """Return the inputs on a device."""
    q, k, v = (tensor.to(device) for tensor in inputs)
    return replace(inputs, query=q, key=k, value=v)


def plan_on(plan: TilePlan, device: torch.device) -> TilePlan:
    """Return the plan on a device; expanded dimensions stay so."""
    moved: dict[str, object] = {}
    for field in fields(plan):
        value = getattr(plan, field.name)
        if isinstance(value, torch.Tensor):
            moved[field.name] = _moved(value, device)
        elif isinstance(value, RankRanges):
            moved[field.name] = RankRanges(
                key_rank=value.key_rank.to(device), start=value.start.to(device),
                stop=value.stop.to(device),
            )  # fmt: skip
    return replace(plan, **moved)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    stored = tensor
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            stored = stored.narrow(dim, 0, 1)
    return stored.to(device).expand(tensor.shape)
