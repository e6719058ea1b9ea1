"""Heads of a model by its name, on a text or an image: what `hyperframe capture` does.

A folder that `save_pretrained` wrote is as good as a name on the hub:

>>> import tempfile
>>> from transformers import ViTConfig, ViTModel
>>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
...                    intermediate_size=64, image_size=32, patch_size=8)
>>> with tempfile.TemporaryDirectory() as folder:
...     ViTModel(config).save_pretrained(folder)
...     heads, about = capture_model(folder, image="random", layers="last:1")
>>> {layer: (tuple(of_layer.query.shape), of_layer.is_causal) for layer, of_layer in heads.items()}
{1: ((1, 2, 17, 16), False)}
>>> about["model_class"], about["heads"]
('ViTModel', [0, 1])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..component import check_positive_int
from ..errors import ArgumentError, HyperframeError
from ._capture_inputs import RANDOM, image_inputs, kind_of, load_model, text_inputs
from ._model_files import load_config
from .capture import CapturedHeads, capture

__all__ = ["RANDOM", "capture_model", "choose_heads", "summary"]


def capture_model(
    model: str, *, text: str | None = None, image: str | None = None,
    layers: str | Iterable[int] = "all", length: int | None = None,
    heads: Sequence[int] | None = None, is_causal: bool | None = None, gguf: str | None = None,
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[dict[int, CapturedHeads], dict[str, Any]]:  # fmt: skip
    """Load a model, run it once, exactly, and keep what its attention layers got.

    Args:
        model: a folder, a GGUF file, a name on the hub, or "smollm2": a decoder or encoder of
            text, or a vision transformer.
        text: what a model of text reads.
        image: what a vision transformer sees: a file, or "random".
        layers: "all", "first:4", "last:8", or layer indices; negative ones count from the end.
        length: tokens; None takes those of the text, up to 4,096 and to the model's positions.
        heads: query heads, by index; None takes all. See `choose_heads`.
        is_causal: what is written of the mask, to measure the same queries and keys under the
            other one; None writes what the model does. The model itself always attends as it does.
        gguf: name of a GGUF file in the folder.
        device: where the model runs; the heads are kept on the CPU.
        dtype: of weights and heads.
        seed: of random pixels.

    Returns:
        The heads by layer, and what they are, in values of JSON: `model`, `model_class`, `length`,
        `heads`.

    Raises:
        ArgumentError: a model, text, image, length, layer or head that cannot be had.
        UnsupportedError: a model of several stacks, or one whose attention cannot be routed.

    Cost: one exact forward of the layers, without the logits of a language model.
    """
    if length is not None:
        check_positive_int("capture", "length", length)
    config = load_config(model, gguf=gguf)
    kind = kind_of(config)
    given = {"text": text, "image": image}
    if given.pop(kind) is None or any(value is not None for value in given.values()):
        raise ArgumentError(
            f"{model}: {type(config).__name__} reads {kind}; pass --{kind} and nothing else"
        )
    if kind == "image" and length is not None:
        raise ArgumentError(
            f"--length {length}: the number of patches of {type(config).__name__} follows from the "
            "size of its images; leave the option out"
        )
    if text is not None:
        inputs = text_inputs(model, config, text, length=length, gguf=gguf)
    else:
        inputs = image_inputs(model, config, str(image), seed=seed)
    stack = load_model(model, gguf=gguf, device=device, dtype=dtype)
    ready: dict[str, Any] = {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    try:
        found = capture(stack, layers, **ready)
    except (HyperframeError, torch.OutOfMemoryError):
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        shape = tuple(next(iter(inputs.values())).shape)
        raise ArgumentError(
            f"{model}: {type(stack).__name__} cannot run on inputs of shape {shape}: "
            f"{type(error).__name__}: {error}; pass a shorter text, or an image of its size"
        ) from error
    some = next(iter(found.values()), None)
    if some is None:
        raise ArgumentError(f"--layers {layers}: names no layer; name one at least")
    chosen = list(range(some.query.shape[1])) if heads is None else list(heads)
    return {
        layer: choose_heads(of_layer, chosen, is_causal=is_causal)
        for layer, of_layer in found.items()
    }, {
        "model": model, "model_class": type(stack).__name__, "length": some.query.shape[2],
        "heads": chosen,
    }  # fmt: skip


def choose_heads(
    of_layer: CapturedHeads, heads: Sequence[int], *, is_causal: bool | None = None
) -> CapturedHeads:
    """Return some query heads of a layer, with the keys and values they use.

    Where these are whole groups in their order, keys are kept once for each group, and otherwise
    once for each query head.

    Args:
        of_layer: the layer.
        heads: indices of query heads; the result has them in this order.
        is_causal: replaces that of the layer; None keeps it.

    Raises:
        ArgumentError: no heads, one twice, or one that the layer has not; or a causal mask where
            queries and keys differ in number.
    """
    total, num_key_heads = of_layer.query.shape[1], of_layer.key.shape[1]
    wrong = [head for head in heads if not 0 <= head < total]
    if wrong or not heads or len(set(heads)) < len(heads):
        shown = ",".join(map(str, heads))
        raise ArgumentError(
            f"--heads {shown}: layer {of_layer.layer_idx} has the {total} query heads 0 to "
            f"{total - 1}; name some of them, each once"
        )
    group = total // num_key_heads
    key_heads = [head // group for head in heads]
    starts = key_heads[::group]
    if list(heads) == [first * group + i for first in starts for i in range(group)]:
        key_heads = starts
    if is_causal is None:
        is_causal = of_layer.is_causal
    return dataclasses.replace(
        of_layer, query=of_layer.query[:, list(heads)], key=of_layer.key[:, key_heads],
        value=of_layer.value[:, key_heads], is_causal=is_causal,
    )  # fmt: skip


def summary(heads: Mapping[int, CapturedHeads], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was captured, in values of JSON: `about`, and the shapes of every layer."""
    layers = [
        {
            "layer": layer, "query": list(of_layer.query.shape), "key": list(of_layer.key.shape),
            "value": list(of_layer.value.shape), "scale": of_layer.scale,
            "is_causal": of_layer.is_causal,
            "dtype": str(of_layer.query.dtype).removeprefix("torch."),
        }
        for layer, of_layer in heads.items()
    ]  # fmt: skip
    return {**about, "layers": layers}
