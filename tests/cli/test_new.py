"""`hyperframe new` writes packages that pass their own tests, and refuses what cannot work."""

from __future__ import annotations

import os
import subprocess
import sys
from email.parser import Parser
from pathlib import Path

import pytest

from hyperframe.cli import main
from hyperframe.cli.components import KINDS
from hyperframe.cli.new import package_files
from hyperframe.errors import ArgumentError
from hyperframe_attention.__main__ import main as program

AUTHOR = 'Ada "the first" Lovelace'


def python(*arguments: object, site: Path, cwd: Path) -> str:
    environ = {**os.environ, "PYTHONPATH": str(site), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environ, capture_output=True,
        text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_what_it_writes_installs_and_passes_its_own_tests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for kind in KINDS:
        arguments = ["new", kind, f"fresh_{kind}", "--out", str(tmp_path), "--author", AUTHOR]
        assert program(arguments) == 0
        folder = tmp_path / f"hyperframe-fresh-{kind}"
        assert f"pip install -e '{folder}[test]'" in capsys.readouterr().out
        folders.append(folder)
    site = tmp_path / "site"
    offline = ("-q", "--no-deps", "--no-index", "--no-build-isolation")
    python("-m", "pip", "install", *offline, "--target", site, *folders, site=site, cwd=tmp_path)
    # from the first one's folder, by its settings
    tests = [folder / "tests" for folder in folders]
    said = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, site=site, cwd=folders[0])
    assert "12 passed" in said
    for kind in KINDS:
        (info,) = site.glob(f"hyperframe_fresh_{kind}-0.1.0.dist-info")
        about = Parser().parsestr((info / "METADATA").read_text(encoding="utf-8"))
        assert about["Author"] == AUTHOR
        assert about["Requires-Dist"] == "hyperframe-attention>=0.1"
        assert (site / f"hyperframe_fresh_{kind}" / "py.typed").exists()


def test_what_it_writes_is_in_the_style_of_this_repository(tmp_path: Path) -> None:
    for kind in KINDS:
        assert main(["new", kind, f"fresh_{kind}", "--out", str(tmp_path)]) == 0
    rules = ("--isolated", "--line-length", "100")
    for command in (("check", "--select", "B,C4,E,F,PT,RUF,SIM,UP,W"), ("format", "--check")):
        python("-m", "ruff", *command, *rules, "-q", tmp_path, site=tmp_path, cwd=tmp_path)


def test_no_author_is_no_line(tmp_path: Path) -> None:
    assert main(["new", "sampler", "fresh", "--out", str(tmp_path / "not" / "there")]) == 0
    folder = tmp_path / "not" / "there" / "hyperframe-fresh"
    assert "authors" not in (folder / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name, hint",
    [
        ("my-topk", "for example my_topk"), ("MyTopK", "for example mytopk"),
        ("a__b", "for example a_b"), ("_a", "for example a"), ("a(b=1)", "for example a_b_1"),
        ("for", "no Python keyword"), ("1st", "no name for a module"), ("", "no name for a module"),
        ("ä", "no name for a module"), ("../a", "no name for a module"),
    ],
)  # fmt: skip
def test_a_bad_name_is_refused(
    name: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new", "detector", "--out", str(tmp_path), "--", name]) == 1
    said = capsys.readouterr().err
    assert f"hyperframe: new detector {name!r}: is no name for a module and a spec" in said
    assert hint in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kind, name, owner",
    [
        ("detector", "quest", "the built-in detector .detectors.quest:Quest"),
        ("sampler", "uniform", "the built-in sampler .samplers.uniform:Uniform"),
        ("detector", "torch", "torch is something that the package imports"),
        ("estimator", "row_sums", "RowSums is something that the package imports"),
    ],
)
def test_a_taken_name_is_refused_and_its_owner_named(kind: str, name: str, owner: str) -> None:
    with pytest.raises(ArgumentError, match=f"new {kind} '{name}': .*{owner}"):
        package_files(kind, name)


def test_a_name_of_another_kind_is_free() -> None:
    assert (
        'quest = "hyperframe_quest.sampler:Quest"'
        in package_files("sampler", "quest")["pyproject.toml"]
    )


def test_another_kind_and_a_folder_that_exists_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new", "detektor", "fresh", "--out", str(tmp_path)]) == 1
    assert "Did you mean 'detector'?" in capsys.readouterr().err
    (tmp_path / "hyperframe-fresh").mkdir()
    assert main(["new", "detector", "fresh", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'hyperframe-fresh'} is there already; remove it" in said
    assert list((tmp_path / "hyperframe-fresh").iterdir()) == []


def test_the_file_for_the_templates_is_never_half_filled() -> None:
    for kind in KINDS:
        for path, text in package_files(kind, "fresh", author=AUTHOR).items():
            assert "$" not in text, path
