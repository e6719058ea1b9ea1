"""`hyperframe frontier` parses, measures, prints, resumes, and says with its code how it went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hyperframe.benchmarking.frontier import FRONTIER_KEYS
from hyperframe.cli import EXIT_CODES, main
from hyperframe.cli.app import app
from hyperframe.integrations.capture import CapturedHeads, save
from hyperframe_attention.__main__ import main as program

SMALL = [
    "--device", "cpu", "--budget", "32", "--num-samples", "16", "--window", "16", "--sinks", "4",
    "--repeats", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("heads") / "heads.safetensors"
    q, k, v = torch.randn(3, 1, 2, 256, 16, generator=torch.Generator().manual_seed(0))
    layer = CapturedHeads(layer_idx=4, query=q, key=k, value=v, scale=0.25, is_causal=True)
    save(path, {4: layer})
    return str(path)


def test_table_rows_and_plot(heads: str, tmp_path: Path) -> None:
    out, plot = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    arguments = [
        "frontier", heads, *SMALL, "--detector", "quest", "--detector", "none", "--oracle",
        "--out", str(out), "--plot", str(plot),
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for word in ("quest", "(window alone)", "(tile_oracle)", "heads.safetensors: n = 256"):
        assert word in result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(list(row) == list(FRONTIER_KEYS) for row in rows)
    assert [row["detector"] for row in rows] == ["tile_oracle", "quest", "none"]
    assert plot.exists()
    # what is there is not measured again, and shown as well
    again = CliRunner().invoke(app, arguments)
    assert again.output == result.output
    assert len(out.read_text().splitlines()) == 3


def test_without_files_the_small_model_is_captured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from hyperframe.integrations import capture_model as library

    asked: list[dict[str, Any]] = []

    def captured(model: str, **options: Any) -> tuple[dict[int, CapturedHeads], dict[str, Any]]:
        asked.append({"model": model, **options})
        q, k, v = torch.randn(3, 1, 2, 128, 16, generator=torch.Generator().manual_seed(0))
        layer = CapturedHeads(layer_idx=8, query=q, key=k, value=v, scale=0.25, is_causal=True)
        return {8: layer}, {"model": model}

    monkeypatch.setattr(library, "capture_model", captured)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        result = CliRunner().invoke(app, ["frontier", *SMALL, "--detector", "quest"])
        assert result.exit_code == 0, result.output
        assert "heads-smollm2.safetensors: n = 128" in result.output
    (options,) = asked
    assert (options["model"], options["length"]) == ("smollm2", 8192)
    assert len(options["text"]) > 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["heads-smollm2.safetensors"]


def test_json_is_all_that_is_printed(heads: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--json", "--detector", "strided", "--sampler", "importance", "--strict"]
    assert program(["frontier", heads, *SMALL, *arguments]) == 1
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out)
    assert row["sampler"] == "importance"
    assert "importance looks at queries" in row["failure"]
    assert captured.err == "hyperframe: nothing could be measured; every row says why\n"


def test_all_registered_detectors_are_measured(
    heads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["frontier", heads, *SMALL, "--repeats", "0"]) == 0
    printed = capsys.readouterr().out
    for name in ("heavy_columns", "sort_lsh", "strided", "dilated", "bigbird", "butterfly"):
        assert name in printed
    assert "block_list" not in printed
    assert "detect ms" not in printed


def test_interrupt_keeps_what_was_measured(
    heads: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from hyperframe.detectors import create

    quest = type(create("quest"))

    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(quest, "find", interrupt)
    out = tmp_path / "rows.jsonl"
    arguments = [
        "frontier", heads, *SMALL, "--detector", "strided", "--detector", "quest", "--detector",
        "bigbird", "--out", str(out),
    ]  # fmt: skip
    code = main(arguments)
    assert code == 130
    assert code in EXIT_CODES
    captured = capsys.readouterr()
    assert "strided" in captured.out
    assert "interrupted after 1 rows" in captured.err
    assert len(out.read_text().splitlines()) == 1
    monkeypatch.undo()
    assert main(arguments) == 0
    assert len(out.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--detector", "sort_lhs"], "Did you mean 'sort_lsh'"),
        (["--detector", "quest("], "quest("),
        (["--sampler", "uniforn"], "sampler='uniforn'"),
        (["--budget", "1k"], "--budget 1k"),
        (["--budget", "0"], "budget=0"),
        (["--lengths", "9999"], "holds 256 positions"),
        (["--heads", "7"], "holds 2 query heads"),
        (["--causal", "yes"], "causal='yes'"),
        (["--backend", "numba"], "numba"),
        (["--window", "0"], "sinks are part of the window"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_exit_code_1(
    arguments: list[str], said: str, heads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["frontier", heads, *SMALL, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("hyperframe: ")
    assert said in captured.err
    assert captured.out == ""


def test_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frontier", str(tmp_path / "no.safetensors")]) == 1
    assert "there is no such file" in capsys.readouterr().err


def test_unknown_options_are_exit_code_2() -> None:
    assert main(["frontier", "a", "--no-such-option"]) == 2
