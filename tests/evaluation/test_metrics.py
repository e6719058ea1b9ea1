"""Every metric on examples that are worked out by hand, and laws that all of them keep."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.errors import ArgumentError, MissingDependencyError
from hyperframe.evaluation.metrics import (
    METRICS,
    classification,
    code_similarity,
    f1,
    normalise,
    number,
    rouge_l,
    score,
)

NAMES = ["abc", "dog", "cat", "7", "Paris", "x_1", "the"]
WORDS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=12).map(" ".join)


@pytest.mark.parametrize(
    "text, words",
    [
        ("The Eiffel Tower, in Paris.", ["eiffel", "tower", "in", "paris"]),
        ("an a the", []),
        ("theatre another", ["theatre", "another"]),  # articles are words of their own
        ("rock-n-roll", ["rocknroll"]),
    ],
)
def test_words_are_compared_as_squad_does(text: str, words: list[str]) -> None:
    assert normalise(text) == words


@pytest.mark.parametrize(
    "prediction, answer, value",
    [
        ("Paris", "paris.", 1.0),
        ("in Paris, France", "Paris", 0.5),  # precision 1/3, recall 1
        ("cat cat dog", "cat dog dog", 2 / 3),  # a word counts as often as both have it
        ("London", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("the", "a", 0.0),
    ],
)
def test_f1_of_words(prediction: str, answer: str, value: float) -> None:
    assert f1(prediction, answer) == pytest.approx(value)


@pytest.mark.parametrize(
    "prediction, answer, value",
    [
        # the longest common subsequence is "the cat the mat", 4 of 5 different words of each
        # (the package counts a word once: the, cat, sat, on, mat)
        ("the cat sat on the mat", "the cat lay on the mat", 0.8),
        ("a b c d", "a c", 2 * 0.5 * 1.0 / 1.5),
        ("a b c d", "d c b a", 0.25),
        ("x", "y", 0.0),
        ("", "y", 0.0),
        ("...", "y", 0.0),
    ],
)
def test_rouge_l(prediction: str, answer: str, value: float) -> None:
    assert rouge_l(prediction, answer) == pytest.approx(value, abs=1e-6)


def test_rouge_l_of_long_texts_needs_no_deeper_stack() -> None:
    text = " ".join(f"w{i}" for i in range(700))
    before = sys.getrecursionlimit()
    assert rouge_l(text, text + " more") == pytest.approx(2 * 700 / 1401, abs=1e-6)
    assert sys.getrecursionlimit() == before


@pytest.mark.parametrize(
    "prediction, answer, value",
    [
        ("Type: Food", "Food", 1.0),
        ("Food or Colour", "Food", 0.5),
        ("Colour", "Food", 0.0),
        ("none of them", "Food", 0.0),
        # "number" is part of the right class, and does not count against it
        ("phone number", "phone number", 1.0),
        # the right class is part of another that is named: both count
        ("phone number", "number", 0.5),
    ],
)
def test_classification(prediction: str, answer: str, value: float) -> None:
    classes = ["Food", "Colour", "number", "phone number"]
    assert classification(prediction, answer, classes) == value


@pytest.mark.parametrize(
    "prediction, answer, value",
    [
        ("return x", "return x", 1.0),
        ("\n\nreturn x\nprint(1)", "return x", 1.0),
        ("# a comment\n// another\n```python\nreturn x", "return x", 1.0),
        ("abcd", "bcde", 0.75),  # bcd: 2 * 3 / 8
        ("", "return x", 0.0),
        ("# only a comment", "return x", 0.0),
    ],
)
def test_code_similarity_is_that_of_the_first_line(
    prediction: str, answer: str, value: float
) -> None:
    assert code_similarity(prediction, answer) == pytest.approx(value)


@pytest.mark.parametrize(
    "prediction, answer, value",
    [
        ("Paragraph 12", "Paragraph 12", 1.0),
        ("12, 12 and 3", "12", 2 / 3),
        ("Paragraph 1", "Paragraph 12", 0.0),
        ("no idea", "7", 0.0),
    ],
)
def test_number(prediction: str, answer: str, value: float) -> None:
    assert number(prediction, answer) == pytest.approx(value)


@given(prediction=WORDS, answers=st.lists(WORDS, min_size=1, max_size=3))
def test_scores_are_shares_and_more_right_answers_never_hurt(
    prediction: str, answers: list[str]
) -> None:
    for name in METRICS:
        classes = [*answers, "other"]
        best = score(name, prediction, answers, classes)
        assert 0 <= best <= 1 + 1e-9
        assert best >= score(name, prediction, answers[:1], classes)


@given(answer=WORDS)
def test_the_right_answer_scores_one(answer: str) -> None:
    assert f1(answer, answer) == (1.0 if normalise(answer) else 0.0)
    assert rouge_l(answer, answer) == pytest.approx(1.0)
    assert code_similarity(answer, answer) == 1.0
    assert classification(answer, answer, [answer, "no such class"]) == 1.0


def test_classification_without_classes_is_refused() -> None:
    with pytest.raises(ArgumentError, match="all_classes"):
        score("classification", "a", ["a"], [])


def test_without_the_package_rouge_l_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(MissingDependencyError, match=r"hyperframe-attention\[eval\]"):
        rouge_l("a", "a")
