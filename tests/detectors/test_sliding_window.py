"""Sliding window and sinks: the band, position by position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.detectors import create
from hyperframe.detectors.base import AbstractDetector
from hyperframe.detectors.sliding_window import SlidingWindow
from hyperframe.errors import UnsupportedError
from hyperframe.masks import HeavyMask, ListMask
from hyperframe.testing import causal_mask

sizes = st.integers(1, 30)


def shapes(num_queries: int, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(2, 4, num_queries, 3), torch.zeros(2, 2, num_keys, 3)


def expected(
    num_queries: int, num_keys: int, width: int, num_sinks: int, *, is_causal: bool
) -> torch.Tensor:
    left = width - 1 if is_causal else width // 2
    right = width - 1 - left
    dense = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for row in range(num_queries):
        position = row + num_keys - num_queries
        for j in range(num_keys):
            near = position - left <= j <= position + right
            dense[row, j] = (near or j < num_sinks) and (j <= position or not is_causal)
    return dense


@given(
    num_queries=sizes,
    num_keys=sizes,
    width=sizes,
    num_sinks=st.integers(0, 35),
    is_causal=st.booleans(),
)
def test_the_mask_is_the_band_and_the_sinks(
    num_queries: int, num_keys: int, width: int, num_sinks: int, is_causal: bool
) -> None:
    query, key = shapes(num_queries, num_keys)
    detector = SlidingWindow(width=width, num_sinks=num_sinks)
    want = expected(num_queries, num_keys, width, num_sinks, is_causal=is_causal)
    for find in (detector.find, detector.find_strict):
        mask = find(query, key, is_causal=is_causal)
        assert torch.equal(mask.to_dense(), want.expand(2, 4, -1, -1))
        assert torch.equal(mask.nnz(), want.sum().expand(2, 4))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_window_inside_the_sequence_has_width_keys(width: int) -> None:
    query, key = shapes(20, 20)
    for is_causal in (False, True):
        dense = SlidingWindow(width=width, num_sinks=0).find(query, key, is_causal=is_causal)
        assert dense.to_dense()[0, 0, 10].sum() == width
        assert dense.to_dense()[0, 0, 10, 10]


@pytest.mark.parametrize(
    "spec",
    [
        "sliding_window(width=6, num_sinks=3)",
        "sliding_window(width=40, num_sinks=0)",
        "block_list(blocks=((0,0),(1,0),(2,1),(3,0),(3,2)), block_size=5)",
        "block_list(blocks=((1,0,0),(0,2,1),(2,0)), block_size=7)",
        "sliding_window(width=3, num_sinks=1) | block_list(blocks=((2,1),), block_size=7)",
    ],
)
@pytest.mark.parametrize("shape", [(24, 24), (17, 24), (24, 17)])
def test_the_parts_of_rectangles_tile_the_causal_whole(spec: str, shape: tuple[int, int]) -> None:
    num_queries, num_keys = shape
    query, key = shapes(num_queries, num_keys)
    detector = create(spec)
    whole = detector.find(query, key, is_causal=True).to_dense()
    offset = num_keys - num_queries
    for row in (0, 1, 5, 12, 19):
        for first, stop in ((0, 1), (0, 7), (3, 12), (7, 14), (0, 12)):
            if row >= num_queries or not stop <= row + offset <= num_keys:
                continue  # not below the diagonal
            for last in (row + 1, num_queries):
                part = detector.find_rectangle(
                    query[:, :, row:last], key[:, :, first:stop], query_start=row + offset,
                    key_start=first, first_row=row,
                )  # fmt: skip
                assert torch.equal(part.to_dense(), whole[:, :, row:last, first:stop])


@pytest.mark.parametrize("num_sinks", [0, 3, 9])
def test_a_rectangle_beyond_the_window_holds_the_sinks_alone(num_sinks: int) -> None:
    query, key = shapes(5, 6)
    detector = SlidingWindow(width=4, num_sinks=num_sinks)
    for gap in range(8):
        part = detector.find_rectangle(query, key, query_start=8 + gap, key_start=2, first_row=0)
        dense = torch.zeros(5, 6, dtype=torch.bool)
        for row in range(5):
            for j in range(6):
                dense[row, j] = 8 + gap + row - (j + 2) < 4 or j + 2 < num_sinks
        assert torch.equal(part.to_dense(), dense.expand(2, 4, -1, -1))
        assert isinstance(part, ListMask) == (gap >= 3)
        assert (part.nnz() == dense.sum()).all()


@pytest.mark.parametrize(
    "spec",
    [
        "sliding_window(width=6, num_sinks=0)",
        "sliding_window(width=3, num_sinks=0)",
        "block_list(blocks=((0,0),(1,0),(2,1),(3,0),(3,2)), block_size=5)",
        "block_list(blocks=((1,0,0),(0,2,1),(2,0)), block_size=7)",
        "sliding_window(width=3, num_sinks=0) | block_list(blocks=((2,1),), block_size=7)",
    ],
)
@pytest.mark.parametrize("shape", [(24, 24), (17, 24), (24, 17)])
def test_parts_of_a_padded_call_are_parts_of_the_whole_mask(
    spec: str, shape: tuple[int, int]
) -> None:
    num_queries, num_keys = shape
    query, key = shapes(num_queries, num_keys)
    detector, offset = create(spec), num_keys - num_queries
    for is_causal in (False, True):
        whole = detector.find(query, key, is_causal=is_causal).to_dense()
        for first, stop in ((0, 17), (4, 17), (0, 9), (5, 12), (8, 9)):
            # causal: the rows whose keys are real; otherwise all
            row = max(0, first - offset) if is_causal else 0
            last = stop - offset if is_causal else num_queries
            if row >= last:
                continue
            part = detector.find_within(
                query[:, :, row:last], key[:, :, first:stop], is_causal=is_causal,
                strict=is_causal, query_start=row + offset, key_start=first, first_row=row,
                num_queries=num_queries, num_keys=num_keys,
            )  # fmt: skip
            assert part.is_causal == is_causal
            assert torch.equal(part.to_dense(), whole[:, :, row:last, first:stop])


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_sinks_of_a_padded_call_are_its_first_real_keys(is_causal: bool) -> None:
    query, key = shapes(24, 24)
    part = SlidingWindow(width=1, num_sinks=2).find_within(
        query[:, :, 5:], key[:, :, 5:], is_causal=is_causal, query_start=5, key_start=5,
        first_row=5, num_queries=24, num_keys=24,
    )  # fmt: skip
    expected = torch.eye(19, dtype=torch.bool)
    expected[:, :2] = True
    expected = expected & causal_mask(19, 19) if is_causal else expected
    assert torch.equal(part.to_dense(), expected.expand_as(part.to_dense()))
    below = SlidingWindow(width=1, num_sinks=7).find_rectangle(
        query[:, :, 17:], key[:, :, 9:17], query_start=17, key_start=9, first_row=17, first_key=5
    )
    assert below.to_dense().sum(dim=-1).unique().tolist() == [3]  # the keys 9, 10 and 11


def test_a_positional_detector_that_does_not_know_of_padding_is_refused_by_name() -> None:
    class NoSuchForm(AbstractDetector):
        is_positional = True

        def find(self, query, key, **options) -> HeavyMask:  # type: ignore[no-untyped-def]
            return SlidingWindow(width=1).find(query, key, **options)

    query, key = shapes(6, 4)
    where = {"query_start": 0, "key_start": 0, "first_row": 0, "num_queries": 6}
    with pytest.raises(UnsupportedError, match=r"key_padding_mask.*no_such_form.*find_within"):
        NoSuchForm().find_within(query, key, **where, num_keys=6)
    assert NoSuchForm().find_within(query, key, **where, num_keys=4).num_keys == 4
