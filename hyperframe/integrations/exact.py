"""Exact attention with padding, for the layers of a model that are not approximated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.exact import exact_output

__all__ = ["dense_attention", "exact_attention"]


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    generator: object = None,
) -> Tensor:
    """Exact attention through PyTorch's SDPA, with the meaning that `HyperAttention` has.

    Args:
        query: `[batch, heads, n_q, d]`.
        key: `[batch, kv_heads, n_k, d]` with `heads % kv_heads == 0`.
        value: `[batch, kv_heads, n_k, d_v]`.
        is_causal: bottom-right aligned: the last query sees every key.
        scale: factor of the logits, None for `d ** -0.5`.
        key_padding_mask: bool `[batch, n_k]`, True = real key.
        generator: not used; there so that both kinds of layer are called alike.

    Returns:
        `[batch, heads, n_q, d_v]`; a row without any key is 0.

    Cost: O(n_q n_k d) time. Memory O(n_q + n_k) without padding, O(batch n_q n_k) booleans with it.

    Example:
        >>> import torch
        >>> q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
        >>> exact_attention(q, k, k, is_causal=True).shape
        torch.Size([1, 4, 3, 8])
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if key_padding_mask is None:
        return exact_output(query, key, value, scale=scale, is_causal=is_causal)
    mask = key_padding_mask[:, None, None, :]
    n_q, n_k = query.shape[2], key.shape[2]
    if is_causal and n_q > 1:
        mask = mask & torch.ones(n_q, n_k, dtype=torch.bool, device=query.device).tril(n_k - n_q)
    return dense_attention(query, key, value, mask, scale)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None
) -> Tensor:
    """SDPA under a mask `[batch, heads, n_q, n_k]`, boolean (True = attend) or additive.

    The first three dimensions of the mask may be 1.

    Rows that a boolean mask leaves without any key return 0. Cost: O(n_q n_k d) time.
    """
    group = query.shape[1] // key.shape[1]
    if group > 1:
        # SDPA's fused kernels take a mask, or grouped heads, but not both
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    sdpa = nn.functional.scaled_dot_product_attention
    if mask.dtype != torch.bool:
        return sdpa(query, key, value, attn_mask=mask, scale=scale)
    empty = ~mask.any(-1, keepdim=True)
    # kernels differ in what an empty row returns, and a nan would spread through the next layer
    out = sdpa(query, key, value, attn_mask=mask | empty, scale=scale)
    return out.masked_fill(empty, 0.0)
