"""Strided: keys at multiples of a stride, and how the stride is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.attention import HyperAttention
from hyperframe.detectors import create
from hyperframe.detectors.strided import Strided
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.masks import RangeMask
from hyperframe.testing import masked_attention

sizes = st.integers(1, 40)


def shapes(num_queries: int, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(2, 4, num_queries, 3), torch.zeros(2, 2, num_keys, 3)


def stride_of(position: int, num_keys: int, budget: int, *, is_causal: bool) -> int:
    if not is_causal:
        return -(-num_keys // budget)
    stride = 1
    while budget * stride <= position:
        stride *= 2
    return stride


def expected(
    detector: Strided, num_queries: int, num_keys: int, *, is_causal: bool
) -> torch.Tensor:
    dense = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for row in range(num_queries):
        position = row + num_keys - num_queries
        stride = stride_of(position, num_keys, detector.num_keys, is_causal=is_causal)
        for j in range(num_keys):
            dense[row, j] = (position - j) % stride == 0 and (j <= position or not is_causal)
    return dense.expand(2, 4, -1, -1)


@given(num_queries=sizes, num_keys=sizes, budget=st.integers(1, 20), is_causal=st.booleans())
def test_the_mask_is_the_definition(
    num_queries: int, num_keys: int, budget: int, is_causal: bool
) -> None:
    query, key = shapes(num_queries, num_keys)
    detector = Strided(num_keys=budget)
    want = expected(detector, num_queries, num_keys, is_causal=is_causal)
    for find in (detector.find, detector.find_strict):
        mask = find(query, key, is_causal=is_causal)
        assert mask.is_causal == is_causal
        assert torch.equal(mask.to_dense(), want)
        assert torch.equal(mask.nnz(), want.sum(dim=(-2, -1)))


@given(num_queries=sizes, num_keys=sizes, budget=st.integers(1, 20), data=st.data())
def test_a_rectangle_holds_its_part_of_the_causal_pattern(
    num_queries: int, num_keys: int, budget: int, data: st.DataObject
) -> None:
    query, key = shapes(num_queries, num_keys)
    detector = Strided(num_keys=budget)
    whole, offset = (
        expected(detector, num_queries, num_keys, is_causal=True),
        num_keys - num_queries,
    )
    row = data.draw(st.integers(0, num_queries - 1))
    last = data.draw(st.integers(row + 1, num_queries))
    stop = data.draw(st.integers(0, num_keys))
    if not 0 < stop <= row + offset:
        return  # not below the diagonal
    first = data.draw(st.integers(0, stop - 1))
    part = detector.find_rectangle(
        query[:, :, row:last], key[:, :, first:stop], query_start=row + offset, key_start=first,
        first_row=row,
    )  # fmt: skip
    assert not part.is_causal
    assert torch.equal(part.to_dense(), whole[:, :, row:last, first:stop])


@given(
    num_queries=sizes,
    num_keys=sizes,
    budget=st.integers(1, 20),
    is_causal=st.booleans(),
    data=st.data(),
)
def test_what_padding_leaves_is_a_part_of_the_whole_pattern(
    num_queries: int, num_keys: int, budget: int, is_causal: bool, data: st.DataObject
) -> None:
    query, key = shapes(num_queries, num_keys)
    detector = Strided(num_keys=budget)
    offset = num_keys - num_queries
    first = data.draw(st.integers(0, num_keys - 1))
    stop = data.draw(st.integers(first + 1, num_keys))
    whole = expected(detector, num_queries, num_keys, is_causal=is_causal)
    # causal: the rows whose keys are real; otherwise any
    row, last = max(0, first - offset), stop - offset
    if not is_causal:
        row = data.draw(st.integers(0, num_queries - 1))
        last = data.draw(st.integers(row + 1, num_queries))
    if row >= last:
        return
    part = detector.find_within(
        query[:, :, row:last], key[:, :, first:stop], is_causal=is_causal, strict=is_causal,
        query_start=row + offset, key_start=first, first_row=row, num_queries=num_queries,
        num_keys=num_keys,
    )  # fmt: skip
    assert part.is_causal == is_causal
    assert torch.equal(part.to_dense(), whole[:, :, row:last, first:stop])


@pytest.mark.parametrize("shape", [(40, 40), (33, 40), (40, 33)])
@pytest.mark.parametrize("sides", [(0, 0), (11, 0), (0, 13), (9, 10), (20, 19)])
@pytest.mark.parametrize("mode", ["full", "single_pass", "recursive"])
@pytest.mark.parametrize(
    "spec",
    ["strided(num_keys=1)", "strided(num_keys=3)", "strided(num_keys=8)", "strided(num_keys=50)"],
)
def test_attention_goes_by_the_pattern_in_every_strategy_and_under_padding(
    spec: str, mode: str, sides: tuple[int, int], shape: tuple[int, int]
) -> None:
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(x.shape, generator=g, dtype=torch.float64) for x in shapes(*shape))
    real = torch.arange(shape[1])
    real = (sides[0] <= real) & (real < shape[1] - sides[1])
    padding = torch.stack([real, torch.ones_like(real)])
    is_causal = mode != "full"
    held = torch.cat([expected(create(spec), *shape, is_causal=is_causal)[:1] for _ in range(2)])
    held = held & padding[:, None, None]
    if mode == "recursive":  # where leaves are single keys: each row also holds its own
        position = torch.arange(shape[0])[:, None] + shape[1] - shape[0]
        held = held | ((position == torch.arange(shape[1])) & padding[:, None, None])
    want = masked_attention(query, key, key, held)
    attention = HyperAttention(
        detector=spec, num_samples=0, min_seq_len=0, causal=mode if is_causal else "single_pass"
    )
    out, lse = attention(
        query, key, key, is_causal=is_causal, key_padding_mask=padding, return_lse=True
    )
    torch.testing.assert_close(out, want.out)
    torch.testing.assert_close(lse, want.lse)


@pytest.mark.parametrize("budget", [1, 3, 8])
def test_no_row_holds_more_than_its_budget_and_causal_rows_hold_more_than_half(budget: int) -> None:
    query, key = shapes(300, 300)
    detector = Strided(num_keys=budget)
    full = detector.find(query, key).to_dense().sum(dim=-1)
    assert full.max() <= budget
    causal = detector.find(query, key, is_causal=True).to_dense()[0, 0].sum(dim=-1)
    assert causal.max() == budget
    assert (causal[budget:] * 2 > budget).all()
    assert (causal[:budget] == torch.arange(1, budget + 1)).all()


@pytest.mark.parametrize("length", [299, 300, 1000])
def test_a_plan_holds_no_more_than_a_few_budgets_for_each_row(length: int) -> None:
    query, key = shapes(length, length)
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
        detector.find(*shapes(length, length), is_causal=True).to_dense() for length in (40, 90)
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
