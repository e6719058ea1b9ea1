"""What the Triton backend takes, and what it refuses: with the reason and what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyperframe import HyperAttention
from hyperframe.errors import BackendUnavailableError, UnsupportedError
from hyperframe.kernels import (
    attend,
    available_backends,
    backends,
    resolve_backend,
    triton_backend,
)
from hyperframe.kernels.exact import full_plan

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is there, and its interpreter is on."""
    monkeypatch.setattr(triton_backend, "has_triton", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")


REFUSED = {
    "float64": (torch.float64, 8, 8, ["takes float32, bfloat16 and float16", "are float64"]),
    "head_dim": (torch.float32, 257, 8, ["heads up to 256 wide", "head_dim is 257"]),
    "value": (torch.float32, 8, 257, ["up to 256 wide", "the head_dim of value is 257"]),
}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype, d, d_v, words", REFUSED.values(), ids=REFUSED)
def test_inputs_that_the_kernels_cannot_take_are_refused(
    dtype: torch.dtype, d: int, d_v: int, words: list[str]
) -> None:
    q, v = (torch.zeros(1, 1, 4, width, dtype=dtype) for width in (d, d_v))
    with pytest.raises(UnsupportedError) as caught:
        attend(q, q, v, full_plan(q, q, is_causal=False), scale=1.0, backend="triton")
    message = str(caught.value)
    expected = ["backend: 'triton'", "backend='torch' takes them", "change the inputs", *words]
    assert all(word in message for word in expected), message
    # where nothing is known of the inputs there is nothing to refuse
    assert resolve_backend("triton", CPU) == "triton"


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 256])
def test_every_other_dtype_and_width_is_taken(dtype: torch.dtype, width: int) -> None:
    q = torch.zeros(1, 1, 4, width, dtype=dtype)
    assert triton_backend.why_not_inputs(q, q) is None
    assert resolve_backend("triton", CPU, query=q, value=q) == "triton"


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("shape, what", [((65536, 1), "batch items"), ((1, 65536), "query heads")])
def test_more_batch_items_or_heads_than_a_grid_has_are_refused(
    shape: tuple[int, int], what: str
) -> None:
    q = torch.zeros((), dtype=torch.float16).expand(*shape, 4, 8)
    with pytest.raises(UnsupportedError, match=f"up to 65,535 {what}, and there are 65,536"):
        resolve_backend("triton", CPU, query=q, value=q)
    fits = q[:65535, :65535]
    assert resolve_backend("triton", CPU, query=fits, value=fits) == "triton"


@pytest.mark.usefixtures("interpreted")
def test_a_whole_call_refuses_float64_too() -> None:
    q = torch.zeros(1, 1, 40, 8, dtype=torch.float64)
    attention = HyperAttention(backend="triton", min_seq_len=0, num_samples=4)
    with pytest.raises(UnsupportedError, match="backend: 'triton' takes float32"):
        attention(q, q, q)


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_backend, "has_triton", lambda: False)
    for device in (CPU, CUDA):
        with pytest.raises(BackendUnavailableError) as caught:
            resolve_backend("triton", device)
        message = str(caught.value)
        assert "triton is not installed" in message
        assert "pip install 'hyperframe-attention[triton]'" in message
        assert "choose one of reference, torch, or 'auto'" in message
        assert "triton" not in available_backends(device)
        assert resolve_backend("auto", device) == "torch"


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match=r"run on NVIDIA GPUs .* are on cpu .*INTERP"):
        resolve_backend("triton", CPU)
    assert available_backends(CPU) == ("reference", "torch")


def test_a_cpu_without_the_interpreter_is_refused_in_a_fresh_process() -> None:
    pytest.importorskip("triton")
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import torch\n"
        "from hyperframe import hyper_attention\n"
        "from hyperframe.errors import BackendUnavailableError\n"
        "q = torch.zeros(1, 1, 40, 8)\n"
        "try:\n"
        "    hyper_attention(q, q, q, backend='triton', min_seq_len=0)\n"
        "except BackendUnavailableError as error:\n"
        "    assert 'TRITON_INTERPRET=1' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('not refused')\n"
        "hyper_attention(q, q, q, backend='auto', min_seq_len=0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.usefixtures("interpreted")
def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the inputs are on meta" in str(triton_backend.why_not(META))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "run on NVIDIA GPUs" in str(triton_backend.why_not(CUDA))
    monkeypatch.setattr(torch.version, "hip", None)
    assert triton_backend.why_not(CUDA) is None


@pytest.mark.usefixtures("interpreted")
def test_auto_takes_the_kernels_on_a_gpu_for_what_they_take() -> None:
    # a choice by name: nothing runs, so that no GPU is needed
    cases = [
        (torch.bfloat16, 64, "triton"), (torch.float32, 256, "triton"),
        (torch.float64, 64, "torch"), (torch.float32, 257, "torch"),
    ]  # fmt: skip
    for dtype, width, expected in cases:
        q = torch.zeros(1, 1, 4, width, dtype=dtype)
        assert resolve_backend("auto", CUDA, query=q, value=q) == expected
        assert resolve_backend("auto", CPU, query=q, value=q) == "torch"
    assert resolve_backend("auto", CUDA) == "triton"
    assert set(available_backends(CPU)) == {"reference", "torch", "triton"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, expected", [(torch.bfloat16, "triton"), (torch.float64, "torch")])
def test_auto_runs_what_it_says(
    dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    run_triton, run_torch = triton_backend.attend_all, backends._IMPLEMENTED["torch"]
    monkeypatch.setattr(
        triton_backend, "attend_all", lambda *x, **y: called.append("triton") or run_triton(*x, **y)
    )
    monkeypatch.setitem(
        backends._IMPLEMENTED, "torch", lambda *x, **y: called.append("torch") or run_torch(*x, **y)
    )
    q = torch.randn(1, 1, 40, 16, device="cuda").to(dtype)
    attend(q, q, q, full_plan(q, q, is_causal=False), scale=1.0)
    assert called == [expected]
    assert resolve_backend("auto", q.device, query=q, value=q) == expected
    assert "triton" in available_backends("cuda")
