"""Files of questions in the form of LongBench: a line is a JSON object with context and answers.

Fields: `input` (the question) and `context`, of which one may be empty; `answers`, each of them
right; and, where there are any, `all_classes` (of a classification), `dataset` (its name, by which
metric and length of the answer go) and `_id`. Other fields are not read.

The task and its metrics are those of LongBench (arXiv 2308.14508); its prompts are not: they are
the user's (`template`), or plain ones. Scores are to be compared with exact attention's of the same
run, not with published ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import ArgumentError, UnsupportedError
from .metrics import score
from .model import LanguageModel
from .problem import Found, Problem, digest_of
from .settings import EvalSettings, Run

__all__ = ["DATASETS", "TEMPLATES", "Question", "fill", "problems", "read_questions"]


class Dataset(NamedTuple):
    """How the answers of a data set are made and scored.

    Attributes:
        metric: one of `METRICS`.
        max_new_tokens: of an answer.
        first_line: whether only the first line of an answer counts.
    """

    metric: str
    max_new_tokens: int
    first_line: bool = False


DATASETS: dict[str, Dataset] = {
    "narrativeqa": Dataset("f1", 128), "qasper": Dataset("f1", 128),
    "multifieldqa_en": Dataset("f1", 64), "hotpotqa": Dataset("f1", 32),
    "2wikimqa": Dataset("f1", 32), "musique": Dataset("f1", 32),
    "triviaqa": Dataset("f1", 32, first_line=True), "gov_report": Dataset("rouge_l", 512),
    "qmsum": Dataset("rouge_l", 512), "multi_news": Dataset("rouge_l", 512),
    "samsum": Dataset("rouge_l", 128, first_line=True),
    "trec": Dataset("classification", 64, first_line=True),
    "passage_count": Dataset("number", 32), "passage_retrieval_en": Dataset("number", 32),
    "lcc": Dataset("code_similarity", 64), "repobench-p": Dataset("code_similarity", 64),
}  # fmt: skip
"""LongBench's English data sets; `_e` behind a name changes nothing."""

_OTHER = {"multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"}

TEMPLATES = {
    "f1": "{context}\n\nQuestion: {input}\nAnswer:",
    "number": "{context}\n\nQuestion: {input}\nAnswer:",
    "rouge_l": "{context}\n\n{input}\nSummary:",
    "classification": "{context}\n{input}",
    "code_similarity": "{context}{input}",
}
"""What is asked unless the user says otherwise, by metric."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A line of a task file.

    Attributes:
        name: its `_id`, or the number of the line.
        prompt: what the model reads.
        answers: each of them right.
        classes: of a classification.
        metric: one of `METRICS`.
        max_new_tokens: of an answer.
        first_line: whether only the first line of an answer counts.
        dataset: its name, or an empty string.
    """

    name: str
    prompt: str
    answers: Sequence[str]
    classes: Sequence[str]
    metric: str
    max_new_tokens: int
    first_line: bool
    dataset: str


def fill(template: str, *, context: str, question: str) -> str:
    """Return a template with `{context}` and `{input}` filled in; other braces stay.

    Example:
        >>> fill("{input} {x} {context}", context="{input}", question="why?")
        'why? {x} {input}'
    """
    parts = template.split("{context}")
    return context.join(part.replace("{input}", question) for part in parts)


def read_questions(path: Path | str, settings: EvalSettings) -> list[Question]:
    """Read a task file.

    Args:
        path: the file.
        settings: template, metric, length of answers and number of examples.

    Raises:
        ArgumentError: it cannot be read, or a line is no question.
        UnsupportedError: a data set whose metric there is not.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ArgumentError(
            f"--tasks {path}: cannot be read ({why}); name a file of JSON lines"
        ) from error
    found: list[Question] = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and (settings.max_examples is None or len(found) < settings.max_examples):
            found.append(_question(path, number, line, settings))
    if not found:
        raise ArgumentError(f"--tasks {path}: holds no question; write one JSON object a line")
    names = [question.name for question in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ArgumentError(f"--tasks {path}: two lines have the _id {twice!r}; tell them apart")
    return found


def _question(path: Path, number: int, line: str, settings: EvalSettings) -> Question:
    where = f"--tasks {path}: line {number}"
    try:
        fields = json.loads(line)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ArgumentError(f"{where} is no JSON object, {line[:40]!r}; write one question a line")
    context, question = fields.get("context") or "", fields.get("input") or ""
    answers = fields.get("answers")
    if not (isinstance(context, str) and isinstance(question, str) and (context or question)):
        raise ArgumentError(f"{where} has no text under context or input; give one of them")
    if not _texts(answers) or not answers:
        raise ArgumentError(f"{where}: answers={answers!r}; give a list of texts, one at least")
    classes = fields.get("all_classes") or []
    if not _texts(classes):
        raise ArgumentError(f"{where}: all_classes={classes!r} is no list of texts; give one")
    dataset = str(fields.get("dataset") or "").removesuffix("_e")
    if settings.metric is None and dataset in _OTHER:
        raise UnsupportedError(
            f"{where}: {dataset} is Chinese, whose words no metric here can tell apart; leave the "
            "file out, or pass --metric"
        )
    default = DATASETS.get(dataset, Dataset("classification" if classes else "f1", 64))
    metric = settings.metric or default.metric
    template = TEMPLATES[metric] if settings.template is None else settings.template
    if metric == "rouge_l":
        score(metric, "a", ["a"], [])  # the package is there
    if metric == "classification" and not classes:
        raise ArgumentError(
            f"{where} has no all_classes, which classification needs; add it, or pass another "
            "--metric"
        )
    return Question(
        name=str(fields.get("_id", number)), answers=answers, classes=classes, metric=metric,
        prompt=fill(template, context=context, question=question), dataset=dataset,
        max_new_tokens=settings.max_new_tokens or default.max_new_tokens,
        first_line=default.first_line,
    )  # fmt: skip


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def problems(path: Path | str, questions: Sequence[Question], length: int) -> Iterator[Problem]:
    """Yield one problem for each question.

    Args:
        path: of the file.
        questions: its questions.
        length: most tokens, the answer included; longer prompts lose their middle.

    Raises:
        ArgumentError: the answer alone is as long.
    """
    for question in questions:
        if question.max_new_tokens >= length:
            raise ArgumentError(
                f"--max-new-tokens {question.max_new_tokens}: leaves nothing of {length} tokens "
                f"for the question of {path}; ask for a greater --length, or for fewer"
            )

        def measure(model: LanguageModel, run: Run, question: Question = question) -> Found:
            return answered(model, run, question, length)

        yield Problem(
            task="questions", quantity=question.metric, n=length, input=Path(path).name,
            example=question.name, digest=digest_of(question), measure=measure,
        )  # fmt: skip


def answered(model: LanguageModel, run: Run, question: Question, length: int) -> Found:
    """Return the score of the answer that a model writes, by the most likely token each time.

    A prompt that is too long loses its middle, as in LongBench. The prefill is the run's; single
    tokens are decoded exactly, as everywhere. Cost: one prefill, and a step for each new token.
    """
    tokens = model.tokens(question.prompt, starts=True)
    room = length - question.max_new_tokens
    is_cut = len(tokens) > room
    if is_cut:
        tokens = tokens[: room // 2] + tokens[len(tokens) - (room - room // 2) :]
    with run.applied(model.model):
        written = model.answer(torch.tensor(tokens), max_new_tokens=question.max_new_tokens)
    answer = written.lstrip("\n").split("\n")[0] if question.first_line else written
    value = score(question.metric, answer, question.answers, question.classes)
    details: dict[str, Any] = {
        "written": written, "answers": list(question.answers), "tokens": len(tokens),
        "is_cut": is_cut, "dataset": question.dataset,
    }  # fmt: skip
    return Found(value=value, details=details)
