"""The kernel that selects from long rows gives what a sort does; on a GPU, else interpreted."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.kernels.select import select_top, torch_select_top

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from hyperframe.kernels.triton import select_long as kernels  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"


def rows(num_rows: int, length: int, values: int, seed: int) -> torch.Tensor:
    """Scores of few values, so that many are equal; some are below 0, some not numbers."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, values, (num_rows, length), generator=g) / 7
    scores[torch.rand(scores.shape, generator=g) < 0.05] = float("nan")
    scores[torch.rand(scores.shape, generator=g) < 0.02] = float("inf")
    scores[torch.rand(scores.shape, generator=g) < 0.02] = -0.0
    return scores.to(DEVICE)


def compare(scores: torch.Tensor, stop: torch.Tensor, count: int) -> None:
    found = kernels.triton_select_top(scores, stop, count)
    for mine, expected in zip(found, torch_select_top(scores, stop, count), strict=True):
        assert mine.dtype == expected.dtype
        assert torch.equal(mine, expected)


@given(
    length=st.integers(1, 300), count=st.integers(1, 70), values=st.integers(-1, 200),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_any_row_gives_its_first_largest_scores(
    length: int, count: int, values: int, seed: int
) -> None:
    scores = rows(5, length, values, seed)
    stop = torch.tensor([0, 1, length // 2, length, length + 9], device=DEVICE)
    compare(scores, stop, count)


@pytest.mark.parametrize("length, count, values", [
    (4097, 3, 5), (5000, 40, 2), (9001, 17, 10**6), (20000, 128, 9), (300000, 5, 1000),
])  # fmt: skip
def test_long_rows_are_selected_by_groups(length: int, count: int, values: int) -> None:
    assert kernels.group_of(length, count) > 0
    scores = rows(4, length, values, 0)
    compare(scores, torch.tensor([10, 4099, length - 5, length], device=DEVICE), count)


@pytest.mark.parametrize("length, count, values", [
    (1024, 100, 10**6), (2000, 112, 9), (4096, 30, 10**6), (4096, 600, 300),
])  # fmt: skip
def test_rows_of_which_few_columns_are_there_are_selected_alike(
    length: int, count: int, values: int
) -> None:
    scores = rows(7, length, values, 1)
    places = [0, 5, length // 4, length // 4 + 1, length // 2, length // 2 + 1, length]
    compare(scores, torch.tensor(places, device=DEVICE), count)


def test_what_is_behind_the_stop_is_not_read() -> None:
    scores = torch.full((2, 6000), float("nan"), device=DEVICE)
    scores[:, :70] = torch.rand(2, 70).to(DEVICE)
    stop = torch.tensor([70, 0], device=DEVICE)
    index, best, taken = kernels.triton_select_top(scores, stop, 9)
    assert taken.tolist() == [9, 0]
    assert torch.equal(best[0], scores[0, index[0].long()])
    assert index[1].tolist() == [6000] * 9


def test_leading_shapes_are_kept() -> None:
    scores = torch.rand(2, 3, 4, 50, device=DEVICE).transpose(0, 1)
    stop = torch.arange(4, device=DEVICE).expand(3, 2, 4) * 9
    compare(scores, stop, 6)


def test_what_the_kernel_does_not_take_is_said() -> None:
    assert kernels.supports(torch.rand(2, 131072), 256)
    assert kernels.supports(torch.rand(1, 1 << 20), 128)
    assert not kernels.supports(torch.rand(1, 131072), 1025)
    assert not kernels.supports(torch.rand(2, 9).double(), 1)
    assert not kernels.supports(torch.rand(2, 9), 0)


def test_the_operator_keeps_the_rules_of_torch() -> None:
    scores = torch.rand(2, 3, 40, device=DEVICE)
    stop = torch.full((2, 3), 30, device=DEVICE)
    torch.library.opcheck(torch.ops.hyperframe.select_top.default, (scores, stop, 5))
    index, best, taken = select_top(scores, stop, count=5)
    assert torch.equal(best, scores.gather(-1, index.long()))
    assert (taken == 5).all()
