"""Butterfly: blocks whose numbers differ in one bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.attention import HyperAttention
from hyperframe.detectors import create
from hyperframe.detectors.butterfly import Butterfly
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.masks import ListMask
from hyperframe.testing import masked_attention

sizes = st.integers(1, 40)


def shapes(num_queries: int, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(2, 4, num_queries, 3), torch.zeros(2, 2, num_keys, 3)


def expected(
    detector: Butterfly, num_queries: int, num_keys: int, *, is_causal: bool
) -> torch.Tensor:
    dense = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for row in range(num_queries):
        position = row + num_keys - num_queries
        own = max(0, position) // detector.block_size
        for j in range(num_keys):
            differing = bin(own ^ (j // detector.block_size)).count("1")
            dense[row, j] = differing <= 1 and (j <= position or not is_causal)
    return dense.expand(2, 4, -1, -1)


@given(num_queries=sizes, num_keys=sizes, block_size=st.integers(1, 50), is_causal=st.booleans())
def test_the_mask_is_the_definition(
    num_queries: int, num_keys: int, block_size: int, is_causal: bool
) -> None:
    query, key = shapes(num_queries, num_keys)
    detector = Butterfly(block_size=block_size)
    want = expected(detector, num_queries, num_keys, is_causal=is_causal)
    for find in (detector.find, detector.find_strict):
        mask = find(query, key, is_causal=is_causal)
        assert mask.is_causal == is_causal
        assert torch.equal(mask.to_dense(), want)
        assert torch.equal(mask.nnz(), want.sum(dim=(-2, -1)))


@given(num_queries=sizes, num_keys=sizes, block_size=st.integers(1, 50), data=st.data())
def test_a_rectangle_holds_its_part_of_the_causal_pattern(
    num_queries: int, num_keys: int, block_size: int, data: st.DataObject
) -> None:
    query, key = shapes(num_queries, num_keys)
    detector = Butterfly(block_size=block_size)
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
    block_size=st.integers(1, 50),
    is_causal=st.booleans(),
    data=st.data(),
)
def test_what_padding_leaves_is_a_part_of_the_whole_pattern(
    num_queries: int, num_keys: int, block_size: int, is_causal: bool, data: st.DataObject
) -> None:
    query, key = shapes(num_queries, num_keys)
    detector = Butterfly(block_size=block_size)
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
    "spec", ["butterfly(block_size=1)", "butterfly(block_size=6)", "butterfly(block_size=64)"]
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


@pytest.mark.parametrize("length", [16, 64, 60])
def test_as_many_layers_as_bits_reach_every_key(length: int) -> None:
    query, key = shapes(length, length)
    held = Butterfly(block_size=4).find(query, key).to_dense()[0, 0].double()
    reached = torch.eye(length, dtype=torch.float64)
    layers = (length // 4 - 1).bit_length()
    for layer in range(layers):
        assert not (reached > 0).all(), layer
        reached = reached @ held
    assert (reached > 0).all()


def test_a_row_holds_log2_blocks_and_its_own() -> None:
    query, key = shapes(64 * 8, 64 * 8)
    mask = Butterfly(block_size=8).find(query, key)
    assert isinstance(mask, ListMask)
    assert mask.key_index.shape[2:] == (64, 7 * 8)
    assert mask.key_index.stride()[:2] == (0, 0)
    assert (mask.to_dense().sum(dim=-1) == 7 * 8).all()


def test_rows_that_stand_between_blocks_are_cut_into_tiles_that_lie_in_one() -> None:
    for num_keys, tile_size in ((24, 8), (28, 4), (26, 2), (25, 1)):
        mask = Butterfly(block_size=8).find(*shapes(16, num_keys))
        assert isinstance(mask, ListMask)
        assert mask.tile_size == tile_size


def test_a_rectangle_stores_only_the_blocks_that_it_has() -> None:
    query, key = shapes(16, 16)
    part = Butterfly(block_size=8).find_rectangle(query, key, query_start=48, first_row=48)
    assert isinstance(part, ListMask)  # blocks 6 and 7 hold none of 0 and 1
    assert part.key_index.shape[-1] == 0
    part = Butterfly(block_size=8).find_rectangle(query, key, query_start=32, first_row=32)
    assert isinstance(part, ListMask)  # 4 holds 0, 5 holds 1
    assert part.key_index[0, 0].tolist() == [list(range(8)), list(range(8, 16))]


def test_a_part_of_the_rows_holds_the_blocks_far_behind_them_too() -> None:
    query, key = shapes(40, 40)
    detector = Butterfly(block_size=2)
    part = detector.find_within(
        query[:, :, :3], key, query_start=0, key_start=0, first_row=0, num_queries=40, num_keys=40
    )
    assert torch.equal(part.to_dense(), detector.find(query, key).to_dense()[:, :, :3])
    assert part.to_dense()[0, 0, 0].nonzero().max() == 33


@pytest.mark.parametrize(
    "options, error, words",
    [
        (
            {"block_size": 0},
            ArgumentError,
            r"butterfly: block_size=0 .*positive integer.*at least 1",
        ),
        ({"block_size": 2.0}, ArgumentTypeError, r"butterfly: block_size=2.0 .*float.*plain int"),
        ({"block_size": True}, ArgumentTypeError, r"butterfly: block_size=True .*bool"),
    ],
)
def test_bad_parameters_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Butterfly(**options)
