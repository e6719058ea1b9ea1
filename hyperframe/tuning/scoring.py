"""Losses of the whole model under a policy, with the seconds of its attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..evaluation.model import LanguageModel
from ..integrations.policy import Policy
from ..integrations.transformers import AttentionCall, apply
from .paired import Increase, paired_increase

__all__ = ["increase_on", "mean_seconds", "score"]


def increase_on(language: LanguageModel, policy: Policy, windows: Sequence[Tensor]) -> Increase:
    """Return what a policy does to the loss of other tokens, for example of a held-out text.

    Args:
        language: the model.
        policy: what is applied.
        windows: sequences of tokens `[n]`.

    Cost: two forwards for each sequence.
    """
    bases = [score(language, tokens, None)[0] for tokens in windows]
    runs = [score(language, tokens, policy)[0] for tokens in windows]
    return paired_increase(runs, bases)


def score(
    language: LanguageModel, tokens: Tensor, policy: Policy | None
) -> tuple[Tensor, dict[int, float]]:
    """Return the losses of a sequence, and the seconds of the attention of every layer.

    Args:
        language: the model.
        tokens: `[n]`.
        policy: what is applied; None is exact attention.
    """
    seconds: dict[int, float] = {}

    def observe(call: AttentionCall) -> None:
        seconds[call.layer_idx] = seconds.get(call.layer_idx, 0.0) + call.seconds

    how: dict[str, Any] = {"layers": "none"} if policy is None else {"policy": policy}
    with apply(language.model, observer=observe, **how):
        losses, _ = language.score(tokens)
    return losses, seconds


def mean_seconds(tables: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Return the mean seconds of every layer over some sequences.

    Example:
        >>> mean_seconds([{0: 1.0, 5: 2.0}, {0: 3.0, 5: 2.0}])
        {0: 2.0, 5: 2.0}
    """
    return {layer: sum(table[layer] for table in tables) / len(tables) for layer in tables[0]}
