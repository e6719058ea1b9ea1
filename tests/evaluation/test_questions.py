"""Files of questions: what is read, what is asked, how it is cut and scored, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from hyperframe.errors import ArgumentError, HyperframeError, UnsupportedError
from hyperframe.evaluation import EvalSettings, LanguageModel, run
from hyperframe.evaluation.metrics import METRICS
from hyperframe.evaluation.questions import DATASETS, TEMPLATES, fill, read_questions

QUESTION: dict[str, Any] = {"input": "Who?", "context": "Ann did.", "answers": ["Ann", "she"]}


def written(path: Path, *questions: Any) -> Path:
    path.write_text("".join(json.dumps(question) + "\n\n" for question in questions))
    return path


def settings(**options: Any) -> EvalSettings:
    return EvalSettings(**{"tasks": ["induction"], **options})


def test_fields_and_defaults_are_those_of_longbench(tmp_path: Path) -> None:
    file = written(
        tmp_path / "q.jsonl",
        {**QUESTION, "dataset": "hotpotqa_e", "_id": "one", "length": 7, "language": "en"},
        {**QUESTION, "dataset": "trec", "all_classes": ["Ann", "Bob"]},
        {**QUESTION, "all_classes": ["Ann", "she"], "dataset": None},
        {"context": "x = 1\n", "input": "", "answers": ["y = 2"], "dataset": "lcc"},
        {**QUESTION, "all_classes": None},
    )
    first, second, third, code, plain = read_questions(file, settings())
    assert (first.name, first.metric, first.max_new_tokens) == ("one", "f1", 32)
    assert first.prompt == "Ann did.\n\nQuestion: Who?\nAnswer:"
    assert not first.first_line
    assert (second.name, second.metric, second.first_line) == ("3", "classification", True)
    assert second.prompt == "Ann did.\nWho?"
    assert (third.metric, third.max_new_tokens, third.first_line) == ("classification", 64, False)
    assert (code.metric, code.prompt) == ("code_similarity", "x = 1\n")
    assert (plain.metric, plain.classes) == ("f1", [])
    assert len(read_questions(file, settings(max_examples=2))) == 2


def test_the_user_decides_over_the_name_of_the_data_set(tmp_path: Path) -> None:
    file = written(tmp_path / "q.jsonl", {**QUESTION, "dataset": "hotpotqa"})
    (found,) = read_questions(
        file, settings(metric="number", max_new_tokens=3, template="{input} <{context}> {x}")
    )
    assert (found.metric, found.max_new_tokens) == ("number", 3)
    assert found.prompt == "Who? <Ann did.> {x}"


def test_every_data_set_has_a_metric_and_every_metric_a_template() -> None:
    assert {dataset.metric for dataset in DATASETS.values()} == set(METRICS) == set(TEMPLATES)


def test_braces_of_a_context_are_text() -> None:
    filled = fill("{context}|{input}|{context}", context="{input} {0}", question="{context}")
    assert filled == "{input} {0}|{context}|{input} {0}"


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "line 2 is no JSON object"),
        ('["a"]', "line 2 is no JSON object"),
        ('{"answers": ["a"]}', "no text under context or input"),
        ('{"input": 3, "answers": ["a"]}', "no text under context or input"),
        ('{"input": "a"}', "answers=None"),
        ('{"input": "a", "answers": []}', "answers=[]"),
        ('{"input": "a", "answers": "b"}', "answers='b'; give a list of texts"),
        ('{"input": "a", "answers": ["b"], "all_classes": "b"}', "all_classes='b'"),
        ('{"input": "a", "answers": ["b"], "dataset": "trec"}', "no all_classes"),
        ('{"input": "a", "answers": ["b"], "dataset": "dureader"}', "dureader is Chinese"),
        ('{"input": "a", "answers": ["b"], "_id": "1"}', "two lines have the _id '1'"),
    ],
)
def test_a_line_that_is_no_question_is_refused_with_its_number(
    tmp_path: Path, line: str, said: str
) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(f"{json.dumps(QUESTION)}\n{line}\n")
    with pytest.raises(HyperframeError) as raised:
        read_questions(file, settings())
    assert said in str(raised.value)
    assert str(file) in str(raised.value)


def test_files_without_questions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "latin.jsonl").write_bytes("ü".encode("latin-1"))
    for name, said in (
        ("empty.jsonl", "holds no question"), ("latin.jsonl", "it is not UTF-8"),
        ("absent.jsonl", "No such file"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=said):
            read_questions(tmp_path / name, settings())
    file = written(tmp_path / "zh.jsonl", {**QUESTION, "dataset": "vcsum"})
    with pytest.raises(UnsupportedError):
        read_questions(file, settings())
    assert len(read_questions(file, settings(metric="f1"))) == 1


def test_answers_are_what_the_model_writes_by_itself(tiny: LanguageModel, tmp_path: Path) -> None:
    """A row for each question and run: greedy steps by hand, the middle of long prompts cut out."""
    long = "".join(chr(97 + i % 26) for i in range(300))
    file = written(
        tmp_path / "q.jsonl",
        {"input": "abc", "context": "", "answers": ["zz"]},
        {"input": "", "context": long, "answers": ["zz"], "_id": "long"},
    )
    found = list(
        run(
            tiny,
            EvalSettings(
                tasks=[str(file)], lengths=[64], max_new_tokens=5, template="{input}{context}",
                metric="code_similarity", specs=["heavy_columns(num_columns=64)"],
            ),
        )
    )  # fmt: skip
    assert [(row["example"], row["run"]) for row in found] == [
        ("1", "exact"), ("1", "heavy_columns(num_columns=64)"),
        ("long", "exact"), ("long", "heavy_columns(num_columns=64)"),
    ]  # fmt: skip
    for rows, prompt in ((found[:2], "abc"), (found[2:], long[:29] + long[-30:])):
        tokens = [ord(letter) - 32 for letter in prompt]
        answer = ""
        for _ in range(5):
            with torch.no_grad():
                best = int(tiny.model(torch.tensor([tokens])).logits[0, -1].argmax())
            if best == 94:
                break
            tokens.append(best)
            answer += {95: "\n"}.get(best, chr(best + 32) if best < 95 else "")
        for row in rows:
            assert row["failure"] is None
            assert row["details"]["written"].replace(" ", "") == answer.replace(
                " ", ""
            )  # joined by blanks
            assert row["details"]["tokens"] == len(prompt)
            assert row["details"]["is_cut"] == (rows is not found[:2] and prompt != "abc")
            assert row["quantity"] == "code_similarity"
            expected = METRICS["code_similarity"](row["details"]["written"], "zz", [])
            assert row["value"] == expected
        assert rows[1]["change"] == 0  # all columns are held


def test_answers_longer_than_all_are_refused(tiny: LanguageModel, tmp_path: Path) -> None:
    file = written(tmp_path / "q.jsonl", QUESTION)
    with pytest.raises(ArgumentError, match="leaves nothing of 64 tokens"):
        list(run(tiny, EvalSettings(tasks=[str(file)], lengths=[64])))
