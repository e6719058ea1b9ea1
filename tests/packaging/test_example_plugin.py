"""The example plug-in is a wheel like anybody's: installed elsewhere, its name works here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "hyperframe-topk-detector"

ATTEND = """
import torch
from hyperframe import HyperAttention, detectors
from hyperframe_attention.__main__ import main
attention = HyperAttention(detector="tile_topk(num_keys=600)", num_samples=0, min_seq_len=0)
q, k, v = torch.randn(3, 1, 2, 600, 16, dtype=torch.float64).unbind()
for is_causal in (False, True):
    out = attention(q, k, v, is_causal=is_causal)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    torch.testing.assert_close(out, exact)  # all keys are held
assert type(detectors.create("tile_topk")).__module__ == "hyperframe_topk_detector.detector"
assert main(["components", "--kind", "detector", "--json"]) == 0
"""


def python(*arguments: object, site: Path | None = None, cwd: Path | None = None) -> str:
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    if site is not None:
        environ["PYTHONPATH"] = str(site)
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the installed wheel of the example."""
    folder = tmp_path_factory.mktemp("example")
    source = folder / "source"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    offline = ("-q", "--no-deps", "--no-index")
    wheels = folder / "wheels"
    python("-m", "pip", "wheel", *offline, "--no-build-isolation", "-w", wheels, source)
    (wheel,) = wheels.glob("hyperframe_topk_detector-0.1.0-*.whl")
    python("-m", "pip", "install", *offline, "--target", folder / "site", wheel)
    return folder / "site"


def test_its_name_works_and_is_listed_with_its_distribution(site: Path, tmp_path: Path) -> None:
    rows = json.loads(python("-W", "error", "-c", ATTEND, site=site, cwd=tmp_path))
    (row,) = [row for row in rows if row["name"] == "tile_topk"]
    assert (row["origin"], row["status"], row["reason"]) == ("plugin", "ok", "")
    assert (row["distribution"], row["version"]) == ("hyperframe-topk-detector", "0.1.0")
    assert row["summary"] == "Keys with most softmax mass of a tile's mean queries."
    assert row["default_spec"] == "tile_topk(tile_size=64, num_keys=256, block_size=1, num_means=4)"
    assert row["capabilities"]["strict"] is True
    assert all(row["status"] == "ok" for row in rows)


@pytest.mark.slow
def test_it_passes_its_own_tests(site: Path) -> None:
    source = site.parent / "source"
    said = python("-m", "pytest", "-q", "-p", "no:cacheprovider", site=site, cwd=source)
    assert "6 passed" in said


def test_it_is_small() -> None:
    (module,) = (EXAMPLE / "src").rglob("detector.py")
    assert len(module.read_text(encoding="utf-8").splitlines()) < 80
