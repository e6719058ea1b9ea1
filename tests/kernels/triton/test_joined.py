"""Lists side by side: the kernel copies what the torch form does, whatever is stored once."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.kernels.joined import side_by_side, torch_side_by_side

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from hyperframe.kernels.triton import joined as kernels  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SHAPE = (2, 4, 3)


@st.composite
def pieces(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    length = draw(st.sampled_from([0, 1, 5, 130]))
    lists, counts = (
        tuple(draw(st.sampled_from(sizes)) for sizes in ((1, 2), (1, 2, 4), (1, 3)))
        for _ in range(2)
    )
    index = torch.randint(99, (*lists, length), generator=g)
    if draw(st.booleans()):
        index = index.int()
    if draw(st.booleans()):  # a slice of something longer, its slots in steps
        index = torch.stack([index, index], dim=-1)[..., 1]
    return index.to(DEVICE), torch.randint(length + 1, counts, generator=g).to(DEVICE)


@given(given=st.lists(pieces(), min_size=2, max_size=7))
def test_lists_side_by_side_are_those_of_torch(
    given: list[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    index, count = [piece for piece, _ in given], [used for _, used in given]
    mine = kernels.triton_side_by_side(index, count, SHAPE, 99)
    expected = torch_side_by_side(index, count, SHAPE, 99)
    assert mine.dtype == expected.dtype == torch.int32
    assert torch.equal(mine, expected)


def test_a_single_piece_is_handed_on_as_it_is() -> None:
    index, count = torch.arange(6).view(1, 1, 2, 3), torch.ones(1, 1, 2, dtype=torch.int64)
    joined, used = side_by_side([(index, count)], (1, 2, 2), fill=9)
    assert used is not None
    assert joined.shape == (1, 2, 2, 3)
    assert joined.data_ptr() == index.data_ptr() or joined.shape[1] == 2
    assert torch.equal(joined, index.expand(1, 2, 2, 3))
    assert torch.equal(used, count.expand(1, 2, 2))
