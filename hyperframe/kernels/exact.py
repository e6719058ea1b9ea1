"""Exact attention with its log normaliser, through the fastest kernel the device has.

`exact_attention` is what every approximation is compared with, what runs below `min_seq_len`, and
what computes the diagonal blocks of the causal recursion. It never forms the score matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..errors import UnsupportedError
from ..plan import TilePlan
from ..precision import without_autocast
from ..state import AttentionState, merge
from . import torch_backend

__all__ = ["exact_attention", "exact_output", "full_plan"]


def exact_output(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float,
    is_causal: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Return exact attention by `scaled_dot_product_attention`.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        value: `[batch, key_heads, n_k, d_v]`.
        scale: factor of the logits.
        is_causal: bottom-right aligned causal masking.

    Returns:
        `[batch, query_heads, n_q, d_v]`; rows without keys are 0.
    """
    with without_autocast(query):
        return _exact_output(query, key, value, scale, is_causal)


def _exact_output(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, is_causal: bool
) -> torch.Tensor:
    query, scale = _with_positive_scale(query, scale)
    num_queries, num_keys = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if not is_causal or num_queries == 1:
        return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped)
    if num_queries == num_keys:
        return F.scaled_dot_product_attention(
            query, key, value, scale=scale, is_causal=True, enable_gqa=grouped
        )
    if num_queries > num_keys:
        # the first rows come before every key
        rest = exact_output(query[:, :, -num_keys:], key, value, scale=scale, is_causal=True)
        return F.pad(rest, (0, 0, num_queries - num_keys, 0))
    if _has_flash(query, value):
        # a mask of this shape would be written out
        return exact_attention(query, key, value, scale=scale, is_causal=True).out
    if grouped:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    # imported here: it loads torch's compiler, which takes a second
    from torch.nn.attention.bias import causal_lower_right

    bias = causal_lower_right(num_queries, num_keys)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def exact_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float,
    is_causal: bool = False,
) -> AttentionState:  # fmt: skip
    """Return exact attention and its log normaliser, differentiable through both.

    Args: as `exact_output`.

    Returns:
        The state; `lse` in float32 (float64 for float64 input).
    """
    query, scale = _with_positive_scale(query, scale)
    num_before = key.shape[2] - query.shape[2]
    if _has_flash(query, value) and (num_before >= 0 or not is_causal):
        if not is_causal or num_before == 0:
            return AttentionState(*_flash(query, key, value, scale, is_causal))
        # the kernel aligns its triangle top left: keys before the first query stand apart
        before, own = slice(num_before), slice(num_before, None)
        return merge(
            AttentionState(*_flash(query, key[:, :, before], value[:, :, before], scale, False)),
            AttentionState(*_flash(query, key[:, :, own], value[:, :, own], scale, True)),
        )
    plan = full_plan(query, key, is_causal=is_causal)
    return torch_backend.attend(query, key, value, plan, scale=scale)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _FlashCPU.apply(query, key, value, scale, is_causal)  # type: ignore[no-untyped-call]
    return out, lse


def _has_flash(query: torch.Tensor, value: torch.Tensor) -> bool:
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


def _with_positive_scale(query: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """Move sign and zero of the scale into the query: kernels multiply it into masked -inf too."""
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale < 0 else (query * 0, 1.0)


def full_plan(query: torch.Tensor, key: torch.Tensor, *, is_causal: bool) -> TilePlan:
    """Return the plan that holds every key exactly; one list, shared by all rows."""
    batch, heads, num_keys = key.shape[:3]
    index = torch.arange(num_keys, dtype=torch.int32, device=key.device)
    count = torch.tensor(num_keys, dtype=torch.int32, device=key.device).expand(batch, heads, 1)
    return TilePlan(
        key_index=index.expand(batch, heads, 1, -1), key_count=count, heavy_count=count,
        tile_size=query.shape[2], num_query_heads=query.shape[1], num_queries=query.shape[2],
        num_keys=num_keys, is_causal=is_causal, disjoint=True,
    )  # fmt: skip


class _FlashCPU(torch.autograd.Function):
    """PyTorch's CPU flash kernel, with a gradient for its log normaliser too.

    The kernel's own backward takes no gradient of `lse`. Written with one more value column that
    is 0 in `value`, 1 in `grad_out` and `-grad_lse` in `out`, the product `grad_out . out` that
    the backward subtracts in every row becomes `grad_out . out - grad_lse`, which is just the
    missing term; the extra column changes nothing else.
    """

    @staticmethod
    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, is_causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        group = query.shape[1] // key.shape[1]
        with without_autocast(query):
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1),
                0.0, is_causal, scale=scale,
            )  # fmt: skip
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        query, key, value, ctx.scale, ctx.is_causal = inputs
        ctx.save_for_backward(query, key, value, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        grad_out, grad_lse = grads
        with torch.no_grad(), without_autocast(query):
            first = _flash_backward(
                query, key, value, out, lse, grad_out, grad_lse, ctx.scale, ctx.is_causal
            )
        if torch.is_grad_enabled():
            # create_graph=True: the gradients themselves can be had, but not theirs
            first = _OnceDifferentiable.apply(*first, query, key, value, *grads)  # type: ignore[no-untyped-call]
        return (*first, None, None)


def _flash_backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, grad_out: torch.Tensor, grad_lse: torch.Tensor, scale: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    batch, key_heads, num_keys, head_dim = key.shape
    group = query.shape[1] // key_heads
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    # the kernel wants equal head sizes: eight more columns everywhere, the first in use
    pad = (0, 8)
    ones = grad_out.new_ones((*grad_out.shape[:-1], 1))
    grad_out = torch.cat([grad_out, ones], dim=-1)
    out = torch.cat([out, -grad_lse.unsqueeze(-1).to(out.dtype)], dim=-1)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grad_q, grad_k, grad_v = backward(
        F.pad(grad_out, (0, 7)), F.pad(query, pad), F.pad(key, pad), F.pad(value, pad),
        F.pad(out, (0, 7)), lse, 0.0, is_causal, scale=scale,
    )  # fmt: skip
    grad_k, grad_v = (
        grad[..., :head_dim].reshape(batch, key_heads, group, num_keys, head_dim).sum(2)
        for grad in (grad_k, grad_v)
    )
    return grad_q[..., :head_dim], grad_k, grad_v


class _OnceDifferentiable(torch.autograd.Function):
    """The first three arguments, as functions of the others that have no gradient."""

    @staticmethod
    def forward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors[:3])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError(
            "double backward: a gradient of a gradient was asked for, and PyTorch's CPU flash "
            "kernel, which computes exact attention here, has none; approximate plans of the "
            "torch backend have (min_seq_len=0 with causal='single_pass'), as does "
            "scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH)"
        )
