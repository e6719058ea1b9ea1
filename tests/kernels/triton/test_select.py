"""The kernel of distinct keys gives what torch does, bit for bit; on a GPU, else interpreted."""

from __future__ import annotations

import math
import os

import pytest
import torch

from hyperframe.kernels.lists import torch_best_distinct

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from hyperframe.kernels.triton import select as kernels  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"


def compare(
    index: torch.Tensor, weight: torch.Tensor | None, *, limit: int, k: int,
    count: torch.Tensor | None = None, start: int = 0, stop: torch.Tensor | None = None,
    is_sorted: bool = False,
) -> None:  # fmt: skip
    index, weight, count, stop = (
        None if x is None else x.to(DEVICE) for x in (index, weight, count, stop)
    )
    found = kernels.triton_best_distinct(
        index, weight, count, stop, start, limit, k, is_sorted=is_sorted
    )
    expected = torch_best_distinct(index, weight, count, stop, start, limit, k)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.int32
        assert torch.equal(a, b)


def draw(
    length: int, limit: int, dtype: torch.dtype | None = None, *, shape: tuple[int, ...] = (3,)
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Keys, some of them outside, and weights whose sums are exact, many of them ties."""
    g = torch.Generator().manual_seed(0)
    index = torch.randint(-2, limit + 3, (*shape, length), generator=g).int()
    if dtype is None:
        return index, None
    return index, torch.randint(-1, 4, (*shape, length), generator=g).to(dtype)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("length, limit, k", [
    (1, 3, 1), (33, 20, 5), (70, 300, 64), (70, 300, 200), (300, 40, 100), (513, 2000, 256),
])  # fmt: skip
def test_any_length_and_any_number_of_keys(
    length: int, limit: int, k: int, is_sorted: bool, dtype: torch.dtype | None
) -> None:
    index, weight = draw(length, limit, dtype)
    if is_sorted:
        index = index.sort(dim=-1).values
    compare(index, weight, limit=limit, k=k, is_sorted=is_sorted)


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("is_sorted", [False, True])
def test_bounds_of_slots_and_keys_are_broadcast(is_sorted: bool, dtype: torch.dtype | None) -> None:
    index, weight = draw(50, 30, dtype, shape=(2, 3, 2))
    index = index.sort(dim=-1).values if is_sorted else index
    count, stop = torch.tensor([[60], [17], [0]]), torch.tensor([11, 40])
    bounds = {"count": count, "stop": stop, "start": 3, "is_sorted": is_sorted}
    compare(index, weight, limit=30, k=8, **bounds)
    compare(index[:1, :, :1].expand(2, -1, 5, -1), None, limit=30, k=8, start=2)
    compare(index.unsqueeze(0).transpose(0, 2), None, limit=30, k=8)


def test_keys_that_fill_31_bits() -> None:
    index = torch.tensor([[2**32 + 5, 2**31 - 2, -(2**40), 7, 2**31 - 2]])
    weight = torch.tensor([[9.0, 1.0, 9.0, 1.5, 1.0]])
    compare(index, weight, limit=2**31 - 1, k=1)
    compare(index, None, limit=2**31 - 1, k=4)


def test_weights_that_are_nothing_infinite_or_no_number() -> None:
    index = torch.tensor([[4, 2, 2, 6, 6, 0, 0, 8, 9, 9]])
    weight = torch.tensor([[0.0, -math.inf, 1.0, math.nan, -1.0, math.inf, 2.0, -0.0, 1e-45, -3.0]])
    for k in range(1, 9):
        compare(index, weight, limit=10, k=k)


def test_sums_are_those_of_float64_but_for_rounding() -> None:
    g = torch.Generator().manual_seed(3)
    index = torch.randint(0, 40, (4, 200), generator=g)
    weight = torch.rand((4, 200), generator=g)
    total = torch.zeros(4, 40, dtype=torch.float64).scatter_add_(-1, index, weight.double())
    expected = total.topk(10, dim=-1).indices.sort(dim=-1).values
    found, _ = kernels.triton_best_distinct(
        index.to(DEVICE), weight.to(DEVICE), None, None, 0, 40, 10, is_sorted=False
    )
    assert torch.equal(found.cpu().long(), expected)


def test_what_the_kernel_does_not_take_is_said() -> None:
    index = torch.zeros(2, 70, dtype=torch.int32)
    assert kernels.supports(index, None)
    assert kernels.supports(index.long(), torch.zeros(2, 70))
    assert not kernels.supports(index, torch.zeros(2, 70, dtype=torch.float64))
    assert not kernels.supports(index[:, :0], None)
    assert not kernels.supports(torch.zeros(1, 5000, dtype=torch.int32), None)
