"""How an answer is scored against the right ones: the metrics of LongBench, each from 0 to 1."""

from __future__ import annotations

import difflib
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..benchmarking.report import require
from ..errors import ArgumentError

__all__ = [
    "METRICS",
    "classification",
    "code_similarity",
    "f1",
    "normalise",
    "number",
    "rouge_l",
    "score",
]

Metric = Callable[[str, str, Sequence[str]], float]
"""Of a prediction, one right answer, and all classes."""


def normalise(text: str) -> list[str]:
    """Return the words of a text as SQuAD compares them: no case, punctuation or articles.

    Example:
        >>> normalise("The answer, of course: a  Cat!")
        ['answer', 'of', 'course', 'cat']
    """
    lowered = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", lowered).split()


def f1(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the harmonic mean of precision and recall of the words.

    Args:
        prediction: what the model wrote.
        answer: what is right.
        classes: not used.

    Example:
        >>> f1("the black cat", "a cat")  # one of two words, and all of one
        0.6666666666666666
    """
    found, right = normalise(prediction), normalise(answer)
    common = sum((Counter(found) & Counter(right)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(found), common / len(right)
    return 2 * precision * recall / (precision + recall)


def rouge_l(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the F-score of ROUGE-L, by the package `rouge`, which LongBench uses.

    Args:
        prediction: what the model wrote.
        answer: what is right.
        classes: not used.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    library = require("rouge", extra="eval", command="eval --metric rouge_l")
    # without a letter between full stops there is nothing to compare, which the package refuses
    if not prediction.replace(".", "").strip() or not answer.replace(".", "").strip():
        return 0.0
    with _deep_recursion(len(prediction.split()) + len(answer.split())):
        scores = library.Rouge(metrics=["rouge-l"]).get_scores([prediction], [answer], avg=True)
    return float(scores["rouge-l"]["f"])


@contextmanager
def _deep_recursion(words: int) -> Iterator[None]:
    """Let the package walk back through its table, a frame for each word."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, 1000 + 2 * words))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """Return one over the number of classes that a prediction names, if the right one is there.

    A class whose name is part of the right one's does not count.

    Args:
        prediction: what the model wrote.
        answer: the right class.
        classes: all classes.

    Example:
        >>> classification("Food or other food", "Food", ["Food", "Colour", "other food"])
        0.5
    """
    named = [name for name in classes if name in prediction]
    named = [name for name in named if name == answer or name not in answer]
    return 1.0 / len(named) if answer in named else 0.0


def code_similarity(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the edit similarity of the first line of code with the right one.

    It is twice the length of the matching blocks over the length of both. Comments and fences do
    not count as lines of code.

    Args:
        prediction: what the model wrote.
        answer: the right line.
        classes: not used.

    Example:
        >>> code_similarity("return x", "return y")
        0.875
    """
    lines = prediction.lstrip("\n").split("\n")
    first = next((line for line in lines if not re.search(r"[`#]|//", line)), "")
    return difflib.SequenceMatcher(None, first, answer, autojunk=False).ratio()


def number(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the share of a prediction's numbers that are the number of the answer.

    Args:
        prediction: what the model wrote.
        answer: such as "Paragraph 12", or "7".
        classes: not used.

    Example:
        >>> number("Paragraph 12, or 3", "Paragraph 12")
        0.5
    """
    right = re.findall(r"\d+", answer)
    found = re.findall(r"\d+", prediction)
    return found.count(right[0]) / len(found) if found and right else 0.0


METRICS: dict[str, Metric] = {
    "f1": f1,
    "rouge_l": rouge_l,
    "classification": classification,
    "code_similarity": code_similarity,
    "number": number,
}
"""The metrics by name."""


def score(metric: str, prediction: str, answers: Sequence[str], classes: Sequence[str]) -> float:
    """Return the best score over the right answers.

    Args:
        metric: one of `METRICS`.
        prediction: what the model wrote.
        answers: each of them right.
        classes: of classification.

    Raises:
        ArgumentError: classification without classes.
    """
    if metric == "classification" and not classes:
        raise ArgumentError(
            "eval: classification needs the field all_classes in every line of the task file; add "
            "it, or pass another --metric"
        )
    return max((METRICS[metric](prediction, answer, classes) for answer in answers), default=0.0)
