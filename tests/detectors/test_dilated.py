"""Dilated window: near keys with gaps, position by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.attention import HyperAttention
from hyperframe.detectors import create
from hyperframe.detectors.dilated import Dilated
from hyperframe.detectors.sliding_window import SlidingWindow
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.masks import ListMask
from hyperframe.testing import masked_attention

sizes = st.integers(1, 40)


def shapes(num_queries: int, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(2, 4, num_queries, 3), torch.zeros(2, 2, num_keys, 3)


def expected(
    detector: Dilated, num_queries: int, num_keys: int, *, is_causal: bool
) -> torch.Tensor:
    left = detector.width - 1 if is_causal else detector.width // 2
    dense = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for row in range(num_queries):
        for step in range(detector.width):
            j = row + num_keys - num_queries + (step - left) * detector.dilation
            if 0 <= j < num_keys:
                dense[row, j] = True
    return dense.expand(2, 4, -1, -1)


@given(
    num_queries=sizes,
    num_keys=sizes,
    width=st.integers(1, 20),
    dilation=st.integers(1, 9),
    is_causal=st.booleans(),
)
def test_the_mask_is_the_definition(
    num_queries: int, num_keys: int, width: int, dilation: int, is_causal: bool
) -> None:
    query, key = shapes(num_queries, num_keys)
    detector = Dilated(width=width, dilation=dilation)
    want = expected(detector, num_queries, num_keys, is_causal=is_causal)
    for find in (detector.find, detector.find_strict):
        mask = find(query, key, is_causal=is_causal)
        assert mask.is_causal == is_causal
        assert torch.equal(mask.to_dense(), want)
        assert torch.equal(mask.nnz(), want.sum(dim=(-2, -1)))


@given(
    num_queries=sizes,
    num_keys=sizes,
    width=st.integers(1, 20),
    dilation=st.integers(1, 9),
    data=st.data(),
)
def test_a_rectangle_holds_its_part_of_the_causal_pattern(
    num_queries: int, num_keys: int, width: int, dilation: int, data: st.DataObject
) -> None:
    query, key = shapes(num_queries, num_keys)
    detector = Dilated(width=width, dilation=dilation)
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
    width=st.integers(1, 20),
    dilation=st.integers(1, 9),
    is_causal=st.booleans(),
    data=st.data(),
)
def test_what_padding_leaves_is_a_part_of_the_whole_pattern(
    num_queries: int, num_keys: int, width: int, dilation: int, is_causal: bool, data: st.DataObject
) -> None:
    query, key = shapes(num_queries, num_keys)
    detector = Dilated(width=width, dilation=dilation)
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
    "spec", ["dilated(width=1)", "dilated(width=6, dilation=3)", "dilated(width=40, dilation=2)"]
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


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_window_inside_the_sequence_has_width_keys(width: int, is_causal: bool) -> None:
    query, key = shapes(60, 60)
    dense = Dilated(width=width, dilation=3).find(query, key, is_causal=is_causal).to_dense()
    assert dense[0, 0, 30].sum() == width
    assert dense[0, 0, 30, 30]
    held = dense[0, 0, 30].nonzero().flatten()
    assert (held.diff() == 3).all()
    assert held[-1] == 30 if is_causal else held[width // 2] == 30


@given(num_queries=sizes, num_keys=sizes, width=sizes, is_causal=st.booleans())
def test_without_gaps_it_is_the_sliding_window(
    num_queries: int, num_keys: int, width: int, is_causal: bool
) -> None:
    query, key = shapes(num_queries, num_keys)
    one, two = (
        detector.find(query, key, is_causal=is_causal).to_dense()
        for detector in (Dilated(width=width, dilation=1), SlidingWindow(width=width, num_sinks=0))
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize("gap, longest", [(1, 3), (4, 3), (5, 2), (8, 2), (9, 1), (12, 1), (13, 0)])
def test_lists_are_no_longer_than_what_the_first_row_reaches(gap: int, longest: int) -> None:
    query, key = shapes(5, 12)
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
