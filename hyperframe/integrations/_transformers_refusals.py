"""What an attention call may ask for that is not done here: refused by name, never ignored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError

__all__ = ["cut_to_mask", "refuse_arguments", "refuse_patterns"]

#: arguments that change what attention computes, none of which is implemented here
_REFUSED = {
    "softcap": "logits are squashed before the softmax, which no kernel here does",
    "s_aux": "attention sinks with their own logit are not part of the softmax here",
    "sinks": "attention sinks with their own logit are not part of the softmax here",
    "position_bias": "a bias per query and key would need the full attention matrix",
    "alibi": "a bias per query and key would need the full attention matrix",
    "cache": "a paged cache (continuous batching) is not supported",
    "head_mask": "attention weights are never formed, so heads cannot be masked",
    "indices": "the model selects its own keys",
    "block_indices": "the model selects its own keys",
}


def refuse_arguments(layer: int | None, dropout: float, kwargs: dict[str, Any]) -> None:
    """Refuses what a model asks for by an argument."""
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


def refuse_patterns(
    layer: int | None, approximate: bool, mask: Tensor | None, window: int | None, n_k: int
) -> None:
    """Refuses masks per query and key on approximated layers, and windows that no mask holds."""
    patterned = mask is not None and mask.dim() != 2
    if patterned and approximate and mask is not None:
        raise UnsupportedError(
            f"layer {layer} was given an attention_mask of shape {tuple(mask.shape)}: a pattern "
            "per query and key (a 4-D mask of the caller, a model's own overlay over the "
            f"{n_k} keys) cannot be approximated. Pass a 2-D "
            "padding mask, or leave this layer exact: apply(model, layers=[...])."
        )
    if window is not None and window < n_k and not patterned:
        raise UnsupportedError(
            f"layer {layer} asks for sliding_window={window}, shorter than its {n_k} keys, and no "
            "mask says so. Use inputs no longer than the window, or another attention "
            "implementation for this model."
        )


def cut_to_mask(
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
