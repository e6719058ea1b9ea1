"""What the tests of every backend share: gradients of a fixed function, plain torch, rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace

import torch

from hyperframe.blockplan import BlockPlan
from hyperframe.plan import RankRanges, TilePlan
from hyperframe.state import AttentionState
from hyperframe.testing.strategies import AttentionInputs, Problem

Attend = Callable[..., AttentionState]

SCALE = 0.7


Plan = TilePlan | BlockPlan


def leaves(inputs: AttentionInputs, plan: Plan) -> tuple[list[torch.Tensor], Plan]:
    """Copies of all differentiable inputs, and the plan over the copies."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    if isinstance(plan, BlockPlan):
        return tensors, plan
    if plan.summary_key is not None and plan.summary_value is not None:
        tensors += [
            summary.detach().clone().requires_grad_()
            for summary in (plan.summary_key, plan.summary_value)
        ]
        plan = replace(plan, summary_key=tensors[3], summary_value=tensors[4])
    return tensors, plan


def with_gradients(
    attend: Attend, inputs: AttentionInputs, plan: Plan
) -> tuple[AttentionState, list[torch.Tensor]]:
    """The state, and the gradient of one fixed random function of `out` and `lse`."""
    tensors, plan = leaves(inputs, plan)
    state = attend(*tensors[:3], plan, scale=SCALE)
    return state, gradients_of(state, tensors, inputs.seed)


def gradients_of(
    state: AttentionState, tensors: Sequence[torch.Tensor], seed: int, *, by_lse: bool = True
) -> list[torch.Tensor]:
    """The gradient of one fixed random function of `out` and (but without `by_lse`) `lse`."""
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        for tensor in state
    ]
    total = (state.out * weights[0].to(state.out)).sum().double()
    if by_lse:
        # rows without keys have no normaliser to differentiate
        lse = state.lse.masked_fill(torch.isinf(state.lse), 0)
        total = total + (lse * weights[1]).sum()
    return list(torch.autograd.grad(total, tensors))


def flat(state: AttentionState, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`out`, `lse` (0 in rows without keys) and gradients, on the CPU."""
    lse = state.lse.masked_fill(torch.isinf(state.lse), 0)
    return [x.detach().cpu() for x in (state.out, lse, *gradients)]


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, *, scale: float
) -> AttentionState:
    """What a plan means, in a few lines of dense torch in the dtype of the inputs."""
    if isinstance(plan, BlockPlan):
        plan = plan.to_tile_plan()
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


def in_dtype(plan: Plan, dtype: torch.dtype) -> Plan:
    if isinstance(plan, BlockPlan):
        return plan
    if plan.summary_key is None or plan.summary_value is None:
        return plan
    # both precisions start from the same numbers
    return replace(
        plan, summary_key=plan.summary_key.bfloat16().to(dtype),
        summary_value=plan.summary_value.bfloat16().to(dtype),
    )  # fmt: skip


def on(inputs: AttentionInputs, device: torch.device) -> AttentionInputs:
    """The inputs on a device."""
    q, k, v = (tensor.to(device) for tensor in inputs)
    return replace(inputs, query=q, key=k, value=v)


def plan_on(plan: Plan, device: torch.device) -> Plan:
    """The plan on a device; expanded dimensions stay so."""
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
    return replace(plan, **moved)  # type: ignore[arg-type]


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    stored = tensor
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            stored = stored.narrow(dim, 0, 1)
    return stored.to(device).expand(tensor.shape)


class PooledErrors:
    """Relative mean square errors of a backend and of plain torch, summed over problems.

    Pooled, because in one problem a few entries may decide, and their errors are a matter of luck.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = labels
        self.ours, self.theirs = torch.zeros(2, len(labels), dtype=torch.float64)

    def add(
        self, found: Sequence[torch.Tensor], plain: Sequence[torch.Tensor],
        exact: Sequence[torch.Tensor],
    ) -> None:  # fmt: skip
        """Add one problem; all three as `flat` gives them."""
        for errors, results in ((self.ours, found), (self.theirs, plain)):
            for number, (result, truth) in enumerate(zip(results, exact, strict=True)):
                size = truth.double().square().mean().clamp(min=1e-30)
                errors[number] += (result.double() - truth.double()).square().mean() / size

    def check(self, factor: float = 2.0) -> None:
        """Assert that the backend errs at most `factor` times as much as plain torch."""
        pairs = zip(self.labels, self.ours.sqrt(), self.theirs.sqrt(), strict=True)
        for label, error, plain_error in pairs:
            assert error <= factor * plain_error, (label, float(error / plain_error))


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """`torch.use_deterministic_algorithms`, and back."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
