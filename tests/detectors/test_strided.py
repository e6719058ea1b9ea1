"""Strided: keys at multiples of a stride, and how the stride is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.detectors.strided import Strided
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.masks import RangeMask
from tests import pattern_laws


def stride_of(position: int, num_keys: int, budget: int, *, is_causal: bool) -> int:
    if not is_causal:
        return -(-num_keys // budget)
    stride = 1
    while budget * stride <= position:
        stride *= 2
    return stride


def expected(
    detector: Strided, num_queries: int, num_keys: int, *, is_causal: bool, first_real: int
) -> torch.Tensor:
    del first_real  # padding does not move the pattern
    dense = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for row in range(num_queries):
        position = row + num_keys - num_queries
        stride = stride_of(position, num_keys, detector.num_keys, is_causal=is_causal)
        for j in range(num_keys):
            dense[row, j] = (position - j) % stride == 0 and (j <= position or not is_causal)
    return dense.expand(2, 4, -1, -1)


@given(
    num_queries=pattern_laws.SIZES,
    num_keys=pattern_laws.SIZES,
    budget=st.integers(1, 20),
    is_causal=st.booleans(),
)
def test_the_mask_is_the_definition(
    num_queries: int, num_keys: int, budget: int, is_causal: bool
) -> None:
    detector = Strided(num_keys=budget)
    pattern_laws.mask_is_the_definition(
        detector, expected, num_queries, num_keys, is_causal=is_causal
    )


@given(
    num_queries=pattern_laws.SIZES,
    num_keys=pattern_laws.SIZES,
    budget=st.integers(1, 20),
    data=st.data(),
)
def test_a_rectangle_holds_its_part_of_the_causal_pattern(
    num_queries: int, num_keys: int, budget: int, data: st.DataObject
) -> None:
    detector = Strided(num_keys=budget)
    pattern_laws.rectangle_is_a_part(detector, expected, num_queries, num_keys, data)


@given(
    num_queries=pattern_laws.SIZES,
    num_keys=pattern_laws.SIZES,
    budget=st.integers(1, 20),
    is_causal=st.booleans(),
    data=st.data(),
)
def test_what_padding_leaves_is_a_part_of_the_whole_pattern(
    num_queries: int, num_keys: int, budget: int, is_causal: bool, data: st.DataObject
) -> None:
    detector = Strided(num_keys=budget)
    pattern_laws.rest_of_padding_is_a_part(
        detector, expected, num_queries, num_keys, data, is_causal=is_causal
    )


@pattern_laws.SHAPES
@pattern_laws.SIDES
@pattern_laws.MODES
@pytest.mark.parametrize(
    "spec",
    ["strided(num_keys=1)", "strided(num_keys=3)", "strided(num_keys=8)", "strided(num_keys=50)"],
)
def test_attention_goes_by_the_pattern_in_every_strategy_and_under_padding(
    spec: str, mode: str, sides: tuple[int, int], shape: tuple[int, int]
) -> None:
    pattern_laws.attention_goes_by_the_pattern(spec, expected, mode, sides, shape)


@pytest.mark.parametrize("budget", [1, 3, 8])
def test_no_row_holds_more_than_its_budget_and_causal_rows_hold_more_than_half(budget: int) -> None:
    query, key = pattern_laws.shapes(300, 300)
    detector = Strided(num_keys=budget)
    full = detector.find(query, key).to_dense().sum(dim=-1)
    assert full.max() <= budget
    causal = detector.find(query, key, is_causal=True).to_dense()[0, 0].sum(dim=-1)
    assert causal.max() == budget
    assert (causal[budget:] * 2 > budget).all()
    assert (causal[:budget] == torch.arange(1, budget + 1)).all()


@pytest.mark.parametrize("length", [299, 300, 1000])
def test_a_plan_holds_no_more_than_a_few_budgets_for_each_row(length: int) -> None:
    query, key = pattern_laws.shapes(length, length)
    for is_causal in (False, True):
        for part in Strided(num_keys=16).find(query, key, is_causal=is_causal).parts():
            assert isinstance(part, RangeMask)
            assert part.max_keys <= 4 * 16
            # tiles are mostly full: a slot for every row, and less than a tile more for each class
            assert part.query_order.shape[-1] <= 6 * length
    # and strides of three powers of 2 share a mask
    assert len(list(Strided(num_keys=16).find(query, key, is_causal=True).parts())) <= 3


def test_what_follows_a_row_does_not_change_its_stride() -> None:
    detector = Strided(num_keys=5)
    short, long = (
        detector.find(*pattern_laws.shapes(length, length), is_causal=True).to_dense()
        for length in (40, 90)
    )
    assert torch.equal(short, long[:, :, :40, :40])


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"num_keys": 0}, ArgumentError, r"strided: num_keys=0 .*positive integer.*at least 1"),
        ({"num_keys": 2.0}, ArgumentTypeError, r"strided: num_keys=2.0 .*float.*plain int"),
        ({"num_keys": True}, ArgumentTypeError, r"strided: num_keys=True .*bool"),
    ],
)
def test_bad_parameters_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Strided(**options)
