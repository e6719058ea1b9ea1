"""Kernels compile for an H100 on any machine: the interpreter takes more than the compiler does."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("compiles")]

# launched for what other kernels find, which here is nothing
NOT_REACHED = {
    "bucket_sums_kernel", "clusters_kernel", "descend_kernel", "jobs_kernel", "name_sums_kernel",
    "names_kernel", "selection_kernel", "top_kernel", "words_kernel",
}  # fmt: skip


SCRIPT = Path(__file__).with_name("dry_run.py")


def run(script: Path) -> subprocess.CompletedProcess[str]:
    """Run a script of the checkout without the interpreter of kernels."""
    options = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(SCRIPT.parents[3])
    options["PYTHONPATH"] = os.pathsep.join([root, options.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=options, cwd=root,
        timeout=900, check=False,
    )  # fmt: skip


@functools.cache
def lines() -> list[dict[str, Any]]:
    """What the script printed for all cases; it is run once."""
    done = run(SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_all_cases_compile() -> None:
    cases = {line["case"]: line["error"] for line in lines() if "case" in line}
    failed = {name: error[-1500:] for name, error in cases.items() if error}
    assert len(cases) >= 15
    assert not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())


def test_all_kernels_are_compiled_but_those_that_others_decide_on() -> None:
    compiled = {line["kernel"] for line in lines() if "kernel" in line}
    (known,) = (set(line["kernels"]) for line in lines() if "kernels" in line)
    assert known - compiled == NOT_REACHED


def test_a_kernel_that_does_not_compile_is_seen(tmp_path: Path) -> None:
    """The script fails where only the compiler does."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import dry_run, torch, triton, triton.language as tl\n"
        "@triton.jit\n"
        "def wrong_kernel(x_ptr, y_ptr, N: tl.constexpr):\n"
        "    tl.store(y_ptr + tl.arange(0, N), tl.load(x_ptr + tl.arange(0, N)))\n"
        "dry_run.pretend()\n"
        "x = torch.zeros(48)\n"
        "wrong_kernel[(1,)](x, x, N=48)\n",
        encoding="utf-8",
    )
    done = run(wrong)
    assert done.returncode != 0
    assert "power of 2" in done.stderr
