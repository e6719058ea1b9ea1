"""The accuracy gate measures what it says, and notices a backend that computes something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hyperframe.attention import HyperAttention
from hyperframe.benchmarking import (
    Shape,
    SpecMethod,
    exact_rows,
    kernel_error,
    make_inputs,
    sampled_error,
)
from hyperframe.kernels import backends, torch_backend
from hyperframe.state import AttentionState
from hyperframe.testing import dense_attention

CPU = torch.device("cpu")
SHAPE = Shape(batch=2, heads=4, kv_heads=2, length=333, head_dim=16)
METHOD = SpecMethod(
    label="blocks", is_causal=False,
    attention=HyperAttention(detector="sort_lsh(block_size=64)", num_samples=32, min_seq_len=0),
)  # fmt: skip


def inputs(kind: str = "normal", dtype: torch.dtype = torch.float32) -> Any:
    return make_inputs(kind, SHAPE, dtype=dtype, device=CPU, seed=0)


@pytest.mark.parametrize("is_causal", [False, True])
def test_exact_rows_are_rows_of_exact_attention(is_causal: bool) -> None:
    query, key, value = inputs(dtype=torch.float64)
    rows = torch.tensor([0, 5, 200, 332])
    expected = dense_attention(query, key, value, is_causal=is_causal).out[:, :, rows]
    torch.testing.assert_close(exact_rows(query, key, value, rows, is_causal=is_causal), expected)


def test_sampled_error_is_the_relative_frobenius_error() -> None:
    query, key, value = inputs(dtype=torch.float64)
    exact = dense_attention(query, key, value).out
    factor = torch.tensor([1.0, 1.1, 1.2, 1.5]).view(1, 4, 1, 1)
    found = sampled_error(query, key, value, factor * exact, is_causal=False, seed=0, bound=0.3)
    assert found.worst == pytest.approx(0.5)
    assert found.median == pytest.approx(0.1)
    assert found.rows == 333
    assert found.reason is None
    found = sampled_error(query, key, value, 2 * exact, is_causal=False, seed=0, bound=0.3)
    assert "relative error 1.00 is above 0.3" in str(found.reason)


def test_one_value_that_is_not_finite_fails_wherever_it_is() -> None:
    query, key, value = inputs()
    out = dense_attention(query, key, value).out.float()
    out[1, 2, 17, 3] = float("inf")
    found = sampled_error(query, key, value, out, is_causal=False, seed=0)
    assert found.reason == "the output is not finite"


def check(backend: str, dtype: torch.dtype, *, backward: bool = False) -> Any:
    return kernel_error(
        METHOD, SHAPE, inputs="planted", dtype=dtype, device=CPU, backend=backend, seed=0,
        backward=backward,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_honest_backends_pass(backend: str, dtype: torch.dtype) -> None:
    found = check(backend, dtype, backward=True)
    assert found.reason is None
    assert found.length == 333
    assert 0 <= found.grad_ours <= found.grad_limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backend_that_is_slightly_wrong_fails(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any, **options: Any) -> AttentionState:
        state = torch_backend.attend(*arguments, **options)
        return AttentionState(out=state.out * 1.05, lse=state.lse)

    monkeypatch.setitem(backends._IMPLEMENTED, "reference", wrong)
    assert "kernel error" in str(check("reference", dtype).reason)


def test_wrong_gradient_of_a_right_output_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(query: torch.Tensor, *arguments: Any, **options: Any) -> AttentionState:
        state = torch_backend.attend(query, *arguments, **options)
        # the gradient of the query is off by a tenth, the output is not
        out = state.out + 0.1 * (query - query.detach())
        return AttentionState(out=out, lse=state.lse)

    monkeypatch.setitem(backends._IMPLEMENTED, "reference", wrong)
    assert check("reference", torch.float32).reason is None
    assert "gradient error" in str(check("reference", torch.float32, backward=True).reason)


def test_reference_that_is_far_from_the_torch_backend_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # noise in float32 is as far from the reference as other noise: twice that is no limit
    attend = torch_backend.attend

    def noise(query: torch.Tensor, *arguments: Any, **options: Any) -> AttentionState:
        state = attend(query, *arguments, **options)
        if query.dtype == torch.float64:
            return state
        return AttentionState(out=torch.randn_like(state.out), lse=state.lse)

    monkeypatch.setitem(backends._IMPLEMENTED, "torch", noise)
    found = check("torch", torch.float32)
    assert found.limit == 1e-4
    assert found.reason is not None


def test_planted_inputs_tell_sight_from_blindness() -> None:
    shape = Shape(batch=1, heads=2, kv_heads=2, length=4096, head_dim=64)
    query, key, value = make_inputs("planted", shape, dtype=torch.float32, device=CPU, seed=0)
    errors = {}
    for detector in ("sort_lsh", "sliding_window(width=1, num_sinks=0)"):
        out = HyperAttention(detector=detector, min_seq_len=0)(query, key, value)
        errors[detector] = sampled_error(query, key, value, out, is_causal=False, seed=0).median
    assert errors["sort_lsh"] < 0.4 < 0.55 < errors["sliding_window(width=1, num_sinks=0)"]
