"""A passkey in filler: does a model still read what stands far back?

Five digits stand in a sentence, hidden in filler at some depth; at the end the model is asked for
them. It does not generate: the right digits are given one after the other, and each has to be the
most likely token at its place, which is the same and needs one forward.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError
from .blocks import mean_and_error
from .model import LanguageModel
from .problem import Found, Problem, digest_of
from .settings import EvalSettings, Run

__all__ = ["FILLER", "problems", "prompt"]

_HEAD = "Remember the pass key in this text.\n\n"
FILLER = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
_NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
_QUESTION = "\n\nWhat is the pass key in this text? The pass key is"
_ANSWER = " {key}"


def problems(
    model: LanguageModel, lengths: Sequence[int], settings: EvalSettings
) -> Iterator[Problem]:
    """Yield one problem for each length and depth.

    Raises:
        ArgumentError: the tokenizer has no digits, or a length is too short for the question.
    """
    for length in lengths:
        for depth in settings.depths:
            prompts = [
                prompt(model, length, depth, key_of(settings.seed, length, depth, trial))
                for trial in range(settings.trials)
            ]

            def measure(
                model: LanguageModel, run: Run, prompts: list[tuple[Tensor, int]] = prompts
            ) -> Found:
                return passkey(model, run, prompts)

            yield Problem(
                task="passkey", quantity="accuracy", n=length, depth=depth, measure=measure,
                digest=digest_of(_HEAD, FILLER, _NEEDLE, _QUESTION, settings.trials, settings.seed),
            )  # fmt: skip


def key_of(seed: int, length: int, depth: float, trial: int) -> str:
    """Return five digits, always the same for the same arguments."""
    draws = random.Random(f"passkey {seed} {length} {depth} {trial}")
    return str(draws.randrange(10_000, 100_000))


def prompt(model: LanguageModel, length: int, depth: float, key: str) -> tuple[Tensor, int]:
    """Return the tokens of a question with its answer, and how many of them are digits.

    Args:
        model: whose tokens they are.
        length: how many, answer included.
        depth: share of the filler that stands before the key, to whole sentences.
        key: the digits.

    Raises:
        ArgumentError: the tokenizer has no digits, or the length is too short.
    """
    head = model.tokens(_HEAD, starts=True)
    filler, needle = model.tokens(FILLER), model.tokens(_NEEDLE.format(key=key))
    question, answer = model.tokens(_QUESTION), model.tokens(_ANSWER.format(key=key))
    unknown = model.tokenizer.unk_token_id
    # the blank before the digits, where it is a token, is given: others could follow as well
    asked = answer
    while asked and not any(map(str.isdigit, model.tokenizer.decode(asked[:1]))):
        asked = asked[1:]
    if not asked or (unknown is not None and unknown in answer):
        raise ArgumentError(
            f"{model.name}: its tokenizer has no digits, so that there is no pass key; leave "
            "passkey out of --tasks"
        )
    room = length - len(head) - len(needle) - len(question) - len(answer)
    if room < 0:
        raise ArgumentError(
            f"--length {length}: is too short for the passkey task, whose question alone takes "
            f"{length - room} tokens; ask for more, or leave passkey out of --tasks"
        )
    before = min(round(depth * room / len(filler)) * len(filler), room)
    if depth == 1:
        before = room
    hay = filler * (room // len(filler) + 1)
    tokens = [*head, *hay[:before], *needle, *hay[: room - before], *question, *answer]
    return torch.tensor(tokens), len(asked)


def passkey(model: LanguageModel, run: Run, prompts: Sequence[tuple[Tensor, int]]) -> Found:
    """Return the share of keys whose every digit is the most likely token.

    Args:
        model: the model.
        run: its attention.
        prompts: see `prompt`.

    `details["log_probability"]` is the mean natural logarithm of the probability of a whole key,
    which moves before the share does. Cost: a forward for each prompt.
    """
    right, logarithms = [], []
    with run.applied(model.model):
        for tokens, answer in prompts:
            losses, hits = model.score(tokens, first=len(tokens) - answer)
            right.append(float(hits.all()))
            logarithms.append(-float(losses.sum()))
    value, error = mean_and_error(right)
    return Found(
        value=value, standard_error=error, blocks=right,
        details={"log_probability": sum(logarithms) / len(logarithms), "trials": len(prompts)},
    )  # fmt: skip
