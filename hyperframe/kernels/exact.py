"""Exact attention with its log normaliser, through the fastest kernel the device has.

`exact_attention` is what every approximation is compared with, what runs below `min_seq_len`, and
what computes the diagonal blocks of the causal recursion. It never forms the score matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..plan import TilePlan
from ..precision import without_autocast
from ..state import AttentionState, merge
from . import torch_backend
from .fused_exact import exact_runs, fused_attention, is_fusable, with_positive_scale

__all__ = ["exact_attention", "exact_leaves", "exact_output", "full_plan"]

_SCORES_FOR_CUDNN = 1 << 27
"""Query-key pairs of all heads from which a kernel's speed counts more than a slower call."""


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
    query, scale = with_positive_scale(query, scale)
    num_queries, num_keys = query.shape[2], key.shape[2]
    is_causal = is_causal and num_queries > 1
    if is_causal and num_queries > num_keys:
        # the first rows come before every key
        rest = _exact_output(query[:, :, num_queries - num_keys :], key, value, scale, True)
        return F.pad(rest, (0, 0, num_queries - num_keys, 0))
    if is_causal and num_queries < num_keys and is_fusable(query):
        # a mask of this shape would be written out
        return exact_attention(query, key, value, scale=scale, is_causal=True).out
    if _is_for_cudnn(query, key, value):
        return fused_attention(query, key, value, scale=scale, is_causal=is_causal)[0]
    grouped = query.shape[1] != key.shape[1]
    if not is_causal or num_queries == num_keys:
        return F.scaled_dot_product_attention(
            query, key, value, scale=scale, is_causal=is_causal, enable_gqa=grouped
        )
    if grouped:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    # imported here: it loads torch's compiler, which takes a second
    from torch.nn.attention.bias import causal_lower_right

    bias = causal_lower_right(num_queries, num_keys)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def _is_for_cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether cuDNN's kernel is likely the fastest, though PyTorch may prefer flash."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    batch, heads, num_queries, head_dim = query.shape
    if max(head_dim, value.shape[-1]) > 128:
        return False
    return batch * heads * num_queries * key.shape[2] >= _SCORES_FOR_CUDNN


def exact_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float,
    is_causal: bool = False,
) -> AttentionState:  # fmt: skip
    """Return exact attention and its log normaliser, differentiable through both.

    Args: as `exact_output`.

    Returns:
        The state; `lse` in float32 (float64 for float64 input). Computed by PyTorch's fused
        kernels, or by the torch backend for float64 on CUDA and on other devices.
    """
    query, scale = with_positive_scale(query, scale)
    num_queries, num_keys = query.shape[2], key.shape[2]
    num_before = num_keys - num_queries
    if not is_fusable(query):
        plan = full_plan(query, key, is_causal=is_causal)
        return torch_backend.attend(query, key, value, plan, scale=scale)
    if not is_causal or num_queries == 1:
        return AttentionState(*fused_attention(query, key, value, scale=scale, is_causal=False))
    if num_before < 0:
        # the first rows come before every key
        rest = exact_attention(query[:, :, -num_before:], key, value, scale=scale, is_causal=True)
        return AttentionState(
            out=F.pad(rest.out, (0, 0, -num_before, 0)),
            lse=F.pad(rest.lse, (-num_before, 0), value=float("-inf")),
        )
    if num_before == 0:
        return AttentionState(*fused_attention(query, key, value, scale=scale, is_causal=True))
    # kernels align their triangle top left: keys before the first query stand apart
    (key_before, key), (value_before, value) = (
        x.split([num_before, num_queries], dim=2) for x in (key, value)
    )
    before = fused_attention(query, key_before, value_before, scale=scale, is_causal=False)
    own = fused_attention(query, key, value, scale=scale, is_causal=True)
    return merge(AttentionState(*before), AttentionState(*own))


def exact_leaves(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, leaf: int, scale: float
) -> AttentionState:
    """Attend causally inside consecutive runs of `leaf` rows; the last may be shorter.

    Args: as `exact_output`, with `n_q == n_k`.

    Returns:
        The state, differentiable through both parts. One call of a kernel for all full runs.
    """
    query, scale = with_positive_scale(query, scale)
    if is_fusable(query):
        return AttentionState(*exact_runs(query, key, value, leaf=leaf, scale=scale))
    runs = zip(*(x.split(leaf, dim=2) for x in (query, key, value)), strict=True)
    states = [exact_attention(q, k, v, scale=scale, is_causal=True) for q, k, v in runs]
    return AttentionState(
        out=torch.cat([state.out for state in states], dim=2),
        lse=torch.cat([state.lse for state in states], dim=2),
    )


def full_plan(query: torch.Tensor, key: torch.Tensor, *, is_causal: bool) -> TilePlan:
    """Return the plan that holds every key exactly; one list, shared by all rows."""
    batch, heads, num_keys = key.shape[:3]
    index = torch.arange(num_keys, dtype=torch.int32, device=key.device)
    count = torch.full((), num_keys, dtype=torch.int32, device=key.device).expand(batch, heads, 1)
    return TilePlan(
        key_index=index.expand(batch, heads, 1, -1), key_count=count, heavy_count=count,
        tile_size=query.shape[2], num_query_heads=query.shape[1], num_queries=query.shape[2],
        num_keys=num_keys, is_causal=is_causal, disjoint=True,
    )  # fmt: skip
