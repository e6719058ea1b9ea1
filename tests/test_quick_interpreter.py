"""The quick interpreter gives the bits of Triton's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hyperframe import HyperAttention
from tests import quick_interpreter

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the GPU here"
)


@triton.jit
def _last_above(first, first_size, second, second_size):
    takes_second = second_size > 2
    return tl.where(takes_second, second, first), tl.where(takes_second, second_size, first_size)


@triton.jit
def _either(first, second):
    return first | second


@triton.jit
def _kernel(numbers, sizes, out, bits, scanned, ROWS: tl.constexpr, COLS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    number, size = tl.load(numbers + at), tl.load(sizes + at)
    column, _ = tl.reduce((number, size), 0, _last_above, keep_dims=True)
    row, _ = tl.reduce((number, size), 1, _last_above)
    tl.store(out + tl.arange(0, COLS)[None, :], column)
    tl.store(out + COLS + tl.arange(0, ROWS), row)
    tl.store(bits, tl.reduce(size, None, _either))
    for axis in tl.static_range(2):
        for reverse in tl.static_range(2):
            found, _ = tl.associative_scan((number, size), axis, _last_above, reverse=reverse == 1)
            tl.store(scanned + (2 * axis + reverse) * ROWS * COLS + at, found)


@triton.jit
def _of_three(out):
    tl.store(out + tl.arange(0, 3), 1)


def on_both(call: Callable[[], Any]) -> tuple[Any, Any]:
    """What a call gives with the quick interpreter, and with Triton's own."""
    quick = call()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, original in quick_interpreter.REPLACED:
            assert getattr(owner, name) is not original
            patch.setattr(owner, name, original)
        return quick, call()


@pytest.mark.parametrize("rows, columns", [(8, 4), (2, 16), (1, 8), (16, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_reductions_and_scans_by_a_function(dtype: torch.dtype, rows: int, columns: int) -> None:
    g = torch.Generator().manual_seed(rows)
    numbers = torch.randint(-9, 9, (rows, columns), generator=g).to(dtype)
    sizes = torch.randint(0, 5, (rows, columns), generator=g, dtype=torch.int32)

    def call() -> tuple[torch.Tensor, ...]:
        out, bits = torch.empty(rows + columns, dtype=dtype), torch.empty(1, dtype=torch.int32)
        scanned = torch.empty(4, rows, columns, dtype=dtype)
        _kernel[(1,)](numbers, sizes, out, bits, scanned, rows, columns)
        return out, bits, scanned

    for quick, slow in zip(*on_both(call), strict=True):
        assert torch.equal(quick, slow)
    out, _, scanned = call()
    last = [row[sizes[i] > 2] for i, row in enumerate(numbers)]
    for found, row, given in zip(out[columns:], last, numbers, strict=True):
        assert found == (row[-1] if len(row) else given[0])
    assert torch.equal(scanned[0, -1], out[:columns])


@pytest.mark.parametrize("spec", ["sort_lsh(block_size=8)", "heavy_columns(num_columns=8)", "fast"])
def test_calls_have_the_same_bits(spec: str) -> None:
    attention = HyperAttention(detector=spec, num_samples=8, min_seq_len=0, backend="triton")
    g = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 2, 45, 8, generator=g) for _ in range(3)]

    def call() -> tuple[torch.Tensor, ...]:
        tensors = [x.clone().requires_grad_() for x in given]
        out = attention(*tensors, is_causal=spec == "fast")
        return (out, *torch.autograd.grad(out.square().sum(), tensors))

    for quick, slow in zip(*on_both(call), strict=True):
        assert torch.equal(quick, slow)


def test_what_triton_refuses_is_refused() -> None:
    def call() -> str:
        with pytest.raises(Exception, match="power of 2") as caught:
            _of_three[(1,)](torch.zeros(4))
        return type(caught.value).__name__

    quick, slow = on_both(call)
    assert quick == slow
