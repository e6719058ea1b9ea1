"""Our wheel and the HTTP/2 library `hyperframe` share one folder: both orders, and every way out.

Builds our wheel, takes the other one from the package index, and installs both into throw-away
environments that borrow torch from the one the tests run in.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("coexistence")]

ROOT = Path(__file__).resolve().parents[2]
NEIGHBOUR = "hyperframe==6.1.0"
REPAIR = "pip install --force-reinstall --no-deps hyperframe-attention"
UNREACHABLE = ("connection", "timed out", "timeout", "resolve", "(from versions: none)", "ssl")

FACADE = """
import torch
from hyperframe_attention import HyperAttention, hyper_attention
import hyperframe_attention
for name in hyperframe_attention.__all__:
    getattr(hyperframe_attention, name)
x = torch.randn(1, 2, 600, 16)
out = HyperAttention(min_seq_len=0)(x, x, x, is_causal=True)
assert out.shape == x.shape and torch.isfinite(out).all()
"""
SUBMODULE = "from hyperframe.attention import HyperAttention"
FRAMES = """
from hyperframe.exceptions import InvalidFrameError
from hyperframe.flags import Flag
from hyperframe.frame import DataFrame, Frame
frame = DataFrame(1, data=b"hello")
again, length = Frame.parse_frame_header(memoryview(frame.serialize()[:9]))
assert (type(again), length) == (DataFrame, 5)
"""
ROOT_IMPORT = "import hyperframe; hyperframe.HyperAttention"
# torch takes most of the time of a process; it is imported once, and the process copied
EACH_ALONE = """
import os, sys, traceback, warnings
import torch
assert "hyperframe" not in sys.modules
for code in sys.argv[1:]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of threads; torch's have nothing to do
        child = os.fork()
    if not child:
        try:
            exec(code, {})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed: {code}")
"""


def run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def must(*command: object, cwd: Path | None = None) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def our_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ours")
    must(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=ROOT)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def their_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("theirs")
    pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:")
    done = run(*pip, "--retries", "1", "--timeout", "20", "-d", out, NEIGHBOUR)
    if done.returncode != 0:
        said = (done.stdout + done.stderr).lower()
        if any(word in said for word in UNREACHABLE):
            pytest.skip(f"the package index cannot be reached, so {NEIGHBOUR} cannot be had")
        pytest.fail(done.stdout + done.stderr)
    (wheel,) = out.glob("*.whl")
    return wheel


@dataclass(frozen=True)
class Environment:
    """A throw-away virtual environment without pip, driven by the pip of the tests' own."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def install(self, wheel: Path) -> None:
        self._pip("install", "--no-deps", "--no-index", "--force-reinstall", wheel)

    def uninstall(self, name: str) -> None:
        self._pip("uninstall", "--yes", name)

    def runs(self, *codes: str) -> None:
        """Run each piece of code in a process that has imported torch, and nothing of ours."""
        must(self.python, "-W", "error", "-c", EACH_ALONE, *codes, cwd=self.folder)

    def fails(self, code: str) -> str:
        done = run(self.python, "-c", code, cwd=self.folder)
        assert done.returncode != 0
        return done.stderr

    def doctor(self) -> dict[str, Any]:
        doctor = (self.python, "-m", "hyperframe_attention", "doctor")
        done = run(*doctor, "--json", cwd=self.folder)
        report = json.loads(done.stdout)
        assert done.returncode == report["exit_code"]
        assert isinstance(report, dict)
        return report

    @property
    def package(self) -> Path:
        (folder,) = self.folder.glob("lib/python*/site-packages")
        return folder / "hyperframe"

    def _pip(self, *arguments: object) -> None:
        must(sys.executable, "-m", "pip", "-q", "--python", self.python, *arguments)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    if os.name == "nt":
        pytest.skip("the throw-away environments are laid out for POSIX")
    made = Environment(tmp_path / "venv")
    must(sys.executable, "-m", "venv", "--without-pip", made.folder)
    # a plain line in a .pth file adds the folder and does not run the .pth files inside it, so our
    # own editable install stays out
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (made.package.parent / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return made


def test_wheel_holds_both_packages_and_none_of_the_neighbours_files(our_wheel: Path) -> None:
    with zipfile.ZipFile(our_wheel) as archive:
        names = set(archive.namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {
        "hyperframe",
        "hyperframe_attention",
    }
    for package in ("hyperframe", "hyperframe_attention"):
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= names
    assert "hyperframe/attention.py" in names
    assert names.isdisjoint(f"hyperframe/{name}.py" for name in ("frame", "flags", "exceptions"))


def test_wheels_fight_over_two_files_only(our_wheel: Path, their_wheel: Path) -> None:
    with zipfile.ZipFile(our_wheel) as ours, zipfile.ZipFile(their_wheel) as theirs:
        both = set(ours.namelist()) & set(theirs.namelist())
    assert both <= {"hyperframe/__init__.py", "hyperframe/py.typed"}


def test_ours_last_owns_the_name(
    environment: Environment, our_wheel: Path, their_wheel: Path
) -> None:
    environment.install(their_wheel)
    environment.install(our_wheel)
    environment.runs(FACADE, SUBMODULE, ROOT_IMPORT, FRAMES)
    report = environment.doctor()
    assert report["exit_code"] == 0
    assert report["init_owner"] == "hyperframe-attention"
    assert report["repair"] == []
    assert report["versions"]["hyperframe (HTTP/2)"] == "6.1.0"

    # pip takes the shared __init__.py with it: what is left is a namespace package
    environment.uninstall("hyperframe")
    assert not (environment.package / "__init__.py").exists()
    environment.runs(FACADE, SUBMODULE)
    report = environment.doctor()
    assert report["exit_code"] == 1
    assert report["init_file"] is None
    assert report["repair"] == [REPAIR]

    environment.install(our_wheel)
    environment.runs(ROOT_IMPORT)
    assert environment.doctor()["exit_code"] == 0


def test_theirs_last_leaves_our_submodules_working(
    environment: Environment, our_wheel: Path, their_wheel: Path
) -> None:
    environment.install(our_wheel)
    environment.install(their_wheel)
    environment.runs(FACADE, SUBMODULE, FRAMES)
    assert "HyperAttention" in environment.fails(ROOT_IMPORT)
    report = environment.doctor()
    assert report["exit_code"] == 1
    assert report["init_owner"] == "hyperframe 6.1.0"
    assert report["repair"] == [REPAIR]
    assert set(report["submodules"].values()) == {"ok"}
    text = run(environment.python, "-m", "hyperframe_attention", "doctor", cwd=environment.folder)
    assert text.returncode == 1
    assert "hyperframe/__init__.py belongs to hyperframe 6.1.0" in text.stdout
    assert REPAIR in text.stdout

    environment.uninstall("hyperframe-attention")
    environment.runs(FRAMES)
    assert not (environment.package / "attention.py").exists()


def test_repair_gives_the_name_back_and_keeps_the_neighbour(
    environment: Environment, our_wheel: Path, their_wheel: Path
) -> None:
    environment.install(our_wheel)
    environment.install(their_wheel)
    environment.install(our_wheel)
    environment.runs(FACADE, ROOT_IMPORT, FRAMES)
    assert environment.doctor()["exit_code"] == 0


def test_doctor_speaks_when_our_files_are_gone(environment: Environment, our_wheel: Path) -> None:
    environment.install(our_wheel)
    (environment.package / "attention.py").unlink()
    report = environment.doctor()
    assert (report["exit_code"], report["status"]) == (1, "broken")
    assert report["missing_files"] == ["hyperframe/attention.py"]
    assert report["repair"] == [REPAIR]
    said = environment.fails("from hyperframe_attention import HyperAttention")
    assert "python -m hyperframe_attention doctor" in said

    shutil.rmtree(environment.package)
    assert environment.doctor()["status"] == "broken"


def test_doctor_names_the_folder_that_hides_ours(
    environment: Environment, our_wheel: Path, their_wheel: Path, tmp_path: Path
) -> None:
    # what an editable install next to the neighbour looks like: two folders, the wrong one first
    elsewhere = tmp_path / "elsewhere"
    with zipfile.ZipFile(our_wheel) as archive:
        archive.extractall(elsewhere)
    (environment.package.parent / "elsewhere.pth").write_text(f"{elsewhere}\n")
    environment.install(their_wheel)
    report = environment.doctor()
    assert (report["exit_code"], report["status"]) == (1, "broken")
    assert f"hides {elsewhere / 'hyperframe'}" in report["verdict"]
    assert report["repair"][0].startswith("pip uninstall hyperframe")
