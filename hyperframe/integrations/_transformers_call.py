"""The attention function that transformers calls: one layer of one forward pass.

A *route* hangs on each attention module of a model (an attribute, so that models never share
state): which layer it is, what serves its heads, and the settings of its model. A module
without a route, for example the other stack of an encoder-decoder, gets exact attention.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ._transformers_layers import window_of
from ._transformers_refusals import cut_to_mask, refuse_arguments, refuse_patterns
from ._transformers_routes import (
    ROUTE_ATTRIBUTE,
    AttentionCall,
    HeadPart,
    Route,
    Settings,
    by_heads,
    source,
)
from ._transformers_rows import RowGroup, packed_rows, within_pieces
from .exact import dense_attention, exact_attention

__all__ = ["hyperframe_attention"]


def hyperframe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Serves one attention layer; registered with transformers' `AttentionInterface`.

    Args:
        module: the attention module that calls.
        query: `[batch, heads, n_q, d]`.
        key: `[batch, kv_heads, n_k, d]`, not repeated for grouped queries.
        value: `[batch, kv_heads, n_k, d_v]`.
        attention_mask: what `hyperframe_mask` built, or a caller's 4-D mask.
        dropout: must be 0 in training.
        scaling: factor of the logits, None for `d ** -0.5`.
        is_causal: None reads `module.is_causal`.
        **kwargs: what else the model passes; `position_ids` that start again cut packed rows.

    Returns:
        `([batch, n_q, heads, d_v], None)`: the weights are never formed.

    Where a sliding window or chunk of the layer is shorter than the keys, the layer is computed
    exactly, with its window.

    Raises:
        UnsupportedError: for dropout, softcap, sinks, biases, paged caches, a window that no mask
            holds, 4-D masks on an approximated layer, requested attention weights.
    """
    route: Route | None = getattr(module, ROUTE_ATTRIBUTE, None)
    layer = route.layer_idx if route is not None else getattr(module, "layer_idx", None)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else bool(is_causal)
    refuse_arguments(layer, dropout, kwargs)
    if attention_mask is not None and attention_mask.dim() == 2:
        key, value = cut_to_mask(layer, key, value, attention_mask)
    n_q, n_k = query.shape[2], key.shape[2]
    window = kwargs.get("sliding_window") or window_of(module)
    binds = window is not None and window < n_k
    approximate = route is not None and route.approximate and n_q > 1
    if approximate and binds and attention_mask is not None and attention_mask.dim() != 2:
        # the mask holds the window, and the caller's padding
        assert route is not None
        route.settings.left_exact[route.layer_idx] = (
            f"its window of {window} keys is shorter than the {n_k} keys of the call"
        )
        approximate = False
    refuse_patterns(layer, approximate, attention_mask, kwargs.get("sliding_window"), n_k)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, start: int, row: int
    ) -> Tensor:
        common: dict[str, Any] = {"is_causal": causal, "scale": scaling, "key_padding_mask": real}
        if route is None or not approximate or q.shape[2] == 1:
            return exact_attention(q, k, v, **common)

        def attend_part(part: HeadPart, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if part.attention is None:
                return exact_attention(q, k, v, **common)
            drawn = source(module, route, part, query.device, n_k, start, row)
            return part.attention(q, k, v, generator=drawn, **common)

        return by_heads(attend_part, route.parts, q, k, v)

    observer = route.settings.observer if route is not None else None
    started = _clock(query) if observer is not None else 0.0
    patterned = attention_mask is not None and attention_mask.dim() != 2
    groups = None
    # a caller's own pattern says all there is to say, one of a window nothing of packed sequences
    if causal and n_q > 1 and (not patterned or (binds and _is_bool(attention_mask))):
        settings = route.settings if route is not None else Settings()
        memory = settings.windowed_rows if patterned else settings.rows
        positions = _positions(layer, attention_mask, kwargs)
        groups = packed_rows(memory, attention_mask, n_q, n_k, query.shape[0], positions)
    if attention_mask is not None and patterned:
        pattern = attention_mask if groups is None else within_pieces(attention_mask, groups)
        out = dense_attention(query, key, value, pattern, scaling)
    else:
        numbered = attention_mask is not None and attention_mask.dtype == torch.int32
        out = _by_rows(attend, groups, query, key, value, None if numbered else attention_mask)
    if observer is not None and route is not None:
        observer(
            AttentionCall(
                layer_idx=route.layer_idx,
                n_q=n_q,
                n_k=n_k,
                exact=not approximate,
                seconds=_clock(query) - started,
            )
        )
    return out.transpose(1, 2).contiguous(), None


def _is_bool(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.bool


def _positions(layer: int | None, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
    """The positions that tell packed sequences apart; other descriptions of them are refused."""
    positions: Tensor | None = kwargs.get("position_ids")
    if positions is None and mask is None and kwargs.get("cu_seq_lens_q") is not None:
        raise UnsupportedError(
            f"layer {layer} was given cu_seq_lens_q without position_ids: packed sequences are "
            "told apart by position_ids that start again. Pass position_ids [batch, n] as well."
        )
    return positions


def _by_rows(
    attend: Callable[..., Tensor],
    groups: list[RowGroup] | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
) -> Tensor:
    """Attention of the whole batch, with packed rows cut into their sequences."""
    if groups is None:
        return attend(query, key, value, real, 0, 0)
    whole = query.new_zeros(*query.shape[:3], value.shape[-1])
    for rows, pieces in groups:
        index = torch.tensor(rows, device=query.device)
        q, k, v = query[index], key[index], value[index]
        mask = None if real is None else real[index]
        outs = [
            attend(
                q[:, :, start:stop],
                k[:, :, start:stop],
                v[:, :, start:stop],
                None if mask is None else mask[:, start:stop],
                start,
                rows[0],
            )
            for start, stop in pieces
        ]
        whole = whole.index_copy(0, index, torch.cat(outs, dim=2))
    return whole


def _clock(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
