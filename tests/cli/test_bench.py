"""`hyperframe bench` parses, measures, prints, writes, and says with its exit code how it went."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hyperframe.benchmarking import ROW_KEYS, SUITES, methods
from hyperframe.cli import main
from hyperframe.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "bench", "--device", "cpu", "--lengths", "600", "--heads", "2", "--head-dim", "16",
    "--budget-seconds", "0.005", "--no-stages",
]  # fmt: skip
SPEC = ["--spec", "sort_lsh(block_size=64)", "--max-error", "10"]


def test_table_rows_and_plot(tmp_path: Path) -> None:
    out, plot = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    arguments = [*TINY, *SPEC, "--out", str(out), "--plot", str(plot), "--lengths", "300,600"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "sort_lsh(block_size=64)" in result.output
    assert "fwd+bwd" in result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(list(row) == list(ROW_KEYS) for row in rows)
    assert {row["n"] for row in rows} == {300, 600}
    assert plot.exists()


def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--causal", "recursive", "--min-seq-len", "128", "--json", "--forward-only"]
    assert main([*TINY, *SPEC, *arguments]) == 0
    rows = json.loads(capsys.readouterr().out)
    (ours,) = (row for row in rows if row["kind"] == "approximate")
    assert ours["label"] == "sort_lsh(block_size=64), recursive"
    assert "causal='recursive'" in ours["spec"]
    assert ours["is_causal"]
    assert ours["forward_backward"] is None


def test_failed_gate_is_exit_code_3_and_no_speed_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = methods.SpecMethod.prepare

    def noise(self: Any, query: Any, key: Any, *, backend: str, seed: int) -> Any:
        call = prepare(self, query, key, backend=backend, seed=seed)
        return call if backend == "torch" else lambda q, k, v: call(q, k, v).roll(1, dims=2)

    monkeypatch.setattr(methods.SpecMethod, "prepare", noise)
    assert main([*TINY, *SPEC, "--backend", "reference"]) == 3
    printed = capsys.readouterr().out
    assert "refused" in printed
    assert "x / " not in printed


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--suite", "sortlsh"], "Did you mean 'sort_lsh'"),
        (["--suite", "tiles", "--spec", "sort_lsh"], "give one of them"),
        (["--spec", "sort_lhs"], "sort_lsh"),
        (["--lengths", "1k"], "write 1024,2048"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--causal", "yes", "--spec", "sort_lsh"], "causal='yes'"),
        (["--backend", "numba"], "numba"),
        (["--kv-heads", "3"], "kv_heads=3"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_exit_code_1(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("hyperframe: ")
    assert said in captured.err
    assert "Traceback" not in captured.err


def test_unknown_option_is_exit_code_2() -> None:
    assert main(["bench", "--no-such-option"]) == 2


def test_help_names_suites_and_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["bench", "--help"])
    assert result.exit_code == 0
    for name in SUITES:
        assert name in result.output
    assert "gate" in result.output


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == %r:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

sys.meta_path.insert(0, Blocker())
from hyperframe_attention.__main__ import main
sys.exit(main(%r))
"""


def blocked(package: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED % (package, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.mark.parametrize(
    "package, extra", [("typer", "cli"), ("rich", "cli"), ("matplotlib", "plot")]
)
def test_absent_extra_is_one_sentence_with_the_command(
    package: str, extra: str, tmp_path: Path
) -> None:
    arguments = [*TINY, *SPEC, "--forward-only", "--plot", str(tmp_path / "plot.png")]
    done = blocked(package, arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    assert package in done.stderr
    assert f"pip install 'hyperframe-attention[{extra}]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""  # said before anything is measured


def test_doctor_needs_no_extra() -> None:
    done = blocked("typer", ["doctor", "--json"])
    assert json.loads(done.stdout)["exit_code"] == done.returncode


def test_hidden_package_points_to_the_doctor() -> None:
    done = blocked("hyperframe", TINY)
    assert done.returncode == 1
    assert "hyperframe_attention doctor" in done.stderr


def test_program_is_declared_where_it_works_under_either_owner() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'hyperframe = "hyperframe_attention.__main__:main"' in text
    declared = [
        entry.value
        for entry in metadata.entry_points(group="console_scripts", name="hyperframe")
        if entry.dist is not None and entry.dist.name == "hyperframe-attention"
    ]
    # an older editable install does not have it yet
    assert declared in ([], ["hyperframe_attention.__main__:main"])
