"""Block list: the pattern that was given, block by block, and clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.detectors.block_list import BlockList
from hyperframe.errors import ArgumentError, ArgumentTypeError


def shapes(
    num_queries: int, num_keys: int, heads: int = 4, key_heads: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(2, heads, num_queries, 3), torch.zeros(2, key_heads, num_keys, 3)


def expand(blocks: torch.Tensor, block_size: int, num_queries: int, num_keys: int) -> torch.Tensor:
    dense = blocks.repeat_interleave(block_size, -2).repeat_interleave(block_size, -1)
    return dense[..., :num_queries, :num_keys]


@given(
    num_queries=st.integers(1, 30),
    num_keys=st.integers(1, 30),
    block_size=st.integers(1, 12),
    per_head=st.booleans(),
    is_causal=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_the_mask_is_the_pattern_blown_up(
    num_queries: int, num_keys: int, block_size: int, per_head: bool, is_causal: bool, seed: int
) -> None:
    query, key = shapes(num_queries, num_keys)
    sizes = (-(-num_queries // block_size), -(-num_keys // block_size))
    g = torch.Generator().manual_seed(seed)
    pattern = torch.rand(*((4,) if per_head else ()), *sizes, generator=g) < 0.4
    detector = BlockList.from_mask(pattern, block_size=block_size)
    dense = expand(pattern, block_size, num_queries, num_keys)
    if is_causal:
        dense = dense.tril(num_keys - num_queries)
    for find in (detector.find, detector.find_strict):
        found = find(query, key, is_causal=is_causal).to_dense()
        assert torch.equal(found, dense.expand(2, 4, -1, -1))


def test_pairs_hold_for_all_heads_and_triples_for_one() -> None:
    query, key = shapes(8, 8)
    detector = BlockList(blocks=((1, 0), (2, 0, 1)), block_size=4)
    dense = detector.find(query, key).to_dense()
    assert dense[:, :, 4:, :4].all()
    assert dense[:, 2, :4, 4:].all()
    assert dense.sum() == 2 * 4 * 16 + 2 * 16


def test_the_list_is_sorted_and_says_nothing_twice() -> None:
    a = BlockList(blocks=((1, 1), (0, 0), (1, 1)))
    assert a.blocks == ((0, 0), (1, 1))
    assert a == BlockList(blocks=[[0, 0], [1, 1]])  # type: ignore[arg-type]


def test_no_block_at_all_is_an_empty_mask() -> None:
    query, key = shapes(8, 8)
    assert BlockList().find(query, key).nnz().sum() == 0


@pytest.mark.parametrize(
    "block, words",
    [
        ((2, 0), "2 query blocks"),
        ((0, 3), "3 key blocks"),
        ((4, 0, 0), "4 heads"),
    ],
)
def test_a_block_outside_the_problem_is_refused_with_its_sizes(
    block: tuple[int, ...], words: str
) -> None:
    query, key = shapes(7, 9)
    with pytest.raises(ArgumentError, match=words) as caught:
        BlockList(blocks=(block,), block_size=4).find(query, key)
    assert str(block) in str(caught.value)
    assert "leave it out" in str(caught.value)


def test_a_head_outside_the_problem_is_refused_in_a_rectangle_too() -> None:
    query, key = shapes(8, 8)
    with pytest.raises(ArgumentError, match=r"head 4.*4 query heads"):
        BlockList(blocks=((4, 0, 0),), block_size=4).find_rectangle(query, key, query_start=8)


@pytest.mark.parametrize(
    "blocks, error",
    [
        ("((0, 0),)", ArgumentTypeError),
        (7, ArgumentTypeError),
        (((0,),), ArgumentError),
        (((0, 1, 2, 3),), ArgumentError),
        (((0, -1),), ArgumentError),
        (((0, 1.0),), ArgumentError),
        (((0, True),), ArgumentError),
        ((3, 4), ArgumentError),
    ],
)
def test_what_is_no_list_of_pairs_is_refused(blocks: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"block_list: .*blocks"):
        BlockList(blocks=blocks)


@pytest.mark.parametrize(
    "mask, error, words",
    [
        (torch.ones(2, 2), ArgumentTypeError, "float32"),
        ([[True]], ArgumentTypeError, "list"),
        (torch.ones(2, dtype=torch.bool), ArgumentError, r"\(2,\)"),
        (torch.ones(1, 1, 2, 2, dtype=torch.bool), ArgumentError, r"\(1, 1, 2, 2\)"),
    ],
)
def test_from_mask_refuses_what_is_no_boolean_pattern(
    mask: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        BlockList.from_mask(mask)
