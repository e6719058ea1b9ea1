"""What all commands have in common: examples that parse, exit codes, `--json`, and Ctrl-C."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from hyperframe.cli import EXIT_CODES, ExitCode, main
from hyperframe.cli.app import app
from hyperframe.cli.output import echo_json
from hyperframe.integrations.capture import CapturedHeads, save
from hyperframe_attention.__main__ import _FORWARDED
from hyperframe_attention.__main__ import main as program

ROOT = Path(__file__).resolve().parents[2]
GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = dict(GROUP.commands)
# those that neither take long nor need a file
QUICK = ("components", "new")


def words(line: str) -> list[str]:
    """The arguments of a line; a pipe that is not inside quotes ends it."""
    found = shlex.split(line)
    return found[1 : found.index("|")] if "|" in found else found[1:]


EVERY_EXAMPLE = [
    words(line)
    for command in COMMANDS.values()
    for line in command.epilog.splitlines()
    if line.startswith("hyperframe ")
]


def test_every_command_is_known_to_the_program_and_has_examples_and_all_exit_codes() -> None:
    # eval and tune are forwarded as well, whether or not they are there yet
    assert set(COMMANDS) <= set(_FORWARDED)
    assert {arguments[0] for arguments in EVERY_EXAMPLE} == set(COMMANDS)
    for command in COMMANDS.values():
        for code, meaning in EXIT_CODES.items():
            assert f"{code}: {meaning}" in command.epilog


@pytest.mark.parametrize("arguments", EVERY_EXAMPLE, ids=" ".join)
def test_the_examples_of_the_help_texts_parse(arguments: list[str]) -> None:
    name, *rest = arguments
    with COMMANDS[name].make_context(name, rest) as context:
        assert context.command.name == name
        assert not context.args


def commands_of(page: Path, start: str) -> list[list[str]]:
    """The lines of code on a page that begin so, each with what continues it, as words."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    # what follows python -c may take several lines
    lines = [
        line
        for line in text.splitlines()
        if line.startswith(f"    {start} ") and not line.startswith("    python -c")
    ]
    return [
        [word for word in shlex.split(line, comments=True) if word not in ("|", "...")]
        for line in lines
    ]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_parse(page: Path) -> None:
    for _, name, *rest in commands_of(page, "hyperframe"):
        if name not in COMMANDS:  # doctor, and COMMAND itself
            assert name in (*_FORWARDED, "doctor", "COMMAND")
            continue
        with COMMANDS[name].make_context(name, rest) as context:
            assert not context.args


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_scripts_of_a_page_are_there_with_their_options(page: Path) -> None:
    for _, script, *rest in commands_of(page, "python"):
        if script.endswith(".py"):
            source = (ROOT / script).read_text(encoding="utf-8")
            for word in rest:
                assert not word.startswith("--") or f'"{word}"' in source, (script, word)


@pytest.mark.parametrize(
    "arguments", [each for each in EVERY_EXAMPLE if each[0] in QUICK], ids=" ".join
)
def test_quick_examples_run(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = [os.path.expanduser(each) for each in arguments]
    assert program(arguments) == ExitCode.DONE
    captured = capsys.readouterr()
    assert captured.out
    if "--json" in arguments:
        json.loads(captured.out)


def test_help_is_shown_with_examples_and_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for name in COMMANDS:
        result = CliRunner().invoke(app, [name, "--help"])
        assert result.exit_code == 0
        shown = " ".join(result.output.split())  # the terminal's width breaks lines
        for word in ("Examples:", f"hyperframe {name} ", "130: interrupted", "--json"):
            assert word in shown, name


def test_new_writes_what_it_says_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new", "sampler", "fresh", "--out", str(tmp_path), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    folder = Path(written["folder"])
    assert folder == tmp_path / "hyperframe-fresh"
    assert (written["kind"], written["name"]) == ("sampler", "fresh")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(written["files"]) == there
    assert (folder / written["module"]).exists()
    assert written["next"][0] == f"pip install -e '{folder}[test]'"


def test_json_holds_no_numbers_that_json_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    echo_json({"a": (float("inf"), 1.5), "b": [float("nan"), {"c": float("-inf")}], "d": True})
    text = capsys.readouterr().out

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads(text, parse_constant=refuse)
    assert found == {"a": [None, 1.5], "b": [None, {"c": None}], "d": True}


def test_ctrl_c_anywhere_is_one_line_and_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    # in a command that keeps nothing, and while the commands are imported
    with monkeypatch.context() as patch:
        patch.setattr("hyperframe.cli.components.component_rows", interrupt)
        assert program(["components"]) == ExitCode.INTERRUPTED
        assert capsys.readouterr() == ("", "interrupted\n")
    with monkeypatch.context() as patch:
        patch.setattr("hyperframe.cli.app.run", interrupt)
        assert program(["components"]) == ExitCode.INTERRUPTED
        assert capsys.readouterr() == ("", "interrupted\n")


# ----------------------------------------------------------------------------- a real SIGINT


def interrupted(
    arguments: list[str], out: Path, *, rows: int = 1
) -> subprocess.CompletedProcess[str]:
    """Start the program, send SIGINT as soon as rows are in the file, and wait for the end."""
    child = subprocess.Popen(
        [sys.executable, "-m", "hyperframe_attention", *arguments], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # a test run in the background of a shell ignores interrupts, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    limit = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < limit:
        if out.exists() and len(out.read_text().splitlines()) >= rows:
            break
        time.sleep(0.01)
    for _ in range(5):
        size = out.stat().st_size
        child.send_signal(signal.SIGINT)
        try:
            said, told = child.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            # Python drops an interrupt that comes while a finalizer runs: it goes on measuring
            assert out.stat().st_size > size
            continue
        return subprocess.CompletedProcess(arguments, child.returncode, said, told)
    child.kill()
    raise AssertionError("five interrupts were ignored")


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("heads") / "heads.safetensors"
    q, k, v = torch.randn(3, 1, 1, 256, 8, generator=torch.Generator().manual_seed(0))
    layer = CapturedHeads(layer_idx=0, query=q, key=k, value=v, scale=0.25, is_causal=True)
    save(path, {0: layer})
    return str(path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is another thing there")
def test_an_interrupted_frontier_has_whole_rows_and_goes_on_where_it_stopped(
    heads: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    budgets = ",".join(str(16 + step) for step in range(400))  # more than are ever measured
    options = ["--device", "cpu", "--detector", "strided", "--window", "8", "--sinks", "2",
               "--num-samples", "8", "--repeats", "0", "--out", str(out), "--json"]  # fmt: skip
    done = interrupted(["frontier", heads, *options, "--budget", budgets], out)
    assert done.returncode == ExitCode.INTERRUPTED, done.stderr
    assert "Traceback" not in done.stderr
    rows = rows_of(out)
    assert 1 <= len(rows) < 400
    assert json.loads(done.stdout) == rows  # one document, though it was cut short
    assert f"interrupted after {len(rows)} rows" in done.stderr
    few = ",".join(str(row["budget"]) for row in rows[:3]) + ",430"
    assert main(["frontier", heads, *options, "--budget", few]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again[:-1] == rows[:3]  # as they were, times of their making included
    assert rows_of(out) == [*rows, again[-1]]


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is another thing there")
def test_an_interrupted_bench_has_whole_rows_and_prints_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    lengths = ",".join(str(256 + step) for step in range(400))
    arguments = [
        "bench", "--device", "cpu", "--heads", "1", "--head-dim", "8", "--forward-only",
        "--no-stages", "--budget-seconds", "0.001", "--spec", "strided(num_keys=16)",
        "--lengths", lengths, "--out", str(out),
    ]  # fmt: skip
    done = interrupted(arguments, out, rows=3)  # exact ones come first
    assert done.returncode == ExitCode.INTERRUPTED, done.stderr
    assert "Traceback" not in done.stderr
    rows = rows_of(out)
    assert f"interrupted after {len(rows)} rows" in done.stderr
    assert "strided(num_keys=16)" in done.stdout
