"""Dilated window: near keys with gaps, position by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.detectors.dilated import Dilated
from hyperframe.detectors.sliding_window import SlidingWindow
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.masks import ListMask
from tests import pattern_laws


def expected(
    detector: Dilated, num_queries: int, num_keys: int, *, is_causal: bool, first_real: int
) -> torch.Tensor:
    del first_real  # padding does not move the pattern
    left = detector.width - 1 if is_causal else detector.width // 2
    dense = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for row in range(num_queries):
        for step in range(detector.width):
            j = row + num_keys - num_queries + (step - left) * detector.dilation
            if 0 <= j < num_keys:
                dense[row, j] = True
    return dense.expand(2, 4, -1, -1)


@given(
    num_queries=pattern_laws.SIZES,
    num_keys=pattern_laws.SIZES,
    width=st.integers(1, 20),
    dilation=st.integers(1, 9),
    is_causal=st.booleans(),
)
def test_the_mask_is_the_definition(
    num_queries: int, num_keys: int, width: int, dilation: int, is_causal: bool
) -> None:
    detector = Dilated(width=width, dilation=dilation)
    pattern_laws.mask_is_the_definition(
        detector, expected, num_queries, num_keys, is_causal=is_causal
    )


@given(
    num_queries=pattern_laws.SIZES,
    num_keys=pattern_laws.SIZES,
    width=st.integers(1, 20),
    dilation=st.integers(1, 9),
    data=st.data(),
)
def test_a_rectangle_holds_its_part_of_the_causal_pattern(
    num_queries: int, num_keys: int, width: int, dilation: int, data: st.DataObject
) -> None:
    detector = Dilated(width=width, dilation=dilation)
    pattern_laws.rectangle_is_a_part(detector, expected, num_queries, num_keys, data)


@given(
    num_queries=pattern_laws.SIZES,
    num_keys=pattern_laws.SIZES,
    width=st.integers(1, 20),
    dilation=st.integers(1, 9),
    is_causal=st.booleans(),
    data=st.data(),
)
def test_what_padding_leaves_is_a_part_of_the_whole_pattern(
    num_queries: int, num_keys: int, width: int, dilation: int, is_causal: bool, data: st.DataObject
) -> None:
    detector = Dilated(width=width, dilation=dilation)
    pattern_laws.rest_of_padding_is_a_part(
        detector, expected, num_queries, num_keys, data, is_causal=is_causal
    )


@pattern_laws.SHAPES
@pattern_laws.SIDES
@pattern_laws.MODES
@pytest.mark.parametrize(
    "spec", ["dilated(width=1)", "dilated(width=6, dilation=3)", "dilated(width=40, dilation=2)"]
)
def test_attention_goes_by_the_pattern_in_every_strategy_and_under_padding(
    spec: str, mode: str, sides: tuple[int, int], shape: tuple[int, int]
) -> None:
    pattern_laws.attention_goes_by_the_pattern(spec, expected, mode, sides, shape)


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_window_inside_the_sequence_has_width_keys(width: int, is_causal: bool) -> None:
    query, key = pattern_laws.shapes(60, 60)
    dense = Dilated(width=width, dilation=3).find(query, key, is_causal=is_causal).to_dense()
    assert dense[0, 0, 30].sum() == width
    assert dense[0, 0, 30, 30]
    held = dense[0, 0, 30].nonzero().flatten()
    assert (held.diff() == 3).all()
    assert held[-1] == 30 if is_causal else held[width // 2] == 30


@given(
    num_queries=pattern_laws.SIZES,
    num_keys=pattern_laws.SIZES,
    width=pattern_laws.SIZES,
    is_causal=st.booleans(),
)
def test_without_gaps_it_is_the_sliding_window(
    num_queries: int, num_keys: int, width: int, is_causal: bool
) -> None:
    query, key = pattern_laws.shapes(num_queries, num_keys)
    one, two = (
        detector.find(query, key, is_causal=is_causal).to_dense()
        for detector in (Dilated(width=width, dilation=1), SlidingWindow(width=width, num_sinks=0))
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize("gap, longest", [(1, 3), (4, 3), (5, 2), (8, 2), (9, 1), (12, 1), (13, 0)])
def test_lists_are_no_longer_than_what_the_first_row_reaches(gap: int, longest: int) -> None:
    query, key = pattern_laws.shapes(5, 12)
    part = Dilated(width=4, dilation=4).find_rectangle(
        query, key, query_start=11 + gap, first_row=11 + gap
    )
    assert isinstance(part, ListMask)
    assert part.key_index.shape[-1] == longest
    assert part.nnz().max() <= 5 * longest
    # one table, whatever the number of heads and batch items
    assert part.key_index.stride()[:2] == (0, 0)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"width": 0}, ArgumentError, r"dilated: width=0 .*positive integer.*at least 1"),
        ({"dilation": 0}, ArgumentError, r"dilated: dilation=0 .*positive integer.*at least 1"),
        ({"width": 2.0}, ArgumentTypeError, r"dilated: width=2.0 .*float.*plain int"),
        ({"dilation": 2.0}, ArgumentTypeError, r"dilated: dilation=2.0 .*float.*plain int"),
        ({"width": True}, ArgumentTypeError, r"dilated: width=True .*bool"),
    ],
)
def test_bad_parameters_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Dilated(**options)
