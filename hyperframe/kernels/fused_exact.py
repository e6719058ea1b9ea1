"""Exact attention and its log normaliser through PyTorch's fused kernels, differentiable.

`fused_attention` is an operator with a gradient for both of its results; it traces as one node,
so that the choice of a kernel is made where the tensors are real. `leaf_forward` and
`leaf_backward` are the plain pair for causal runs of rows, to be used inside other operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UnsupportedError
from ..precision import without_autocast
from . import fused_kernels

__all__ = [
    "exact_runs",
    "fused_attention",
    "is_fusable",
    "leaf_backward",
    "leaf_forward",
    "with_positive_scale",
]


def is_fusable(query: torch.Tensor) -> bool:
    """Return whether a fused kernel takes this device and dtype, whatever the shapes."""
    if query.device.type == "cpu":
        return True
    return query.device.type == "cuda" and query.dtype != torch.float64


def with_positive_scale(query: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """Move sign and zero of the scale into the query: kernels multiply it into masked -inf too."""
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale < 0 else (query * 0, 1.0)


def fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return exact attention and its log normaliser.

    Args:
        query: `[batch, query_heads, n_q, d]`; `is_fusable`.
        key: `[batch, key_heads, n_k, d]`, where `key_heads` divides `query_heads`.
        value: `[batch, key_heads, n_k, d_v]`.
        scale: factor of the logits, positive.
        is_causal: row i attends to keys up to i; needs `n_q == n_k`.

    Returns:
        `out` `[batch, query_heads, n_q, d_v]` in the dtype of `query` (for `d == d_v` in its
        memory order), and `lse` `[batch, query_heads, n_q]`: float32, for float64 input float64.
        Differentiable once, through both. Time O(n_q n_k (d + d_v)), extra memory linear in
        the inputs: on CUDA heads whose sizes differ or are no multiples of 8 are padded in a copy.
    """
    out, lse = torch.ops.hyperframe.fused_attention(query, key, value, scale, is_causal)
    return out, lse


def exact_runs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, leaf: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `leaf_forward` does, differentiable through both results."""
    return _by_runs(fused_attention, query, key, value, leaf, scale)


def leaf_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, leaf: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend causally inside consecutive runs of `leaf` rows, without autograd.

    Contiguous inputs with as many key heads as query heads are not copied, nor any inputs of a
    batch of one, nor those that lie in memory as `[batch, n, heads, d]` with `n` a multiple of
    `leaf`. Others are, and those that no kernel loads as they are (see `fused_kernels`).

    Args:
        query: `[batch, query_heads, n, d]`; `is_fusable`.
        key: `[batch, key_heads, n, d]`.
        value: `[batch, key_heads, n, d_v]`.
        leaf: rows of a run; the last run may be shorter (and costs another call of the kernel).
        scale: factor of the logits.

    Returns:
        `out` `[batch, query_heads, n, d_v]`, contiguous, and `lse` `[batch, query_heads, n]`,
        contiguous, float32 (float64 for float64 input).
    """
    with torch.no_grad(), without_autocast(query):
        query, scale = with_positive_scale(query, scale)
        out, lse = _by_runs(fused_kernels.forward, query, key, value, leaf, scale)
        return out.contiguous(), lse.contiguous()


def leaf_backward(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, *, leaf: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the part of the runs in the gradient of attention over the runs and other keys.

    Args:
        grad_out: `[batch, query_heads, n, d_v]`, the gradient of `out`.
        query: as for `leaf_forward`.
        key: as for `leaf_forward`.
        value: as for `leaf_forward`.
        out: `[batch, query_heads, n, d_v]`, the output of attention over all keys of a row, those
            of its run and the others.
        lse: `[batch, query_heads, n]`, its log normaliser.
        leaf: as for `leaf_forward`.
        scale: as for `leaf_forward`.

    Returns:
        Gradients in the shapes of `query`, `key` and `value`. That in `query` lacks what the
        other keys add to it. A gradient of `lse` is not taken into account.
    """
    with torch.no_grad(), without_autocast(query):
        positive, factor = with_positive_scale(query, scale)
        parts = []
        for runs in _runs_of(query, key, value, leaf):
            given = (runs.view(x) for x in (grad_out, positive, key, value, out, lse))
            grads = fused_kernels.backward(*given, scale=factor, is_causal=True)
            parts.append([runs.back(grad) for grad in grads])
        grad_q, grad_k, grad_v = (_joined(grads) for grads in zip(*parts, strict=True))
        if scale <= 0:
            grad_q = -grad_q if scale < 0 else torch.zeros_like(grad_q)
    return grad_q, grad_k, grad_v


_Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _by_runs(
    attend: _Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, leaf: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    outs, lses = [], []
    for runs in _runs_of(query, key, value, leaf):
        given = (runs.view(x) for x in (query, key, value))
        out, lse = attend(*given, scale=scale, is_causal=True)
        outs.append(runs.back(out))
        lses.append(runs.back(lse))
    return _joined(outs), _joined(lses)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)


@dataclass(frozen=True)
class _Runs:
    """Neighbouring runs of equal length, and how one call takes them: as heads or as batch."""

    start: int
    stop: int
    num_runs: int
    batch: int
    as_heads: bool

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Turn `[batch, heads, n, ...]` into the argument of the call, `[., ., leaf, ...]`."""
        tensor = tensor[:, :, self.start : self.stop]
        if self.num_runs == 1:
            return tensor
        tensor = tensor.unflatten(2, (self.num_runs, -1))
        return (tensor if self.as_heads else tensor.transpose(1, 2)).flatten(0, 1)

    def back(self, tensor: torch.Tensor) -> torch.Tensor:
        """Turn a result of the call into `[batch, heads, stop - start, ...]`."""
        if self.num_runs == 1:
            return tensor
        tensor = tensor.unflatten(0, (self.batch, -1))
        return (tensor if self.as_heads else tensor.transpose(1, 2)).flatten(2, 3)


def _runs_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, leaf: int
) -> tuple[_Runs, ...]:
    batch, heads, rows = query.shape[:3]
    # heads that lie side by side make the batch, and their runs the heads; else, or where groups
    # of heads have to stay together, runs make the batch: a view if rows lie side by side or if
    # the batch has one entry
    as_heads = heads == key.shape[1] and all(x.is_contiguous() for x in (query, key, value))
    whole = rows - rows % leaf
    runs = []
    if whole:
        runs.append(_Runs(0, whole, whole // leaf, batch, as_heads))
    if whole < rows or not rows:
        runs.append(_Runs(whole, rows, 1, batch, as_heads))
    return tuple(runs)


def _run_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    with without_autocast(query):
        out, lse = fused_kernels.forward(query, key, value, scale=scale, is_causal=is_causal)
        like = _like_out(query, value, "meta")
        return fused_kernels.in_layout_of(like, out), lse.contiguous()


def _forward_shapes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _like_out(query, value, None), query.new_empty(query.shape[:3], dtype=dtype)


def _like_out(query: torch.Tensor, value: torch.Tensor, device: str | None) -> torch.Tensor:
    if query.shape[-1] == value.shape[-1]:
        return torch.empty_like(query, device=device)
    return query.new_empty((*query.shape[:3], value.shape[-1]), device=device)


def _run_backward(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, grad_lse: torch.Tensor | None, scale: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    inputs = (query, key, value)
    with without_autocast(query):
        grads = fused_kernels.backward(
            grad_out, *inputs, out, lse, grad_lse, scale=scale, is_causal=is_causal
        )
        pairs = zip(inputs, grads, strict=True)
        grad_q, grad_k, grad_v = (fused_kernels.in_layout_of(x, grad) for x, grad in pairs)
    return grad_q, grad_k, grad_v


def _backward_shapes(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, grad_lse: torch.Tensor | None, scale: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    query, key, value, ctx.scale, ctx.is_causal = inputs
    ctx.save_for_backward(query, key, value, *output)
    # without a gradient of lse the backward needs no column for it
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    query, key, value, out, lse = ctx.saved_tensors
    if grad_out is None:
        if grad_lse is None:
            return None, None, None, None, None
        grad_out = torch.zeros_like(out)
    grads = torch.ops.hyperframe.fused_attention_backward(
        grad_out, query, key, value, out, lse, grad_lse, ctx.scale, ctx.is_causal
    )
    return (*grads, None, None)


def _refuse(ctx: Any, *grads: torch.Tensor | None) -> None:
    raise UnsupportedError(
        "double backward: a gradient of a gradient was asked for, and PyTorch's fused kernels, "
        "which compute exact attention here, have none; approximate plans of the torch backend "
        "have (min_seq_len=0 with causal='single_pass'), as does scaled_dot_product_attention "
        "under sdpa_kernel(SDPBackend.MATH)"
    )


_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define(
    "hyperframe::fused_attention",
    "(Tensor query, Tensor key, Tensor value, float scale, bool is_causal) -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "hyperframe::fused_attention_backward",
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,"
    " Tensor? grad_lse, float scale, bool is_causal) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.impl("hyperframe::fused_attention", "default", _run_forward)
torch.library.impl("hyperframe::fused_attention_backward", "default", _run_backward)
torch.library.register_fake("hyperframe::fused_attention", _forward_shapes)
torch.library.register_fake("hyperframe::fused_attention_backward", _backward_shapes)
torch.library.register_autograd("hyperframe::fused_attention", _differentiate, setup_context=_keep)
torch.library.register_autograd("hyperframe::fused_attention_backward", _refuse)
