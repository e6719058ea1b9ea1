"""Errors of an attention output against exact attention."""

from __future__ import annotations

import torch

from ..errors import ArgumentError
from ..kernels.exact import exact_output
from ..validation import check_inputs, check_scale

__all__ = ["exact_for", "relative_error"]


def relative_error(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, *,
    scale: float | None = None, is_causal: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Return `||out - Att V||_F / ||Att V||_F` of every head.

    Exact attention is computed in float32 at least, without a matrix of scores.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        value: `[batch, key_heads, n_k, d_v]`.
        out: `[batch, query_heads, n_q, d_v]`, the output to judge.
        scale: factor of the logits; None is `1 / sqrt(d)`.
        is_causal: bottom-right aligned causality.

    Returns:
        Floating point `[batch, query_heads]`.

    Cost: one exact attention, O(n_q n_k d).

    Example:
        >>> q = k = v = torch.ones(1, 1, 4, 2)
        >>> relative_error(q, k, v, torch.zeros(1, 1, 4, 2)).item()
        1.0
    """
    query, key, value = check_inputs(query, key, value)
    dtype = torch.promote_types(query.dtype, torch.float32)
    exact = exact_for(query, key, value, out, scale=scale, is_causal=is_causal, dtype=dtype)
    difference = (out.to(dtype) - exact).flatten(2).norm(dim=-1)
    error: torch.Tensor = difference / exact.flatten(2).norm(dim=-1)
    return error


def exact_for(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, *,
    scale: float | None, is_causal: bool, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Return exact attention in a dtype, for an output to be judged by; refuse other shapes."""
    exact = exact_output(
        query.to(dtype), key.to(dtype), value.to(dtype),
        scale=check_scale(scale, query.shape[-1]), is_causal=is_causal,
    )  # fmt: skip
    if out.shape != exact.shape:
        raise ArgumentError(
            f"out: shape {tuple(out.shape)} is not that of the attention output, "
            f"{tuple(exact.shape)} [batch, query_heads, n_q, d_v]; pass the output of the same call"
        )
    return exact
