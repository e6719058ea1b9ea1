"""What the loss of a model says of its attention layers: one forward and one backward pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError, UnsupportedError
from ..integrations.exact import exact_attention
from ..integrations.transformers import AttentionCall, apply

__all__ = ["Gradients", "loss_gradients"]

_CHUNK = 512  # positions whose logits are there at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradients:
    """Of the loss of one sequence.

    Attributes:
        losses: of every token after the first, in nats, `[n - 1]`.
        of_layer: the gradient of the *sum* of the losses in the output of the attention of each
            layer, `[1, query_heads, n, d_v]`; layers whose attention can be replaced, in the order
            of their calls.
        sample: query, key, value, scale and causality of the layer in the middle.
    """

    losses: Tensor
    of_layer: dict[int, Tensor]
    sample: tuple[Tensor, Tensor, Tensor, float | None, bool]


class _Taps:
    """Exact attention that keeps its outputs, so that they get a gradient."""

    def __init__(self, middle: int) -> None:
        self.middle = middle
        self.of_layer: dict[int, Tensor] = {}
        self.sample: tuple[Tensor, Tensor, Tensor, float | None, bool] | None = None
        self._last: tuple[Tensor, Any] | None = None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False,
        scale: float | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        out = exact_attention(query, key, value, is_causal=is_causal, scale=scale)
        if not out.requires_grad:  # the first layer: no weight wants a gradient
            out.requires_grad_(True)
        out.retain_grad()
        self._last = out, (query.detach(), key.detach(), value.detach(), scale, is_causal)
        return out

    def observe(self, call: AttentionCall) -> None:
        """Say whose output it was; windowed layers, which stay exact, never come by."""
        if self._last is None:
            return
        out, inputs = self._last
        self._last = None
        self.of_layer.setdefault(call.layer_idx, out)
        if len(self.of_layer) <= self.middle + 1:
            self.sample = inputs


def loss_gradients(model: nn.Module, tokens: Tensor) -> Gradients:
    """Run a causal language model once with exact attention, and backward to its attention layers.

    Args:
        model: of transformers, in eval mode.
        tokens: int64 `[n]`.

    Returns:
        Losses and gradients, without a graph.

    Raises:
        UnsupportedError: the model has no head over a vocabulary, or its attention cannot be
            routed.
        ArgumentError: no layer can be replaced.

    Cost: two to three forwards in time; the activations of all layers in memory, and the logits of
    512 positions. Weights get no gradients. Deterministic.
    """
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise UnsupportedError(
            f"tune: {type(model).__name__} has no output layer over a vocabulary, so it has no "
            "perplexity; pass a causal language model (AutoModelForCausalLM)"
        )
    batch = tokens[None].to(next(model.parameters()).device)
    with apply(model, "none") as applied:
        middle = len(applied.all_layers) // 2
    taps = _Taps(middle)
    handle = apply(model, "all", attention=taps, observer=taps.observe)
    with handle, _frozen(model), torch.enable_grad():
        losses = _backward(model, batch)
    assert taps.sample is not None  # something had a gradient
    return Gradients(
        losses=losses,
        of_layer={layer: _gradient(out) for layer, out in taps.of_layer.items()},
        sample=taps.sample,
    )


def _gradient(out: Tensor) -> Tensor:
    return torch.zeros_like(out) if out.grad is None else out.grad


def _backward(model: Any, batch: Tensor) -> Tensor:
    """Return the losses after a backward pass; logits are made in runs where the model allows."""
    stack, targets = model.base_model, batch[0, 1:]
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    if stack is model or not takes:
        logits = model(input_ids=batch, use_cache=False).logits[0, :-1]
        _check_replaceable(model, logits)
        losses = F.cross_entropy(_wide(logits), targets, reduction="none")
        losses.sum().backward()
        return losses.detach()
    output = stack(input_ids=batch, use_cache=False)
    hidden = output.last_hidden_state
    _check_replaceable(model, hidden)
    leaf = hidden.detach().requires_grad_(True)
    output.last_hidden_state = leaf
    losses_of = []
    # the model's own forward makes the logits, with whatever it does to them
    stack.forward = lambda *arguments, **options: output
    try:
        for rows in torch.arange(len(targets), device=batch.device).split(_CHUNK):
            logits = model(input_ids=batch, use_cache=False, logits_to_keep=rows).logits[0]
            losses = F.cross_entropy(_wide(logits), targets[rows], reduction="none")
            losses.sum().backward()
            losses_of.append(losses.detach())
    finally:
        del stack.forward
    hidden.backward(leaf.grad)
    return torch.cat(losses_of)


def _check_replaceable(model: nn.Module, out: Tensor) -> None:
    if not out.requires_grad:
        raise ArgumentError(
            f"tune: {type(model).__name__} has no layer that could be replaced here: each has a "
            "sliding window shorter than the text, or attends to a single token"
        )


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no weight ask for a gradient: that halves the backward pass and most of its memory."""
    wanting = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in wanting:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in wanting:
            weight.requires_grad_(True)
