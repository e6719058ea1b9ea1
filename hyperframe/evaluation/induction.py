"""Induction: a sequence of random tokens, twice; how much of the repetition is predicted?

Nothing in the sequence can be guessed, so that every right prediction copies from n / 2 tokens
back, where a token's former neighbour stands: what heads that copy do, and single far keys decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .blocks import BLOCKS, block_means, mean_and_error
from .model import LanguageModel
from .problem import Found, Problem, digest_of
from .settings import EvalSettings, Run

__all__ = ["problems", "repeated"]


def problems(
    model: LanguageModel, lengths: Sequence[int], settings: EvalSettings
) -> Iterator[Problem]:
    """Yield one problem for each length."""
    for length in lengths:
        sequences = [
            repeated(model, length, seed=settings.seed * 1000 + trial)
            for trial in range(settings.trials)
        ]

        def measure(model: LanguageModel, run: Run, sequences: list[Tensor] = sequences) -> Found:
            return induction(model, run, sequences)

        yield Problem(
            task="induction", quantity="accuracy", n=length, measure=measure,
            digest=digest_of(settings.trials, settings.seed),
        )  # fmt: skip


def repeated(model: LanguageModel, length: int, *, seed: int) -> Tensor:
    """Return random tokens, none of them special, twice; an odd length begins with one more.

    Args:
        model: whose tokens they are.
        length: of all.
        seed: of the draw.
    """
    size = min(len(model.tokenizer), model.model.config.vocab_size)
    special = set(model.tokenizer.all_special_ids)
    usable = torch.tensor([token for token in range(size) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, len(usable), (length // 2 + length % 2,), generator=generator)
    half = usable[drawn[: length // 2]]
    return torch.cat([usable[drawn[length // 2 :]], half, half])


def induction(model: LanguageModel, run: Run, sequences: Sequence[Tensor]) -> Found:
    """Return the share of the repetition, after its first token, that is the most likely token.

    Args:
        model: the model.
        run: its attention.
        sequences: see `repeated`.

    Cost: a forward for each sequence.
    """
    blocks: list[float] = []
    right, losses = [], []
    with run.applied(model.model):
        for tokens in sequences:
            # the repetition's first token follows from nothing
            loss, hits = model.score(tokens, first=len(tokens) - len(tokens) // 2 + 1)
            blocks += block_means(hits.double(), max(2, BLOCKS // len(sequences)))
            right.append(hits.double())
            losses.append(loss)
    _, error = mean_and_error(blocks)
    return Found(
        value=float(torch.cat(right).mean()), standard_error=error, blocks=blocks,
        details={"loss": float(torch.cat(losses).mean()), "trials": len(sequences)},
    )  # fmt: skip
