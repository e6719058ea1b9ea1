"""The sequences of a text that choose, and those that verify."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..evaluation.model import LanguageModel
from ..evaluation.texts import read_text
from .settings import TuneSettings

__all__ = ["held_out_windows", "split", "tokens_of"]

_SPREAD = 16  # times what is needed: of longer texts only the beginning is read


def tokens_of(paths: Sequence[Path], language: LanguageModel, settings: TuneSettings) -> Tensor:
    """Return the tokens of some files, one after the other.

    Args:
        paths: see `hyperframe.evaluation.texts.read_documents`.
        language: whose tokens are asked for.
        settings: how many are needed.

    Raises:
        ArgumentError: a file cannot be read, or the model has fewer positions than are asked for.
    """
    positions = language.positions
    if positions is not None and settings.length > positions:
        raise ArgumentError(
            f"--length {settings.length}: {language.name} has {positions} positions; ask for at "
            f"most {positions}"
        )
    needed = (settings.choosing + settings.verifying) * settings.length
    enough = max(settings.length, _SPREAD * needed // len(paths))
    found = [
        token
        for path in paths
        for document in read_text(path, language, enough=enough).documents
        for token in document[:enough]
    ]
    return torch.tensor(found, dtype=torch.int64)


def held_out_windows(path: Path, language: LanguageModel, settings: TuneSettings) -> list[Tensor]:
    """Return the sequences of a text that nothing is chosen by: as many as verify.

    Raises:
        ArgumentError: the file cannot be read or is too short.
    """
    enough = settings.verifying * settings.length
    return read_text(path, language, enough=enough).windows(settings.length, settings.verifying)


def split(tokens: Tensor, settings: TuneSettings) -> tuple[list[Tensor], list[Tensor]]:
    """Return the sequences that choose and those that verify, spread evenly over a text.

    Args:
        tokens: `[N]`, of the whole text.
        settings: how many, and how long.

    Returns:
        Both lists. No token is in two sequences; those that verify stand between and behind those
        that choose.

    Raises:
        ArgumentError: the text is too short.
    """
    count, length = settings.choosing + settings.verifying, settings.length
    if len(tokens) < count * length:
        raise ArgumentError(
            f"--text: has {len(tokens):,} tokens, fewer than the {count * length:,} of "
            f"{settings.choosing} + {settings.verifying} sequences of {length:,} to choose by and "
            "to verify on; pass a longer text, or a smaller --length"
        )
    gap = (len(tokens) - length) // (count - 1)
    windows = [tokens[gap * i : gap * i + length] for i in range(count)]
    every = count / settings.choosing
    chooses = {int(i * every) for i in range(settings.choosing)}
    return (
        [window for i, window in enumerate(windows) if i in chooses],
        [window for i, window in enumerate(windows) if i not in chooses],
    )
