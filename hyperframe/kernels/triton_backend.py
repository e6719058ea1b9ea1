"""The Triton backend: fused kernels for every plan, on CUDA and in Triton's interpreter.

This module says what the kernels can take and groups the plans; it imports no Triton. The
kernels themselves are in `kernels.triton`, behind the operator of `kernels.ops.attention`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..blockplan import BlockPlan
from ..errors import ArgumentError
from ..plan import TilePlan
from ..ragged import spread_heads
from ..state import AttentionState, merge
from .ops import has_triton
from .ops.attention import attend_plans

__all__ = ["LARGEST_GRID", "LARGEST_HEAD_DIM", "attend_all", "why_not", "why_not_inputs"]

LARGEST_HEAD_DIM = 256
"""Widest head of query, key and value."""

LARGEST_GRID = 65535
"""Most batch items, and most query heads: each is a dimension of a CUDA grid."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device, or None."""
    if not has_triton():
        return (
            "the package triton is not installed (install it with: python -m pip install "
            "'hyperframe-attention[triton]')"
        )
    if device.type == "cuda" and torch.version.hip is None:
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        f"its kernels run on NVIDIA GPUs and the inputs are on {device.type} (for tests on a CPU: "
        "set TRITON_INTERPRET=1 before anything imports triton)"
    )


def why_not_inputs(query: torch.Tensor, value: torch.Tensor) -> str | None:
    """Return which property of the inputs the kernels cannot take, or None."""
    if query.dtype not in _DTYPES:
        found = str(query.dtype).removeprefix("torch.")
        return f"takes float32, bfloat16 and float16, and the inputs are {found}"
    for what, size in (("head_dim", query.shape[-1]), ("the head_dim of value", value.shape[-1])):
        if size > LARGEST_HEAD_DIM:
            return f"takes heads up to {LARGEST_HEAD_DIM} wide, and {what} is {size}"
    for what, size in (("batch items", query.shape[0]), ("query heads", query.shape[1])):
        if size > LARGEST_GRID:
            return f"takes up to {LARGEST_GRID:,} {what}, and there are {size:,}"
    return None


def attend_all(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    plans: Sequence[TilePlan | BlockPlan], *, scale: float, leaf: int | None = None,
) -> AttentionState:  # fmt: skip
    """Attend by plans of disjoint support and exact leaves, in one merged state.

    What `why_not` and `why_not_inputs` name has to be refused before.

    Args:
        query: `[batch, query_heads, n_q, d]`; fp32, bf16 or fp16, `d <= 256`.
        key: `[batch, key_heads, n_k, d]`.
        value: `[batch, key_heads, n_k, d_v]`, `d_v <= 256`.
        plans: the plans, on the same device.
        scale: factor of the logits.
        leaf: run length of exact causal leaves, or None.

    Returns:
        `out` in the dtype of `query`, `lse` in float32. Logits and sums are float32; products of
        float32 inputs are true float32 unless `torch.backends.cuda.matmul.allow_tf32`. With
        `torch.use_deterministic_algorithms(True)` the gradients have the same bits in every run.
        Cost: time O(rows x keys per row x d), no extra memory in the forward beyond the outputs.
    """
    together: list[TilePlan | BlockPlan] = []
    apart: list[TilePlan | BlockPlan] = []
    for plan in plans:
        ready = plan if isinstance(plan, BlockPlan) else _with_own_ranks(plan, key.shape[1])
        (apart if _stands_apart(ready) else together).append(ready)
    # a plan that covers all rows comes first: the others merge into what it wrote
    # (no sort: its keys are symbolic under torch.compile)
    together = [
        *(plan for plan in together if not _leaves_rows_out(plan)),
        *(plan for plan in together if _leaves_rows_out(plan)),
    ]
    states: list[AttentionState] = []
    removed: list[AttentionState] = []
    if together or leaf is not None:
        out, lse = attend_plans(query, key, value, together, leaf=leaf, scale=scale)
        states.append(AttentionState(out=out, lse=lse))
    for plan in apart:
        out, lse = attend_plans(query, key, value, [plan], leaf=None, scale=scale)
        is_removed = isinstance(plan, TilePlan) and plan.is_removed
        (removed if is_removed else states).append(AttentionState(out=out, lse=lse))
    return merge(*states, removed=removed)


def _with_own_ranks(plan: TilePlan, key_heads: int) -> TilePlan:
    """Return the plan without repeated keys, and with ranks for every key head."""
    plan = plan.deduplicated()
    excluded = plan.excluded
    if excluded is None or excluded.key_rank.shape[1] == key_heads:
        return plan
    if key_heads % excluded.key_rank.shape[1]:
        raise ArgumentError(
            f"excluded: its ranks are for {excluded.key_rank.shape[1]} heads, and there are "
            f"{key_heads} key heads; give one order to each key head"
        )
    ranks = spread_heads(excluded.key_rank, key_heads)
    return replace(plan, excluded=replace(excluded, key_rank=ranks))


def _stands_apart(plan: TilePlan | BlockPlan) -> bool:
    """Whether a plan's row sum and numerator differ, it brings keys of its own, or is removed."""
    if isinstance(plan, BlockPlan):
        return False
    own = (plan.log_cap, plan.log_floor, plan.value_log_weight, plan.summary_key)
    return plan.is_removed or any(tensor is not None for tensor in own)


def _leaves_rows_out(plan: TilePlan | BlockPlan) -> bool:
    if isinstance(plan, BlockPlan):
        return sum(stop - start for start, stop, _, _ in plan.rectangles) < plan.num_queries
    return plan.query_order is not None
