"""What transformers says about masks, in the forms that the attention function understands.

transformers builds one mask a forward pass, for all layers, through a registered *mask function*.
Ours never materialises an n x n mask for the patterns that near-linear attention supports:

* `None`: every key is real; causality is the attention module's own flag;
* bool `[batch, n_k]`: True where a key is real (padding, or the unused tail of a static cache);
* int32 `[batch, n_k]`: several sequences packed into a row, numbered; no padding;
* bool `[batch, 1, n_q, n_k]`: any other pattern, as the "sdpa" implementation would see it. Layers
  that stay exact honour it, approximated ones refuse it by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import MissingDependencyError

__all__ = ["hyperframe_mask", "transformers_library"]

try:
    transformers_library: Any = importlib.import_module("transformers")
    _masking: Any = importlib.import_module("transformers.masking_utils")
    _ = transformers_library.AttentionInterface, transformers_library.AttentionMaskInterface
except (ImportError, AttributeError) as error:
    raise MissingDependencyError(
        "hyperframe.integrations.transformers needs transformers 5 or later: "
        f"pip install 'hyperframe-attention[hf]' ({type(error).__name__}: {error})"
    ) from error


def hyperframe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Builds the mask of one forward pass; registered with transformers' `AttentionMaskInterface`.

    Args:
        batch_size: rows of the batch.
        q_length: queries of this forward.
        kv_length: keys that the cache will return, with a static cache more than the real ones.
        q_offset: position of the first query, i.e. the number of tokens seen before; a static
            cache gives a tensor.
        kv_offset: position of the first key (sliding caches drop the oldest).
        mask_function: the pattern, a function of (batch, head, query, key) indices.
        attention_mask: bool `[batch, seen + q_length]`, True = real token, or None.
        local_size: window or chunk length of a local pattern.
        use_vmap: True when the pattern holds a caller's own overlay.
        allow_is_causal_skip: False when a causal mask has to be materialised.
        allow_is_bidirectional_skip: the same for a non-causal one.
        **kwargs: the rest of transformers' arguments (`device`, `dtype`, `config`).

    Returns:
        One of the forms listed in the module's docstring.

    Cost: O(batch * n_k) time and memory, except for the fourth form, which takes O(n_q * n_k).
    Reading whether the mask is all ones synchronises with the device, once a forward.
    """
    causal = mask_function is None or mask_function is _masking.causal_mask_function
    bidirectional = mask_function is _masking.bidirectional_mask_function
    is_local = local_size is not None and local_size < kv_length
    # chunks stand at multiples of their length, so they may part even the few keys that a cache of
    # the last ones returns; a window holds those all
    is_local |= local_size is not None and kv_offset > 0 and _has_chunks(mask_function)
    # and_masks without a caller's overlay: packed sequences, or a window that holds every key
    composed = not causal and not bidirectional and _is_and_masks(mask_function)
    plain = (causal and (allow_is_causal_skip or q_length == 1)) or composed
    supported = not is_local and not use_vmap and (plain or bidirectional)
    if bidirectional and not allow_is_bidirectional_skip:
        supported = False
    if not supported:
        mask: Tensor | None = _masking.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function or _masking.causal_mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            use_vmap=use_vmap,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            **kwargs,
        )
        return mask
    device = kwargs.get("device", "cpu")
    if composed and mask_function is not None and attention_mask is None and q_length == kv_length:
        return _packed_segments(mask_function, batch_size, q_length, device)
    if bidirectional:
        width = kv_length
    elif q_length == 1:
        # decode: keep the cache's fixed width, so that a compiled step keeps its shapes
        return _decode_mask(batch_size, kv_length, q_offset, kv_offset, attention_mask, device)
    else:
        width = min(kv_length, int(q_offset) + q_length - kv_offset)
    padding = None if attention_mask is None else _fit(attention_mask, kv_offset, width)
    if padding is None:
        if width == kv_length:
            return None
        return torch.ones(batch_size, width, dtype=torch.bool, device=device)
    return _unless_full(padding) if width == kv_length else padding


def _is_and_masks(mask_function: Callable[..., Tensor] | None) -> bool:
    return getattr(mask_function, "__qualname__", "").startswith("and_masks.")


def _has_chunks(mask_function: Callable[..., Tensor] | None) -> bool:
    cells = getattr(mask_function, "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells]
    functions = [part for item in held for part in (item if isinstance(item, tuple) else (item,))]
    names = (getattr(function, "__qualname__", "") for function in functions)
    return any(name.startswith("chunked_overlay.") for name in names)


def _unless_full(padding: Tensor) -> Tensor | None:
    """None when every key is real, which lets a kernel without masks run."""
    if torch.compiler.is_compiling() or not bool(padding.all()):
        return padding
    return None


def _fit(attention_mask: Tensor, kv_offset: int, width: int) -> Tensor:
    """Cuts or pads (with False) a bool mask to the keys `kv_offset .. kv_offset + width`."""
    cut = attention_mask[:, kv_offset : kv_offset + width]
    missing = width - cut.shape[-1]
    return torch.nn.functional.pad(cut, (0, missing)) if missing > 0 else cut


def _decode_mask(
    batch_size: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    attention_mask: Tensor | None,
    device: torch.device | str,
) -> Tensor | None:
    """The mask of one new token, over the cache's full width."""
    if not isinstance(q_offset, Tensor) and kv_length + kv_offset <= q_offset + 1:
        if attention_mask is None:
            return None
        return _unless_full(_fit(attention_mask, kv_offset, kv_length))
    filled = torch.arange(kv_length, device=device) + kv_offset <= q_offset
    filled = filled.expand(batch_size, kv_length)
    return filled if attention_mask is None else filled & _fit(attention_mask, kv_offset, kv_length)


def _packed_segments(
    mask_function: Callable[..., Tensor],
    batch_size: int,
    length: int,
    device: torch.device | str,
) -> Tensor | None:
    """Numbers the packed sequences of each row by asking whether a token sees the one before it."""
    if length < 2:
        return None
    batch = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros(1, 1, dtype=torch.int64, device=device)
    token = torch.arange(1, length, device=device)[None, :]
    linked = mask_function(batch, head, token, token - 1).expand(batch_size, length - 1)
    if bool(linked.all()):
        return None
    segments = (~linked).cumsum(-1, dtype=torch.int32)
    return torch.nn.functional.pad(segments, (1, 0))
