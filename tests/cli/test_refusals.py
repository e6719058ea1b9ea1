"""What no command can do is one sentence before time is spent: places, devices; and no memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from hyperframe.cli import ExitCode, main
from hyperframe.cli.app import app
from hyperframe.cli.parsing import check_plot, device_of
from hyperframe.errors import ArgumentError

GROUP: Any = typer.main.get_command(app)
TEXT = str(Path(__file__))
# of each command, what it needs to come as far as its --out: no model is loaded, nothing measured
INTO_A_FOLDER = {
    "eval": ["eval", "absent/model", "--text", TEXT],
    "report": ["report", "absent.safetensors"],
    "new": ["new", "detector", "a_new_one"],
}
INTO_A_FILE = {
    "bench": [
        "bench", "--spec", "strided", "--lengths", "256", "--heads", "1", "--head-dim", "8",
        "--forward-only", "--no-stages", "--budget-seconds", "0.001",
    ],
    "frontier": ["frontier", "absent.safetensors"],
    "capture": ["capture", "absent/model", "--text", TEXT],
    "tune": ["tune", "absent/model", "--text", TEXT],
}  # fmt: skip
DEVICE = ["--device", "cpu"]


def said_by(
    arguments: list[str], where: Path, capsys: pytest.CaptureFixture[str], *, option: str = "--out"
) -> str:
    rest = [] if arguments[0] == "new" else DEVICE
    assert main([*arguments, option, str(where), *rest]) == ExitCode.FAILED
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"hyperframe: {option} {where}: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_every_command_that_writes_is_here() -> None:
    writers = {
        name
        for name, command in GROUP.commands.items()
        if any("--out" in parameter.opts for parameter in command.params)
    }
    assert writers == set(INTO_A_FILE) | set(INTO_A_FOLDER)


@pytest.mark.parametrize("name", INTO_A_FILE)
def test_a_file_cannot_be_a_folder_or_stand_in_a_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "file").write_text("")
    assert "is a folder; name a file in it" in said_by(INTO_A_FILE[name], tmp_path, capsys)
    said = said_by(INTO_A_FILE[name], tmp_path / "file" / "x", capsys)
    assert "its folder cannot be made (File exists)" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", INTO_A_FOLDER)
def test_a_folder_cannot_be_a_file_or_stand_in_one(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "file"
    file.write_text("")
    for where in (file, file / "deep" / "er"):
        said = said_by(INTO_A_FOLDER[name], where, capsys)
        assert f"{file} is a file; name a folder" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", [*INTO_A_FILE, *INTO_A_FOLDER])
def test_a_folder_that_may_not_be_written_to_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    may = os.access
    # whoever may write everywhere, as root does, sees the refusal too
    monkeypatch.setattr(
        "hyperframe.cli.parsing.os.access",
        lambda path, mode: Path(path) != tmp_path and may(path, mode),
    )
    said = said_by((INTO_A_FILE | INTO_A_FOLDER)[name], tmp_path / "new", capsys)
    assert "may not be written to" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["bench", "frontier"])
def test_a_plot_says_by_its_name_what_it_is(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for where, why in ((tmp_path, "is a folder"), (tmp_path / "x.doc", "one of .png, .svg, .pdf")):
        assert why in said_by(INTO_A_FILE[name], where, capsys, option="--plot")
    check_plot(tmp_path / "x.SVG")


@pytest.mark.parametrize("name", ["meta", "no such device", "hpu"])
def test_devices_that_cannot_compute_are_refused_by_name(name: str) -> None:
    with pytest.raises(ArgumentError, match=rf"--device {name}: .*cpu"):
        device_of(name)


def raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    "error, said",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore"),
            "out of memory: CUDA out of memory. Tried to allocate 9 GiB.; ask for a shorter",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of memory: [enforce fail] DefaultCPUAllocator",
        ),
        (MemoryError(), "out of memory: MemoryError"),
        (OSError(28, "No space left on device", "x/rows.jsonl"), "x/rows.jsonl: No space left"),
        (OSError("a socket"), "a socket"),
    ],
)
def test_no_memory_and_no_space_are_one_line_and_code_1_in_every_command(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("hyperframe.cli.components.component_rows", raiser(error))
    assert main(["components"]) == ExitCode.FAILED
    captured = capsys.readouterr()
    assert captured.err.startswith(f"hyperframe: {said}")
    assert captured.err.count("\n") == 1


def test_other_errors_are_mistakes_of_the_program_and_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "hyperframe.cli.components.component_rows", raiser(RuntimeError("no such thing"))
    )
    with pytest.raises(RuntimeError, match="no such thing"):
        main(["components"])


WITHOUT_TRANSFORMERS = """
import sys

sys.modules["transformers"] = None
from hyperframe.cli import main

codes = [main([name, "absent", "--text", sys.argv[0]]) for name in ("eval", "tune", "capture")]
codes.append(main(["eval", "--help"]))
sys.exit(0 if codes == [1, 1, 1, 0] else 3)
"""


def test_without_transformers_models_are_one_sentence_and_help_is_there(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_TRANSFORMERS, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=240,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stderr.splitlines()
    assert len(said) == 3
    for line in said:
        assert line.startswith("hyperframe: hyperframe.integrations.transformers needs transform")
        assert "pip install 'hyperframe-attention[hf]'" in line
    assert "--text" in done.stdout
