"""Attention by plans as one operator: forward, shapes and gradient, for any backend of kernels.

A plan travels as a flat list of tensors (absent ones are None) and one of integers, in the order
that `pack` and `unpack` share. The operator returns the merged state of all its plans and leaves.
Schemas and shapes are registered here without Triton, which is imported when the operator runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...blockplan import BlockPlan
from ...errors import UnsupportedError
from ...plan import RankRanges, TilePlan

__all__ = ["attend_plans", "pack", "unpack"]

Plan = TilePlan | BlockPlan

_TILE_TENSORS = (
    "key_index", "key_count", "heavy_count", "query_order", "log_weight", "value_log_weight",
    "log_cap", "log_floor", "band_count",
)  # fmt: skip
_BLOCK_TENSORS = (
    "query_order", "key_order", "tiles", "sample_index", "sample_log_weight", "key_rank",
)  # fmt: skip
_BLOCK_SIZES = ("max_rows", "max_keys", "num_query_heads", "num_queries", "num_keys")
_BLOCK_FLAGS = ("samples_are_own", "covers_all_keys")


def pack(plans: Sequence[Plan], leaf: int | None) -> tuple[list[torch.Tensor | None], list[int]]:
    """Return plans and the leaf as a list of tensors and a list of integers; no summaries."""
    # autograd asks for a gradient of every element of a list unless one of them is None
    tensors: list[torch.Tensor | None] = [None]
    sizes = [leaf or 0, len(plans)]
    for plan in plans:
        if isinstance(plan, BlockPlan):
            tensors += [getattr(plan, name) for name in _BLOCK_TENSORS]
            sizes += [1, *(getattr(plan, name) for name in _BLOCK_SIZES)]
            sizes += [int(getattr(plan, name)) for name in _BLOCK_FLAGS]
            sizes += [len(plan.rectangles)]
            for rectangle, tiles in zip(plan.rectangles, plan.tile_counts, strict=True):
                sizes += [*rectangle, tiles]
            continue
        excluded = plan.excluded
        tensors += [getattr(plan, name) for name in _TILE_TENSORS]
        tensors += [None] * 3 if excluded is None else [
            excluded.key_rank, excluded.start, excluded.stop
        ]  # fmt: skip
        sizes += [
            0, plan.tile_size, plan.num_query_heads, plan.num_queries, plan.num_keys,
            int(plan.is_causal), plan.position_offset, int(plan.band is not None),
            *(plan.band or (0, 0)),
        ]  # fmt: skip
    return tensors, sizes


def unpack(
    tensors: Sequence[torch.Tensor | None], sizes: Sequence[int],
    summary_key: torch.Tensor | None = None, summary_value: torch.Tensor | None = None,
) -> tuple[list[Plan], int | None]:  # fmt: skip
    """Return what `pack` was given, summaries beside; tile plans come back as disjoint ones."""
    tensor, place = iter(tensors[1:]), 2
    leaf, count = sizes[:2]
    plans: list[Plan] = []
    for _ in range(count):
        fields: dict[str, Any]
        if sizes[place]:
            fields = {name: next(tensor) for name in _BLOCK_TENSORS}
            fields |= zip(_BLOCK_SIZES, sizes[place + 1 : place + 6], strict=True)
            flags = map(bool, sizes[place + 6 : place + 8])
            fields |= zip(_BLOCK_FLAGS, flags, strict=True)
            first, rectangles = place + 9, sizes[place + 8]
            place = first + 5 * rectangles
            starts = range(first, place, 5)
            fields["rectangles"] = tuple(tuple(sizes[at : at + 4]) for at in starts)
            fields["tile_counts"] = tuple(sizes[first + 4 : place : 5])
            plans.append(BlockPlan(**fields))
            continue
        fields = {name: next(tensor) for name in _TILE_TENSORS}
        key_rank, start, stop = (next(tensor) for _ in range(3))
        if key_rank is not None and start is not None and stop is not None:
            fields["excluded"] = RankRanges(key_rank=key_rank, start=start, stop=stop)
        names = ("tile_size", "num_query_heads", "num_queries", "num_keys")
        fields |= zip(names, sizes[place + 1 : place + 5], strict=True)
        is_causal, offset, has_band, left, right = sizes[place + 5 : place + 10]
        place += 10
        fields |= {"is_causal": bool(is_causal), "query_offset": offset, "disjoint": True}
        fields |= {"summary_key": summary_key, "summary_value": summary_value}
        plans.append(TilePlan(**fields, band=(left, right) if has_band else None))
    return plans, leaf or None


def attend_plans(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plans: Sequence[Plan], *,
    leaf: int | None, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attend by plans of disjoint support and exact causal leaves, in one state.

    Args:
        query: `[batch, query_heads, n_q, d]`; fp32, bf16 or fp16.
        key: `[batch, key_heads, n_k, d]`.
        value: `[batch, key_heads, n_k, d_v]`.
        plans: one or more plans; tile plans must be disjoint within each tile (`deduplicated`).
            Only a single plan may have caps, a floor, value weights or summaries.
        leaf: run length of the exact leaves, or None.
        scale: factor of the logits.

    Returns:
        `out` `[batch, query_heads, n_q, d_v]` and `lse` float32 `[batch, query_heads, n_q]`,
        differentiable in query, key, value and summaries.
    """
    tensors, sizes = pack(plans, leaf)
    summaries: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    for plan in plans:
        if isinstance(plan, TilePlan) and plan.summary_key is not None:
            assert plan.summary_value is not None
            summaries = (plan.summary_key.to(key.dtype), plan.summary_value.to(value.dtype))
    out, lse, _ = torch.ops.hyperframe.attend_plans(
        query, key, value, *summaries, tensors, sizes, scale
    )
    return out, lse


_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
torch.library.define(
    "hyperframe::attend_plans",
    "(Tensor query, Tensor key, Tensor value, Tensor? summary_key, Tensor? summary_value,"
    " Tensor?[] plans, SymInt[] sizes, float scale) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "hyperframe::attend_plans_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out,"
    " Tensor lse, Tensor floored, Tensor? summary_key, Tensor? summary_value, Tensor?[] plans,"
    " SymInt[] sizes, float scale) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)

_Maybe = torch.Tensor | None
_Tensors = Sequence[torch.Tensor | None]


@torch.library.impl("hyperframe::attend_plans", "default")
def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, summary_key: _Maybe,
    summary_value: _Maybe, plans: _Tensors, sizes: Sequence[int], scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    from ..triton import attend as kernels

    with torch.no_grad(), _on(query):
        unpacked = unpack(plans, sizes, summary_key, summary_value)
        return kernels.forward(query, key, value, *unpacked, scale)


@torch.library.impl("hyperframe::attend_plans_backward", "default")
def _backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor,
    value: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, floored: torch.Tensor,
    summary_key: _Maybe, summary_value: _Maybe, plans: _Tensors, sizes: Sequence[int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    from ..triton import attend as kernels

    with torch.no_grad(), _on(query):
        if query.shape[2] == 0:
            like = _shapes_of_gradients(
                grad_out, grad_lse, query, key, value, out, lse, floored, summary_key,
                summary_value, plans, sizes, scale,
            )  # fmt: skip
            dq, dk, dv = (x.zero_() for x in like)
            return dq, dk, dv
        unpacked = unpack(plans, sizes, summary_key, summary_value)
        return kernels.backward(
            grad_out, grad_lse, query, key, value, out, lse, floored, *unpacked, scale
        )


def _on(tensor: torch.Tensor) -> torch.cuda.device:
    """Make the tensor's GPU the current one; nothing on a CPU."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


@torch.library.register_fake("hyperframe::attend_plans")
def _shapes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, summary_key: _Maybe,
    summary_value: _Maybe, plans: _Tensors, sizes: Sequence[int], scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    rows = query.shape[:3]
    has_floor = any(
        isinstance(plan, TilePlan) and plan.log_floor is not None
        for plan in unpack(plans, sizes)[0]
    )
    return (
        query.new_empty((*rows, value.shape[-1])), query.new_empty(rows, dtype=torch.float32),
        query.new_empty(rows if has_floor else (0,), dtype=torch.int8),
    )  # fmt: skip


@torch.library.register_fake("hyperframe::attend_plans_backward")
def _shapes_of_gradients(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor,
    value: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, floored: torch.Tensor,
    summary_key: _Maybe, summary_value: _Maybe, plans: _Tensors, sizes: Sequence[int],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    rows = key.shape[2] + (0 if summary_key is None else summary_key.shape[2])
    return (
        query.new_empty(query.shape), key.new_empty((*key.shape[:2], rows, key.shape[-1])),
        value.new_empty((*value.shape[:2], rows, value.shape[-1])),
    )  # fmt: skip


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    query, key, value, summary_key, summary_value, plans, ctx.sizes, ctx.scale = inputs
    out, lse, floored = output
    ctx.save_for_backward(query, key, value, out, lse, floored, summary_key, summary_value, *plans)
    ctx.mark_non_differentiable(floored)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None, _: Any
) -> tuple[Any, ...]:
    query, key, value, out, lse, floored, summary_key, summary_value, *plans = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    dq, dk, dv = torch.ops.hyperframe.attend_plans_backward(
        grad_out, grad_lse, query, key, value, out, lse, floored, summary_key, summary_value,
        plans, ctx.sizes, ctx.scale,
    )  # fmt: skip
    if summary_key is None:
        return dq, dk, dv, None, None, None, None, None
    rows = key.shape[2]
    keys, summaries = zip(*((x[:, :, :rows], x[:, :, rows:]) for x in (dk, dv)), strict=True)
    return dq, *keys, *summaries, None, None, None


torch.library.register_autograd("hyperframe::attend_plans", _differentiate, setup_context=_keep)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    """The gradient of the gradient is refused whatever it would need."""


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise UnsupportedError(
        "double backward: a gradient of a gradient was asked for, and the Triton backend has none; "
        "backend='torch' has, for plans (min_seq_len=0 with causal='single_pass')"
    )


torch.library.register_autograd(
    "hyperframe::attend_plans_backward", _refuse, setup_context=_keep_nothing
)
