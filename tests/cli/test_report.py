"""`hyperframe report` parses, measures, writes, and says with its code how it went."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hyperframe.cli import EXIT_CODES, main
from hyperframe.cli.app import app
from hyperframe.integrations.capture import CapturedHeads, save
from hyperframe.report import FIGURES, ROW_KEYS
from hyperframe_attention.__main__ import main as program

SMALL = ["--device", "cpu", "--num-samples", "8", "--samples", "0,8", "--budget", "16"]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("heads") / "heads.safetensors"
    q, k, v = torch.randn(3, 1, 2, 128, 16, generator=torch.Generator().manual_seed(0))
    layer = CapturedHeads(layer_idx=4, query=q, key=k, value=v, scale=0.25, is_causal=True)
    save(path, {4: layer})
    return str(path)


def test_page_pictures_and_rows(heads: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["report", heads, *SMALL, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert str(out / "index.html") in result.stdout
    assert "not measured: budgets, fast: has no rule" in result.stdout
    names = {path.name for path in out.iterdir()}
    assert names == {"index.html", "rows.jsonl", *(f"{name}.png" for name in FIGURES)}
    page = (out / "index.html").read_text()
    for spec in ("sort_lsh", "sliding_window | heavy_columns", "fast"):
        assert f"<code>{spec}</code>" in page


def test_json_is_all_that_is_printed(
    heads: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "report", heads, *SMALL, "--out", str(tmp_path), "--spec", "quest", "--spec", "strided",
        "--figure", "samples", "--figure", "alpha", "--lengths", "64,128", "--skip-first", "5",
        "--format", "svg", "--json",
    ]  # fmt: skip
    assert program(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(list(row) == list(ROW_KEYS) for row in rows)
    of_alpha = [row for row in rows if row["figure"] == "alpha"]
    assert {(row["n"], row["skip_first"]) for row in of_alpha} == {
        (64, 0), (64, 5), (128, 0), (128, 5)
    }  # fmt: skip
    assert {(row["spec"], row["num_samples"]) for row in rows if row not in of_alpha} == {
        (spec, m) for spec in ("quest", "strided") for m in (0, 8)
    }
    assert {path.name for path in tmp_path.iterdir()} == {
        "index.html", "rows.jsonl", "samples.svg", "alpha.svg"
    }  # fmt: skip
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_interrupt_writes_what_was_measured(
    heads: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from hyperframe.detectors import create

    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(create("quest")), "find", interrupt)
    arguments = [
        "report", heads, *SMALL, "--out", str(tmp_path), "--figure", "samples", "--spec",
        "strided", "--spec", "quest",
    ]  # fmt: skip
    code = main(arguments)
    assert code == 130
    assert code in EXIT_CODES
    captured = capsys.readouterr()
    assert "interrupted after 4 rows" in captured.err
    assert "Interrupted" in (tmp_path / "index.html").read_text()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["spec"] for row in rows} == {"strided"}
    assert {row["statistic"] for row in rows} == {"head", "median", "low", "high"}
    assert (tmp_path / "samples.png").stat().st_size > 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--spec", "sort_lhs"], "Did you mean 'sort_lsh'"),
        (["--spec", "quest("], "quest("),
        (["--sampler", "uniforn"], "sampler='uniforn'"),
        (["--figure", "mask"], "figure='mask'"),
        (["--budget", "1k"], "--budget 1k"),
        (["--samples", "a"], "--samples a"),
        (["--lengths", "9999"], "holds 128 positions"),
        (["--head", "4"], "write 15.0"),
        (["--head", "4.9"], "--head 4.9"),
        (["--format", "pdf"], "format='pdf'"),
        (["--backend", "numba"], "numba"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_exit_code_1(
    arguments: list[str], said: str, heads: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["report", heads, *SMALL, "--out", str(tmp_path / "out"), *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("hyperframe: ")
    assert said in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "no.safetensors"), "--device", "cpu"]) == 1
    assert "there is no such file" in capsys.readouterr().err


def test_no_file_and_unknown_options_are_exit_code_2() -> None:
    assert main(["report"]) == 2
    assert main(["report", "a", "--no-such-option"]) == 2


def test_help_has_examples_and_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["report", "--help"])
    assert result.exit_code == 0
    assert "hyperframe report heads.safetensors --spec sort_lsh" in result.output
    assert "130: interrupted" in result.output


def test_without_matplotlib_it_is_one_sentence_before_anything_is_measured(
    heads: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", heads, *SMALL, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "pip install 'hyperframe-attention[plot]'" in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
