"""The attention function that transformers calls: one layer of one forward pass.

A *route* hangs on each attention module of a model (an attribute, so that models never share
state): which layer it is, whether it is approximated, and the settings of its model. A module
without a route, for example the other stack of an encoder-decoder, gets exact attention.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..randomness import Stream, fold_in
from ._exact import dense_attention, exact_attention
from ._transformers_rows import RowGroup, RowMemory, packed_rows

__all__ = ["AttentionCall", "Route", "Settings", "hyperframe_attention"]

ROUTE_ATTRIBUTE = "_hyperframe_route"

#: arguments that change what attention computes, none of which is implemented here
_REFUSED = {
    "softcap": "logits are squashed before the softmax, which no kernel here does",
    "s_aux": "attention sinks with their own logit are not part of the softmax here",
    "sinks": "attention sinks with their own logit are not part of the softmax here",
    "position_bias": "a bias per query and key would need the full attention matrix",
    "cache": "a paged cache (continuous batching) is not supported",
    "head_mask": "attention weights are never formed, so heads cannot be masked",
    "indices": "the model selects its own keys",
    "block_indices": "the model selects its own keys",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """What one attention call was and how long it took; given to the `observer` of `apply`.

    Attributes:
        layer_idx: the layer.
        n_q: number of queries.
        n_k: number of keys (real ones; the unused tail of a static cache counts only in decode).
        exact: True when the layer was left exact, or decodes one token. An approximated call that
            falls below its own `min_seq_len` counts as approximated.
        seconds: wall time of the attention alone; on a GPU the device is synchronised before and
            after.
    """

    layer_idx: int
    n_q: int
    n_k: int
    exact: bool
    seconds: float


@dataclasses.dataclass(kw_only=True)
class Settings:
    """What the layers of one `apply` share."""

    attention: Callable[..., Tensor]
    observer: Callable[[AttentionCall], None] | None = None
    rows: RowMemory = dataclasses.field(default_factory=RowMemory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """How one attention module is served."""

    layer_idx: int
    approximate: bool
    settings: Settings


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

    Raises:
        UnsupportedError: for dropout, softcap, sinks, biases, paged caches, sliding windows shorter
            than the keys, 4-D masks on an approximated layer, requested attention weights.
    """
    route: Route | None = getattr(module, ROUTE_ATTRIBUTE, None)
    layer = route.layer_idx if route is not None else getattr(module, "layer_idx", None)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else bool(is_causal)
    _refuse(layer, dropout, kwargs)
    approximate = route is not None and route.approximate and query.shape[2] > 1
    if attention_mask is not None and attention_mask.dim() == 2:
        key, value = _cut_to_mask(layer, key, value, attention_mask)
    n_q, n_k = query.shape[2], key.shape[2]
    _refuse_patterns(layer, approximate, attention_mask, kwargs.get("sliding_window"), n_k)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, start: int, row: int
    ) -> Tensor:
        if route is None or not approximate or q.shape[2] == 1:
            return exact_attention(q, k, v, is_causal=causal, scale=scaling, key_padding_mask=real)
        generator = _source(module, route, query.device, n_k, start, row)
        return route.settings.attention(
            q,
            k,
            v,
            is_causal=causal,
            scale=scaling,
            key_padding_mask=real,
            generator=generator,
        )

    observer = route.settings.observer if route is not None else None
    started = _clock(query) if observer is not None else 0.0
    if attention_mask is not None and attention_mask.dim() != 2:
        out = dense_attention(query, key, value, attention_mask, scaling)
    else:
        groups = None
        if causal and n_q > 1:
            memory = route.settings.rows if route is not None else RowMemory()
            positions = _positions(layer, attention_mask, kwargs)
            groups = packed_rows(memory, attention_mask, n_q, n_k, query.shape[0], positions)
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


def _refuse(layer: int | None, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout > 0.0:
        raise UnsupportedError(
            f"layer {layer} asks for dropout={dropout}: attention weights are never formed, so "
            "they cannot be dropped. Set the model's attention dropout to 0 or call model.eval()."
        )
    for name, why in _REFUSED.items():
        if kwargs.get(name) is not None:
            shown = kwargs[name] if isinstance(kwargs[name], int | float) else "a tensor or object"
            raise UnsupportedError(
                f"layer {layer} asks for {name} ({shown}): {why}. Use another attention "
                "implementation for this model, for example "
                'model.set_attn_implementation("eager").'
            )
    if kwargs.get("output_attentions"):
        raise UnsupportedError(
            f"layer {layer} asks for output_attentions=True: attention weights are never formed. "
            'Leave it out, or look at the weights with model.set_attn_implementation("eager").'
        )


def _refuse_patterns(
    layer: int | None, approximate: bool, mask: Tensor | None, window: int | None, n_k: int
) -> None:
    """Refuses masks per query and key on approximated layers, and windows that no mask holds."""
    patterned = mask is not None and mask.dim() != 2
    if patterned and approximate and mask is not None:
        raise UnsupportedError(
            f"layer {layer} was given an attention_mask of shape {tuple(mask.shape)}: a pattern "
            "per query and key (a 4-D mask of the caller, sliding_window or chunks shorter "
            f"than the {n_k} keys, a model's own overlay) cannot be approximated. Pass a 2-D "
            "padding mask, or leave this layer exact: apply(model, layers=[...])."
        )
    if window is not None and window < n_k and not patterned:
        raise UnsupportedError(
            f"layer {layer} asks for sliding_window={window}, shorter than its {n_k} keys, and no "
            "mask says so. Use inputs no longer than the window, or another attention "
            "implementation for this model."
        )


def _cut_to_mask(
    layer: int | None, key: Tensor, value: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Drops the unused tail of a static cache: the mask ends with the last real position."""
    width, n_k = mask.shape[-1], key.shape[2]
    if width > n_k:
        raise UnsupportedError(
            f"layer {layer} was given attention_mask of width {width} for {n_k} keys: it is not "
            "known which keys it speaks of. Pass a mask with one entry per key."
        )
    if mask.dtype not in (torch.bool, torch.int32):
        raise UnsupportedError(
            f"layer {layer} was given a 2-D attention_mask of dtype {mask.dtype}: this model does "
            "not build its mask through transformers' mask interface. Pass a bool mask, True = "
            "real key."
        )
    return (key, value) if width == n_k else (key[:, :, :width], value[:, :, :width])


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


def _source(
    module: nn.Module, route: Route, device: torch.device, n_k: int, start: int, row: int
) -> torch.Generator | Stream:
    """The random numbers of one call: its own for each layer, chunk and packed sequence.

    `row` is the first row of a group of rows that are packed alike, 0 where nothing is packed.

    In eval mode they depend on the seed of the attention alone. In training, or with seed None,
    fresh entropy comes from torch's global CPU generator, which `torch.utils.checkpoint` restores
    when it recomputes a forward.
    """
    attention = route.settings.attention
    seed = getattr(attention, "seed", 0)
    entropy = 0
    # not `and torch.is_grad_enabled()`: reentrant checkpointing runs its first forward without
    # gradients and has to draw the same number there
    if module.training or seed is None:
        entropy = int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu"))
    place = (start, row) if row else (start,)
    mixed = fold_in(seed or 0, entropy, route.layer_idx, n_k, *place)
    if getattr(attention, "takes_stream", False):
        return Stream(mixed)
    return torch.Generator(device=device).manual_seed(mixed)


def _clock(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
