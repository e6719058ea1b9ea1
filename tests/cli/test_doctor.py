"""`hyperframe doctor` says what is installed and what runs, and ends with 1 where something is
broken."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hyperframe import samplers
from hyperframe.cli import ExitCode
from hyperframe_attention import _doctor, _machine
from hyperframe_attention.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def examined(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", "--json"])
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert isinstance(report, dict)
    assert report["exit_code"] == code
    return code, report


def test_a_healthy_installation_is_code_0_with_versions_and_backends_that_ran(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, report = examined(capsys)
    assert (code, report["status"], report["repair"]) == (0, "healthy", [])
    assert report["versions"]["torch"] == torch.__version__
    for name in ("python", "numpy", "triton", "transformers", "numba", "scikit-learn", "typer"):
        assert name in report["versions"]
    on_cpu = {row["backend"]: row for row in report["backends"] if row["device"] == "cpu"}
    assert set(on_cpu) == {"reference", "torch", "triton", "numba"}
    for name in ("reference", "torch"):
        assert on_cpu[name]["status"] == "usable"
        assert on_cpu[name]["error"] < 1e-5
    assert on_cpu["reference"]["error"] == 0
    # a backend that cannot run here says why, which is nothing to repair
    assert "no numba kernels" in on_cpu["numba"]["reason"]
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^backend torch +usable on cpu: off the reference by ", printed, re.MULTILINE)
    assert "healthy: hyperframe-attention owns hyperframe/__init__.py" in printed


@pytest.fixture
def eager_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out kernels that run in an interpreter, which takes its time."""
    monkeypatch.setattr("hyperframe.kernels.backends.BACKENDS", ("auto", "torch", "reference"))


@pytest.mark.usefixtures("eager_only")
def test_a_backend_that_does_not_agree_with_the_reference_is_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attended = _machine._attended
    faults: dict[str, Any] = {
        "is off the reference by 1": lambda out: out + 1,
        "is off the reference by nan": lambda out: out * float("nan"),
        "RuntimeError: The size of tensor": lambda out: out[:, :, :-1],
    }
    for said, fault in faults.items():

        def broken(name: str, device: str, fault: Any = fault) -> Any:
            out = attended(name, device)
            return fault(out) if name == "torch" else out

        monkeypatch.setattr(_machine, "_attended", broken)
        (row,) = [row for row in _machine.try_backends() if row["status"] != "usable"]
        assert (row["backend"], row["status"]) == ("torch", "broken")
        assert said in row["reason"]
        json.dumps(row, allow_nan=False)
    code, report = examined(capsys)
    assert (code, report["status"]) == (1, "broken")
    assert f"the backend torch does not work on cpu ({said}" in report["verdict"]
    assert report["repair"][0].startswith("pass another backend than 'torch'")


@pytest.mark.usefixtures("eager_only")
def test_missing_and_old_packages_have_the_line_that_installs_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = _machine.version
    changed = {"matplotlib": None, "rich": "9.12.3", "torch": "2.10.1+cpu"}
    monkeypatch.setattr(_machine, "version", lambda name: changed.get(name, version(name)))
    code, report = examined(capsys)
    assert code == 0  # nothing is broken: what needs the extra says so itself
    lacking = {row["extra"]: row for row in report["extras"] if row["install"] is not None}
    assert set(lacking) == {"plot", "cli"}
    assert lacking["plot"]["missing"] == ["matplotlib"]
    assert lacking["plot"]["install"] == "pip install 'hyperframe-attention[plot]'"
    assert lacking["cli"]["too_old"] == ["rich 9.12.3 (at least 13)"]
    assert "torch 2.10.1+cpu (at least 2.11): older than anything known" in report["notes"][0]
    main(["doctor"])
    printed = capsys.readouterr().out
    assert "lacks matplotlib: pip install 'hyperframe-attention[plot]'" in printed


def test_extras_and_floors_are_those_of_the_project() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def table(requirements: list[str]) -> dict[str, str]:
        found = (re.match(r"([\w-]+)>=([\d.]+)", each) for each in requirements)
        return {each[1]: each[2] for each in found if each is not None}

    assert table(project["dependencies"]) == _machine.CORE
    declared = {
        name: table(requirements)
        for name, requirements in project["optional-dependencies"].items()
        if name not in ("all", "dev", "docs") and table(requirements)
    }
    assert declared == _machine.EXTRAS
    assert set(_machine._USES) == set(_machine.EXTRAS)


@pytest.mark.usefixtures("eager_only")
def test_a_plug_in_that_does_not_load_is_code_1_and_names_its_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "bad_dist-2.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-dist\nVersion: 2.5\n")
    (info / "entry_points.txt").write_text("[hyperframe.samplers]\nodd = no_such_module:Odd\n")
    monkeypatch.syspath_prepend(tmp_path)
    samplers.registry.refresh()
    try:
        code, report = examined(capsys)
        assert (code, report["status"]) == (1, "broken")
        assert "the sampler odd of bad-dist 2.5 is broken (ModuleNotFound" in report["verdict"]
        assert report["repair"] == ["repair or uninstall bad-dist; everything else keeps working"]
        assert [(row["name"], row["status"]) for row in report["plugins"]] == [("odd", "broken")]
    finally:
        monkeypatch.undo()
        samplers.registry.refresh()


@pytest.mark.usefixtures("eager_only")
def test_a_submodule_that_cannot_be_imported_is_code_1_and_no_backend_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        _doctor, "try_import",
        lambda name: "ModuleNotFoundError: No module named 'torch'" if "plan" in name else "ok",
    )  # fmt: skip
    code, report = examined(capsys)
    assert (code, report["status"], report["backends"]) == (1, "broken", [])
    assert report["repair"] == ["pip install hyperframe-attention"]


def test_every_gpu_is_listed_with_capability_memory_and_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2,
        get_device_capability=lambda number: (9, 0),
        get_device_name=lambda number: f"GPU {number}",
        get_device_properties=lambda number: SimpleNamespace(total_memory=80 * 2**30),
    )  # fmt: skip
    fake = SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0"))
    monkeypatch.setattr(
        _machine, "importlib", SimpleNamespace(import_module=lambda name: fake)
    )  # the real one has no GPU here
    monkeypatch.setattr(_machine, "_driver_version", lambda: "580.95")
    line, found = _machine.gpus()
    assert line == (
        "2 GPUs, the first is GPU 0 (compute capability 9.0, 80.0 GiB, driver 580.95, CUDA 13.0)"
    )
    assert [gpu["name"] for gpu in found] == ["GPU 0", "GPU 1"]
    fake.cuda.is_available = lambda: False
    assert _machine.gpus() == ("no GPU (torch is built for 13.0)", [])
    del fake.cuda
    assert _machine.gpus()[0].startswith("unknown (AttributeError")


def test_codes_are_those_of_all_commands() -> None:
    assert set(_doctor.EXIT_CODES) == set(ExitCode) - {ExitCode.GATE_FAILED}


def test_ctrl_c_is_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("hyperframe_attention.__main__.examine", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--help"], "choose detectors and budgets"), (["--version"], "hyperframe-attention "),
        (["doctor", "--help"], "hyperframe doctor --json"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
        assert said in capsys.readouterr().out
    for arguments in ([], ["dokter"], ["doctor", "--jsn"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
