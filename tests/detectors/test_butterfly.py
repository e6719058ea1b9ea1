"""Butterfly: blocks whose numbers differ in one bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.detectors.butterfly import Butterfly
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.masks import ListMask
from tests import pattern_laws


def expected(
    detector: Butterfly, num_queries: int, num_keys: int, *, is_causal: bool, first_real: int
) -> torch.Tensor:
    del first_real  # padding does not move the pattern
    dense = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for row in range(num_queries):
        position = row + num_keys - num_queries
        own = max(0, position) // detector.block_size
        for j in range(num_keys):
            differing = bin(own ^ (j // detector.block_size)).count("1")
            dense[row, j] = differing <= 1 and (j <= position or not is_causal)
    return dense.expand(2, 4, -1, -1)


@given(
    num_queries=pattern_laws.SIZES,
    num_keys=pattern_laws.SIZES,
    block_size=st.integers(1, 50),
    is_causal=st.booleans(),
)
def test_the_mask_is_the_definition(
    num_queries: int, num_keys: int, block_size: int, is_causal: bool
) -> None:
    detector = Butterfly(block_size=block_size)
    pattern_laws.mask_is_the_definition(
        detector, expected, num_queries, num_keys, is_causal=is_causal
    )


@given(
    num_queries=pattern_laws.SIZES,
    num_keys=pattern_laws.SIZES,
    block_size=st.integers(1, 50),
    data=st.data(),
)
def test_a_rectangle_holds_its_part_of_the_causal_pattern(
    num_queries: int, num_keys: int, block_size: int, data: st.DataObject
) -> None:
    detector = Butterfly(block_size=block_size)
    pattern_laws.rectangle_is_a_part(detector, expected, num_queries, num_keys, data)


@given(
    num_queries=pattern_laws.SIZES,
    num_keys=pattern_laws.SIZES,
    block_size=st.integers(1, 50),
    is_causal=st.booleans(),
    data=st.data(),
)
def test_what_padding_leaves_is_a_part_of_the_whole_pattern(
    num_queries: int, num_keys: int, block_size: int, is_causal: bool, data: st.DataObject
) -> None:
    detector = Butterfly(block_size=block_size)
    pattern_laws.rest_of_padding_is_a_part(
        detector, expected, num_queries, num_keys, data, is_causal=is_causal
    )


@pattern_laws.SHAPES
@pattern_laws.SIDES
@pattern_laws.MODES
@pytest.mark.parametrize(
    "spec", ["butterfly(block_size=1)", "butterfly(block_size=6)", "butterfly(block_size=64)"]
)
def test_attention_goes_by_the_pattern_in_every_strategy_and_under_padding(
    spec: str, mode: str, sides: tuple[int, int], shape: tuple[int, int]
) -> None:
    pattern_laws.attention_goes_by_the_pattern(spec, expected, mode, sides, shape)


@pytest.mark.parametrize("length", [16, 64, 60])
def test_as_many_layers_as_bits_reach_every_key(length: int) -> None:
    query, key = pattern_laws.shapes(length, length)
    held = Butterfly(block_size=4).find(query, key).to_dense()[0, 0].double()
    reached = torch.eye(length, dtype=torch.float64)
    layers = (length // 4 - 1).bit_length()
    for layer in range(layers):
        assert not (reached > 0).all(), layer
        reached = reached @ held
    assert (reached > 0).all()


def test_a_row_holds_log2_blocks_and_its_own() -> None:
    query, key = pattern_laws.shapes(64 * 8, 64 * 8)
    mask = Butterfly(block_size=8).find(query, key)
    assert isinstance(mask, ListMask)
    assert mask.key_index.shape[2:] == (64, 7 * 8)
    assert mask.key_index.stride()[:2] == (0, 0)
    assert (mask.to_dense().sum(dim=-1) == 7 * 8).all()


def test_rows_that_stand_between_blocks_are_cut_into_tiles_that_lie_in_one() -> None:
    for num_keys, tile_size in ((24, 8), (28, 4), (26, 2), (25, 1)):
        mask = Butterfly(block_size=8).find(*pattern_laws.shapes(16, num_keys))
        assert isinstance(mask, ListMask)
        assert mask.tile_size == tile_size


def test_a_rectangle_stores_only_the_blocks_that_it_has() -> None:
    query, key = pattern_laws.shapes(16, 16)
    part = Butterfly(block_size=8).find_rectangle(query, key, query_start=48, first_row=48)
    assert isinstance(part, ListMask)  # blocks 6 and 7 hold none of 0 and 1
    assert part.key_index.shape[-1] == 0
    part = Butterfly(block_size=8).find_rectangle(query, key, query_start=32, first_row=32)
    assert isinstance(part, ListMask)  # 4 holds 0, 5 holds 1
    assert part.key_index[0, 0].tolist() == [list(range(8)), list(range(8, 16))]


def test_a_part_of_the_rows_holds_the_blocks_far_behind_them_too() -> None:
    query, key = pattern_laws.shapes(40, 40)
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
