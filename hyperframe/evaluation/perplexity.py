"""Perplexity, base e, and the loss by position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .blocks import BLOCKS, block_means, mean_and_error
from .model import LanguageModel
from .problem import Found, Problem, digest_of
from .settings import EvalSettings, Run
from .texts import Text

__all__ = ["by_position", "problems"]


def problems(
    texts: Sequence[Text], lengths: Sequence[int], settings: EvalSettings
) -> Iterator[Problem]:
    """Yield one problem for each text and length.

    Raises:
        ArgumentError: a text is too short.
    """
    for length in lengths:
        for text in texts:
            windows = text.windows(length, settings.windows)

            def measure(model: LanguageModel, run: Run, windows: Any = windows) -> Found:
                return perplexity(model, run, windows)

            yield Problem(
                task="perplexity", quantity="perplexity", n=length, input=text.name,
                digest=digest_of(text.content, settings.windows), measure=measure,
            )  # fmt: skip


def perplexity(model: LanguageModel, run: Run, windows: Sequence[Tensor]) -> Found:
    """Return the exponential of the mean loss over the tokens after the first of every window.

    Args:
        model: the model.
        run: its attention.
        windows: tokens, each `[n]`; predicted from their own beginning on.

    The standard error is that of the mean loss over blocks (see `hyperframe.evaluation.blocks`)
    times the perplexity: `exp` is nearly straight over it. Cost: a forward for each window.
    """
    blocks: list[float] = []
    curves = []
    with run.applied(model.model):
        for window in windows:
            losses, _ = model.score(window)
            # equal weights: blocks of all windows have one length
            blocks += block_means(losses, max(2, BLOCKS // len(windows)))
            curves.append(losses)
    every = torch.stack(curves)
    loss = float(every.mean())
    _, error = mean_and_error(blocks)
    value = math.exp(loss)
    return Found(
        value=value, standard_error=None if error is None else value * error, blocks=blocks,
        details={
            "loss": loss, "loss_error": error, "windows": len(windows),
            "positions": by_position(every.mean(dim=0)),
        },
    )  # fmt: skip


def by_position(losses: Tensor) -> list[dict[str, Any]]:
    """Return mean losses of positions 1, 2 to 3, 4 to 7, and so on.

    Args:
        losses: `[n - 1]`, of the tokens at positions 1 to n - 1.

    Example:
        >>> by_position(torch.tensor([4.0, 3.0, 1.0, 2.0]))[1]
        {'first': 2, 'last': 3, 'loss': 2.0}
    """
    found = []
    first = 1
    while first <= len(losses):
        last = min(2 * first - 1, len(losses))
        mean = float(losses[first - 1 : last].mean())
        found.append({"first": first, "last": last, "loss": mean})
        first = last + 1
    return found
