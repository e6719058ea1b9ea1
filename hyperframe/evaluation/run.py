"""Running an evaluation: every problem, by exact attention and by every run, one row each."""

from __future__ import annotations

import datetime as dt
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..benchmarking.environment import describe_environment
from ..benchmarking.memory import out_of_memory
from ..benchmarking.report import append_rows
from ..benchmarking.timing import Failure
from ..errors import ArgumentError
from . import induction, passkey, perplexity, prefill, questions
from .blocks import difference
from .model import LanguageModel
from .problem import Found, Problem
from .rows import EVAL_KEYS, Row, key_of, known_rows
from .settings import TASKS, EvalSettings, Run
from .texts import Text, read_text

__all__ = ["Progress", "compare", "lengths_of", "problems", "run"]

Progress = Callable[[int, int, str], None]
"""Called with the number of a row, their total and a few words, before it is measured, and with an
empty string after the last one."""

_LENGTHS = (1024, 2048, 4096)


def lengths_of(model: LanguageModel, texts: Sequence[Text], settings: EvalSettings) -> list[int]:
    """Return the lengths to measure.

    Raises:
        ArgumentError: one that the model has no positions for.
    """
    positions = model.positions
    if settings.lengths is not None:
        for length in settings.lengths:
            if positions is not None and length > positions:
                raise ArgumentError(
                    f"--length {length}: {type(model.model).__name__} has {positions} positions; "
                    f"ask for at most {positions}"
                )
        return sorted(settings.lengths)
    most = min([text.longest for text in texts] + [positions or _LENGTHS[-1]])
    return [length for length in _LENGTHS if length <= most] or [most]


def problems(model: LanguageModel, settings: EvalSettings) -> list[Problem]:
    """Return everything that is asked, the shortest first and the questions of files last.

    Raises:
        ArgumentError: texts, files or lengths that cannot work.
    """
    enough = max(settings.lengths or _LENGTHS) * settings.windows
    # questions first: a mistake in them costs no reading of texts
    files = [task for task in settings.tasks if task not in TASKS]
    asked = {file: questions.read_questions(file, settings) for file in files}
    needed = settings.texts if "perplexity" in settings.tasks else ()
    texts = [read_text(text, model, enough=enough) for text in needed]
    lengths = lengths_of(model, texts, settings)
    made: dict[str, Callable[[], Iterator[Problem]]] = {
        "perplexity": lambda: perplexity.problems(texts, lengths, settings),
        "prefill": lambda: prefill.problems(lengths, settings),
        "passkey": lambda: passkey.problems(model, lengths, settings),
        "induction": lambda: induction.problems(model, lengths, settings),
    }
    found = [problem for task in settings.tasks if task in made for problem in made[task]()]
    found.sort(key=lambda problem: problem.n)
    for file, of_file in asked.items():
        found += questions.problems(file, of_file, lengths[-1])
    return found


def run(
    model: LanguageModel, settings: EvalSettings, *, out: Path | None = None,
    progress: Progress | None = None,
) -> Iterator[Row]:  # fmt: skip
    """Measure, and yield a row (see `EVAL_KEYS`) for every problem and run.

    Args:
        model: see `load_language_model`.
        settings: what is measured.
        out: a JSON-lines file: rows that are there with the same `KEY_FIELDS` are yielded as they
            are and not measured again, new ones are appended as they are made.
        progress: told of every row.

    Raises:
        ArgumentError: texts, lengths, layers or policies that cannot work, before anything is
            measured.

    What cannot be measured is a row with its `failure`, among it what there is no memory for.
    """
    runs = list(settings.runs(model.depth))
    windows: list[Mapping[int, int]] = []
    for each in runs:  # a policy that does not fit is refused here
        with each.applied(model.model) as applied:
            windows.append(applied.windows)
    asked = problems(model, settings)
    known = {} if out is None else known_rows(out)
    environment = describe_environment(model.device)
    total, done = len(asked) * len(runs), 0
    for problem in asked:
        exact: Row | None = None
        for each, of_layers in zip(runs, windows, strict=True):
            key = _key(model, problem, each, settings)
            row = known.get(key_of(key))
            if row is None:
                if progress is not None:
                    progress(done, total, f"{problem.label}: {each.name}")
                row = _measured(model, problem, each, key, exact)
                if row["failure"] is None:
                    _name_left_exact(row, of_layers)
                row |= {
                    "environment": environment,
                    "time": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
                }
                if out is not None:
                    append_rows(out, [row])
            if each.is_exact and row["failure"] is None:
                exact = row
            done += 1
            yield row
    if progress is not None:
        progress(total, total, "")


def _key(model: LanguageModel, problem: Problem, run: Run, settings: EvalSettings) -> Row:
    return dict.fromkeys(EVAL_KEYS) | {
        "task": problem.task, "model": model.name, "weights": model.weights,
        "input": problem.input, "digest": problem.digest, "n": problem.n, "depth": problem.depth,
        "example": problem.example, "run": run.label, "layers": run.layers, "policy": run.digest,
        "seed": settings.seed, "device": model.device.type, "dtype": model.dtype,
        "quantity": problem.quantity, "refused": False,
    }  # fmt: skip


def _measured(model: LanguageModel, problem: Problem, run: Run, key: Row, exact: Row | None) -> Row:
    failure: Failure | None = None
    try:
        found = problem.measure(model, run)
        if not math.isfinite(found.value):
            raise ArithmeticError(f"the {problem.quantity} is not finite")
    except Exception as error:
        failure = _failure(error)
    if failure is not None:
        # outside of the handler, whose traceback holds on to tensors
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        return key | {"failure": failure.reason, "refused": failure.is_refusal}
    row = key | {
        "value": found.value, "standard_error": found.standard_error, "details": found.details,
        "blocks": None if found.blocks is None else list(found.blocks),
    }  # fmt: skip
    return row | compare(problem.quantity, found, exact, is_exact=run.is_exact)


def _name_left_exact(row: Row, windows: Mapping[int, int]) -> None:
    """Name the layers in the details that stayed exact since their window bound."""
    tokens = row["details"].get("tokens", row["n"])
    kept = [layer for layer, window in windows.items() if window < tokens]
    if kept:
        row["details"] |= {"left_exact": kept}


def _failure(error: Exception) -> Failure:
    full = out_of_memory(error)
    if full is None:
        return Failure.of(error)
    return Failure(f"out of memory: {full}; ask for a shorter --length, or --dtype bfloat16")


def compare(quantity: str, found: Found, exact: Mapping[str, Any] | None, *, is_exact: bool) -> Row:
    """Return the keys of a row that say how a run compares with exact attention.

    Args:
        quantity: what the value is.
        found: of the run.
        exact: the row of exact attention, or None.
        is_exact: whether the run is exact attention itself.
    """
    base = found.exact if found.exact is not None else (None if exact is None else exact["value"])
    if is_exact or base is None:
        return {"exact": found.value if is_exact else None}
    pairs = None
    if exact is not None and exact["blocks"] is not None and found.blocks is not None:
        pairs = difference(found.blocks, exact["blocks"])[1]
    if quantity == "seconds":
        return {"exact": base, "change": base / found.value}
    if quantity == "perplexity":
        ratio = found.value / base
        error = None if pairs is None else 100 * ratio * pairs
        return {"exact": base, "change": 100 * (ratio - 1), "change_error": error}
    return {"exact": base, "change": found.value - base, "change_error": pairs}
