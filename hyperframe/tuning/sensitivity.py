"""What an error of the attention does to the loss, predicted from the error and a gradient.

Replacing the attention of a layer moves its output by `delta`, a row for each position and head.
To second order the loss moves by `<g, delta> + delta^T H delta / 2`, with the gradient `g` and the
curvature `H`. For a log likelihood `H` is, in the mean over texts that the model predicts as well
as it thinks, the covariance of the gradient (Fisher's information), so that the second term is the
mean of `<g, delta>^2 / 2`. One backward pass has `g` for all layers and positions:

    quadratic = sum over positions of <g_i, delta_i>^2 / 2

where `g_i` is the gradient of the losses of all later tokens in row i, whose terms are uncorrelated
for a model that knows its text (the score is a martingale difference). What is left out are the
products of different rows, and those of different layers.

The quadratic term adds up over layers and key heads and is never negative. It is what a choice goes
by. The first-order term is the luck of this text, good or bad, about as large on another one with
the other sign: it is kept to look at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.exact import exact_attention
from ..integrations.transformers import apply
from ..randomness import fold_in
from .gradients import Gradients
from .rungs import Rung

__all__ = ["Damage", "add_damage", "damage_of", "measure_damage"]


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What one rung does to one layer; lists go by key head, with all its query heads.

    Attributes:
        first: first-order change of the mean loss, nats for each token.
        quadratic: second-order increase of the same.
        error: relative Frobenius error of the output.
        seconds: of the attention of the layer; of the exact one in `exact_seconds`.
        exact_seconds: likewise.
    """

    first: tuple[float, ...]
    quadratic: tuple[float, ...]
    error: tuple[float, ...]
    seconds: float
    exact_seconds: float


def damage_of(
    out: Tensor, exact: Tensor, gradient: Tensor, *, num_key_heads: int
) -> dict[str, Any]:
    """Return `first`, `quadratic` and `error` of an output.

    Args:
        out: `[1, query_heads, n, d_v]`, of the rung.
        exact: of exact attention on the same inputs.
        gradient: of the sum of the losses in `exact`.
        num_key_heads: into which the query heads are grouped.

    Cost: O(n d). Deterministic.
    """
    delta = (out - exact)[0].double()
    change = (gradient[0].double() * delta).sum(dim=-1)  # [H, n]
    change = change.view(num_key_heads, -1, change.shape[-1]).sum(dim=1)  # of a group of heads
    tokens = max(1, change.shape[-1] - 1)
    sizes = [
        x.double().square().sum(dim=(-2, -1)).view(num_key_heads, -1).sum(dim=1)
        for x in (delta, exact[0])
    ]
    return {
        "first": tuple((change.sum(dim=-1) / tokens).tolist()),
        "quadratic": tuple((change.square().sum(dim=-1) / (2 * tokens)).tolist()),
        "error": tuple((sizes[0] / sizes[1].clamp(min=1e-300)).sqrt().tolist()),
    }


def measure_damage(
    model: nn.Module, tokens: Tensor, gradients: Gradients, rungs: Sequence[Rung], *, seed: int,
    step: Callable[[int], None] | None = None,
) -> dict[tuple[int, int], Damage]:  # fmt: skip
    """Run every rung on the exact inputs of every layer, in one forward pass that stays exact.

    Args:
        model: a causal language model of transformers.
        tokens: `[n]`, those of the gradients.
        gradients: see `loss_gradients`.
        rungs: what to try.
        seed: of the draws.
        step: told of every layer before it is measured.

    Returns:
        The damage by (layer, number of the rung).

    Cost: one exact forward and a call of each rung in each layer; memory of one layer.
    """
    found: dict[tuple[int, int], Damage] = {}
    order = iter(gradients.of_layer)

    def probe(
        query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False,
        scale: float | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        layer = next(order)
        if step is not None:
            step(layer)
        started = clock(query)
        exact = exact_attention(query, key, value, is_causal=is_causal, scale=scale)
        exact_seconds = clock(query) - started
        for number, rung in enumerate(rungs):
            attention = rung.attention(fold_in(seed, layer))
            started = clock(query)
            out = attention(query, key, value, is_causal=is_causal, scale=scale)
            seconds = clock(query) - started
            terms = damage_of(out, exact, gradients.of_layer[layer], num_key_heads=key.shape[1])
            found[layer, number] = Damage(
                first=terms["first"],
                quadratic=terms["quadratic"],
                error=terms["error"],
                seconds=seconds,
                exact_seconds=exact_seconds,
            )
        return exact

    batch = tokens[None].to(next(model.parameters()).device)
    with torch.no_grad(), apply(model, "all", attention=probe):
        stack: Any = getattr(model, "base_model", model)
        stack(input_ids=batch, use_cache=False)
    return found


def add_damage(
    tables: Sequence[dict[tuple[int, int], Damage]],
) -> dict[tuple[int, int], Damage]:
    """Return the mean damage over several sequences of one length; the least of the seconds."""
    return {place: _mean([table[place] for table in tables]) for place in tables[0]}


def _mean(parts: Sequence[Damage]) -> Damage:
    def mean(name: str) -> tuple[float, ...]:
        columns = zip(*(getattr(part, name) for part in parts), strict=True)
        return tuple(sum(column) / len(parts) for column in columns)

    return Damage(
        first=mean("first"), quadratic=mean("quadratic"), error=mean("error"),
        seconds=min(part.seconds for part in parts),
        exact_seconds=min(part.exact_seconds for part in parts),
    )  # fmt: skip


def clock(tensor: Tensor) -> float:
    """Return the time, once the device of a tensor has done what it was asked."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
