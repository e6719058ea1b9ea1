"""Queries, keys and values of real attention heads: what detectors are measured on.

A model runs once, exactly, and the inputs of its attention layers are kept:

>>> import torch
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4,
...                      num_key_value_heads=2, num_hidden_layers=3, vocab_size=100)
>>> model = LlamaForCausalLM(config).eval()
>>> heads = capture(model, "last:2", input_ids=torch.arange(50)[None])
>>> sorted(heads), tuple(heads[2].query.shape), tuple(heads[2].key.shape)
([1, 2], (1, 4, 50, 8), (1, 2, 50, 8))
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, UnsupportedError
from ..validation import check_inputs
from .exact import exact_attention
from .transformers import AttentionCall, apply

__all__ = ["CapturedHeads", "capture", "load", "load_about", "save"]

_FORMAT = "hyperframe heads 1"
_TENSORS = ("query", "key", "value")


@dataclass(frozen=True, kw_only=True, eq=False)
class CapturedHeads:
    """The inputs of one attention layer, as its attention function got them.

    Rotary positions are applied, grouped keys are not repeated.

    Args:
        layer_idx: the layer.
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        value: `[batch, key_heads, n_k, d_v]`.
        scale: factor of the logits.
        is_causal: whether rows see only keys at or before their own position.
    """

    layer_idx: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    is_causal: bool

    def __post_init__(self) -> None:
        """Check the shapes."""
        check_inputs(self.query, self.key, self.value)


def capture(
    model: nn.Module, layers: str | Iterable[int] = "all", *, device: torch.device | str = "cpu",
    **inputs: Any,
) -> dict[int, CapturedHeads]:  # fmt: skip
    """Run a transformers model once, exactly, and keep what its attention layers got.

    The model is left as it was, also where a `hyperframe.integrations.transformers.apply` was on.

    Args:
        model: as for `apply`.
        layers: "all", "first:4", "last:8", or layer indices; negative ones count from the end.
        device: where the captured tensors are kept.
        **inputs: what the model is called with, for example `input_ids=`. One sequence a batch
            row, without padding.

    Returns:
        The heads by layer, detached copies.

    Raises:
        UnsupportedError: the inputs are padded or packed, or the model cannot be routed.

    Cost: one exact forward; memory of the captured tensors.
    """
    kept: dict[int, CapturedHeads] = {}
    seen: list[dict[str, Any]] = []

    def record(
        query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float | None,
        key_padding_mask: Tensor | None, generator: object,
    ) -> Tensor:  # fmt: skip
        if key_padding_mask is not None:
            raise UnsupportedError(
                "capture: the inputs are padded; pass sequences of one length without padding"
            )
        tensors = {
            name: x.detach().to(device, copy=True)
            for name, x in zip(_TENSORS, (query, key, value), strict=True)
        }
        used = query.shape[-1] ** -0.5 if scale is None else scale
        seen.append({**tensors, "scale": used, "is_causal": is_causal})
        return exact_attention(query, key, value, is_causal=is_causal, scale=scale)

    def keep(call: AttentionCall) -> None:
        if call.layer_idx in kept or len(seen) > 1:
            raise UnsupportedError(
                f"capture: layer {call.layer_idx} attended more than once; pass one unpacked "
                "sequence a row, and a call that does not generate"
            )
        if seen:  # a chosen layer
            kept[call.layer_idx] = CapturedHeads(layer_idx=call.layer_idx, **seen.pop())

    with apply(model, layers, attention=record, observer=keep) as applied, torch.no_grad():
        model(**inputs)
    missing = sorted(set(applied.layers) - set(kept))
    if missing:
        raise ArgumentError(
            f"capture: the layers {missing} did not attend to more than one query; pass longer "
            "inputs"
        )
    return kept


def save(
    path: Path | str, heads: Mapping[int, CapturedHeads], *, about: Mapping[str, Any] | None = None
) -> None:
    """Write captured heads to a safetensors file.

    Args:
        path: the file; overwritten.
        heads: as `capture` returns them.
        about: what they are, in values of JSON; `load_about` reads it.
    """
    from safetensors.torch import save_file

    tensors = {
        f"{layer}.{name}": getattr(of_layer, name).contiguous()
        for layer, of_layer in heads.items()
        for name in _TENSORS
    }
    options = {
        str(layer): {"scale": of_layer.scale, "is_causal": of_layer.is_causal}
        for layer, of_layer in heads.items()
    }
    metadata = {"format": _FORMAT, "layers": json.dumps(options)}
    if about is not None:
        metadata["about"] = json.dumps(dict(about))
    save_file(tensors, path, metadata=metadata)


def load_about(path: Path | str) -> dict[str, Any]:
    """Return what `save` was told of the heads; nothing where it was told nothing.

    Args:
        path: the file.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        found: dict[str, Any] = json.loads((file.metadata() or {}).get("about", "{}"))
    return found


def load(path: Path | str, device: torch.device | str = "cpu") -> dict[int, CapturedHeads]:
    """Read what `save` wrote.

    Args:
        path: the file.
        device: where the tensors go.

    Raises:
        ArgumentError: the file holds something else.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt", device=str(device)) as file:
        about = file.metadata() or {}
        if about.get("format") != _FORMAT:
            raise ArgumentError(
                f"{path}: holds no captured heads (format {about.get('format')!r}); make it with "
                "hyperframe.integrations.capture.save"
            )
        return {
            int(layer): CapturedHeads(
                layer_idx=int(layer), **options,
                **{name: file.get_tensor(f"{layer}.{name}") for name in _TENSORS},
            )
            for layer, options in json.loads(about["layers"]).items()
        }  # fmt: skip
