"""Masks: each form against its definition, refusals, and shapes that stay small."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.masks import BandMask, BlockMask, HeavyMask, ListMask, RangeMask, UnionMask
from hyperframe.masks import base as masks_module
from hyperframe.masks.base import Problem


def band(
    *, left: int = 1, right: int = 1, num_sinks: int = 0, num_queries: int = 6, num_keys: int = 6,
    is_causal: bool = False, query_offset: int | None = None, batch_size: int = 1,
) -> BandMask:  # fmt: skip
    return BandMask(
        batch_size=batch_size, num_query_heads=2, num_queries=num_queries, num_keys=num_keys,
        is_causal=is_causal, query_offset=query_offset, left=left, right=right,
        num_sinks=num_sinks, on_device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("num_queries, num_keys", [(6, 6), (3, 8), (8, 3)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_band_holds_the_keys_near_the_query_and_the_first_ones(
    num_queries: int, num_keys: int, is_causal: bool
) -> None:
    mask = band(
        left=2, right=1, num_sinks=1, num_queries=num_queries, num_keys=num_keys,
        is_causal=is_causal,
    )  # fmt: skip
    dense = mask.to_dense()
    assert dense.shape == (1, 2, num_queries, num_keys)
    for row in range(num_queries):
        position = row + num_keys - num_queries
        for key in range(num_keys):
            held = key == 0 or position - 2 <= key <= position + 1
            held = held and not (is_causal and key > position)
            assert dense[0, 1, row, key].item() == held


def test_a_query_offset_moves_the_band() -> None:
    dense = band(left=0, right=0, query_offset=2, num_queries=3, num_keys=9).to_dense()[0, 0]
    assert dense.nonzero().tolist() == [[0, 2], [1, 3], [2, 4]]


def test_columns_hold_their_keys_in_every_row_that_sees_them() -> None:
    index = torch.tensor([[[4, 1]]])
    make = {"num_query_heads": 2, "num_queries": 3, "num_keys": 5}
    dense = ListMask.columns(index, **make).to_dense()
    assert torch.equal(dense[0, 1], torch.tensor([[False, True, False, False, True]] * 3))
    causal = ListMask.columns(index, **make, is_causal=True)
    # position of row 0 is 2: key 4 belongs to the last row alone
    assert causal.to_dense()[0, 0, :, 4].tolist() == [False, False, True]
    assert causal.nnz().tolist() == [[4, 4]]


def test_lists_of_tiles_hold_their_used_slots_only() -> None:
    mask = ListMask(
        batch_size=1, num_query_heads=2, num_queries=5, num_keys=4,
        key_index=torch.tensor([[[[0, 1], [3, 99], [-5, 7]]]]),
        key_count=torch.tensor([[[2, 1, 0]]]), tile_size=2,
    )  # fmt: skip
    expected = [[0, 1], [0, 1], [3], [3], []]
    for head in range(2):
        rows = mask.to_dense()[0, head]
        assert [row.nonzero().flatten().tolist() for row in rows] == expected


def test_ranges_hold_the_keys_of_their_ranks() -> None:
    mask = RangeMask(
        batch_size=1, num_query_heads=2, num_queries=3, num_keys=4,
        query_order=torch.tensor([[[2, 0, 1, -1], [1, -1, 0, 2]]]),
        key_order=torch.tensor([[[3, 1, 0, 2]]]), start=torch.tensor([[[0, 3], [1, 2]]]),
        stop=torch.tensor([[[2, 4], [1, 4]]]), tile_size=2, max_keys=2,
    )  # fmt: skip
    held = [[row.nonzero().flatten().tolist() for row in head] for head in mask.to_dense()[0]]
    assert held == [[[1, 3], [2], [1, 3]], [[0, 2], [], [0, 2]]]
    start, stop = mask.row_ranges()
    assert start.tolist() == [[[0, 3, 0], [2, 1, 2]]]
    assert stop.tolist() == [[[2, 4, 2], [4, 1, 4]]]
    assert mask.key_rank().tolist() == [[[2, 1, 3, 0]]]


def test_rows_without_keys_have_a_slot_like_all_others() -> None:
    # the residual of a plan over these tiles has to reach every row
    start = torch.tensor([[[3, 0, 2, 0, 5]]])
    stop = torch.tensor([[[4, 2, 2, 2, 1]]])
    mask = RangeMask.of_rows(
        start, start, stop, torch.arange(6).view(1, 1, 6), max_keys=2, max_groups=4, tile_size=2
    )
    slots = mask.query_order[0, 0]
    assert sorted(slots[slots >= 0].tolist()) == [0, 1, 2, 3, 4]
    assert mask.to_dense()[0, 0].sum(-1).tolist() == [1, 2, 0, 2, 0]


@pytest.mark.parametrize("tile_size", [1, 3, 8, 64])
def test_shapes_of_ranges_of_rows_are_known_without_reading_the_device(tile_size: int) -> None:
    group = torch.randint(5, (2, 3, 40))
    order = torch.arange(50).expand(2, 3, -1)
    make = {"max_keys": 3, "max_groups": 5, "tile_size": tile_size}
    counted = RangeMask.of_rows(group, group * 3, group * 3 + 3, order, **make)
    # a meta tensor has no values to read
    meta = group.to("meta")
    bounded = RangeMask.of_rows(meta, meta * 3, meta * 3 + 3, order.to("meta"), **make)
    assert counted.start.shape[-1] <= bounded.start.shape[-1] <= 40 // tile_size + 1 + 6
    assert bounded.query_order.shape[-1] == bounded.start.shape[-1] * tile_size
    assert counted.max_keys == bounded.max_keys == 3


def test_counting_in_pieces_counts_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = band(left=2, num_sinks=1, num_queries=9, num_keys=7, is_causal=True, batch_size=2)
    expected = mask.to_dense().sum(dim=(-2, -1))
    for entries in (1, 60, 1 << 20):
        monkeypatch.setattr(masks_module, "_NNZ_CHUNK_ENTRIES", entries)
        counted = mask.nnz()
        assert counted.dtype == torch.int64
        assert torch.equal(counted, expected)


def test_a_list_of_all_rows_is_cut_into_tiles_at_no_memory() -> None:
    mask = ListMask.columns(
        torch.randint(9, (2, 3, 4)), num_query_heads=3, num_queries=1000, num_keys=9
    )
    cut = mask.retile(64)
    assert cut.key_index.shape == (2, 3, 16, 4)
    assert cut.key_index.stride(2) == 0
    assert cut.key_index.data_ptr() == mask.key_index.data_ptr()


def test_a_tile_size_that_does_not_divide_is_refused() -> None:
    mask = ListMask(
        batch_size=1, num_query_heads=1, num_queries=20, num_keys=4,
        key_index=torch.zeros(1, 1, 4, 1, dtype=torch.int64),
        key_count=torch.ones(1, 1, 4, dtype=torch.int64), tile_size=6,
    )  # fmt: skip
    with pytest.raises(ArgumentError, match="tile_size: 4 does not divide the mask's tile size 6"):
        mask.retile(4)


def test_a_rectangle_of_a_list_of_all_rows_stays_one_list() -> None:
    # an odd first row once cut it into lists of single rows
    mask = ListMask.columns(
        torch.arange(8).expand(1, 1, -1), num_query_heads=1, num_queries=1001, num_keys=8
    )
    part = mask.restricted(777, 200, 2, 5)
    assert part.key_index.shape == (1, 1, 1, 8)
    assert torch.equal(part.to_dense(), mask.to_dense()[:, :, 777:977, 2:7])


@pytest.mark.parametrize(
    "dense", [torch.zeros(1, 1, 2, 2), torch.zeros(2, 2, dtype=torch.bool)], ids=["float", "2d"]
)
def test_a_dense_mask_of_another_type_or_shape_is_refused(dense: torch.Tensor) -> None:
    with pytest.raises(ArgumentTypeError, match=r"dense: expected a bool tensor .*`\.bool\(\)`"):
        ListMask.from_dense(dense)


@pytest.mark.parametrize(
    "other",
    [
        band(num_keys=7),
        band(num_queries=5),
        band(batch_size=2),
        band(is_causal=True),
        band(query_offset=3),
    ],
    ids=["keys", "queries", "batch", "causal", "offset"],
)
def test_a_union_of_two_problems_is_refused(other: HeavyMask) -> None:
    with pytest.raises(ArgumentError, match="a union needs masks of one problem"):
        band() | other


def test_a_mask_without_positions_joins_at_any_offset() -> None:
    columns = ListMask.columns(torch.tensor([[[5]]]), num_query_heads=2, num_queries=6, num_keys=6)
    shifted = band(left=0, right=0, query_offset=3)
    for union in (columns | shifted, shifted | columns):
        assert union.position_offset == 3
        assert torch.equal(union.to_dense(), columns.to_dense() | shifted.to_dense())
    # a second band elsewhere is another problem, whatever stands first
    with pytest.raises(ArgumentError, match="a union needs masks of one problem"):
        columns | shifted | band()


def test_a_union_with_something_else_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        band() | 3  # type: ignore[operator]


def test_a_union_of_one_is_that_mask_and_unions_flatten() -> None:
    a, b, c = band(), band(left=2), band(left=3)
    assert UnionMask.of(a) is a
    assert list(((a | b) | c).parts()) == [a, b, c]
    assert list((a | (b | c)).parts()) == [a, b, c]


def test_the_largest_offset_of_a_mask_shows_everything_to_a_causal_row() -> None:
    mask = band(left=99, right=99, is_causal=True, query_offset=math.ceil(1e6))
    assert mask.to_dense().sum() == 0  # the band lies far behind the keys
    assert band(left=10**7, is_causal=True, query_offset=10**6).to_dense().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_band_without_its_diagonal_is_refused(side: str) -> None:
    with pytest.raises(ArgumentError, match=rf"{side}: -1 keys is negative"):
        band(**{side: -1})


def blocks(**change: Any) -> BlockMask:
    """Seven rows and six keys of two heads; rows 0 and 6 and key 5 are in no rectangle."""
    order = torch.arange(7, dtype=torch.int32).expand(1, 2, -1)
    options: dict[str, Any] = {
        "batch_size": 1, "num_query_heads": 2, "num_queries": 7, "num_keys": 6,
        "query_order": order, "key_order": torch.tensor([[[2, 0, 1, 4, 3, 5]]]),
        "rectangles": ((1, 4, 0, 3), (4, 6, 3, 5)), "block_size": 2,
    }  # fmt: skip
    return BlockMask(**(options | change))


def test_blocks_share_out_the_rows_and_keys_of_their_rectangle() -> None:
    mask = blocks().validate()
    # 3 keys in blocks of 1 and 2, 3 rows likewise; then one block of 2 keys
    expected = [[], [2], [0, 1], [0, 1], [3, 4], [3, 4], []]
    for head in range(2):
        held = [row.nonzero().flatten().tolist() for row in mask.to_dense()[0, head]]
        assert held == expected
    assert mask.nnz().tolist() == [[9, 9]]
    assert mask.tiles().table.tolist() == [[1, 2, 0, 1, 0], [2, 4, 1, 3, 0], [4, 6, 3, 5, 1]]
    assert (mask.tiles().max_rows, mask.tiles().max_keys) == (2, 2)
    assert mask.rank_of_keys().tolist() == [[[1, 2, 0, 4, 3, 5]]]
    assert not mask.covers_all_rows
    assert not mask.is_full
    assert blocks(block_size=3).is_full


def test_a_block_without_rows_has_no_tile() -> None:
    mask = blocks(rectangles=((3, 4, 0, 6),), block_size=1)
    assert mask.tiles().table.tolist() == [[3, 4, 5, 6, 0]]
    assert mask.nnz().tolist() == [[1, 1]]


def test_every_row_has_a_slot_in_the_ranges_of_a_block_mask() -> None:
    # the residual of a plan over them has to reach every row
    ranges = blocks().to_ranges()
    slots = ranges.query_order[0, 1]
    assert sorted(slots[slots >= 0].tolist()) == list(range(7))
    assert ranges.tile_size == ranges.max_keys == 2


def test_the_tiles_of_equal_sizes_are_made_once() -> None:
    assert blocks().tiles().table is blocks().tiles().table
    assert blocks().tiles().table is not blocks(block_size=1).tiles().table


def test_unions_with_blocks_hold_what_either_holds() -> None:
    window = band(num_queries=7, num_keys=6)
    union = blocks() | window
    assert torch.equal(union.to_dense(), blocks().to_dense() | window.to_dense())
    causal = replace(blocks(), is_causal=True) | replace(window, is_causal=True)
    assert torch.equal(causal.to_dense(), union.to_dense().tril(-1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rectangles": ()}, "rectangles: none was given"),
        ({"rectangles": ((1, 1, 0, 3),)}, "the queries at the places 1..1"),
        ({"rectangles": ((1, 8, 0, 3),)}, "the queries at the places 1..8"),
        ({"rectangles": ((1, 3, -1, 3),)}, "the keys at the places -1..3"),
        ({"rectangles": ((1, 3, 0, 3), (2, 4, 3, 5))}, "the queries at the places 2..4"),
        ({"rectangles": ((4, 6, 3, 5), (1, 3, 0, 4))}, "the keys at the places 3..5"),
        ({"block_size": 0}, "block_size: 0 keys"),
        ({"num_queries": 8}, "query_order: expected"),
        ({"num_keys": 7}, "key_order: expected"),
        ({"key_rank": torch.zeros(1, 2, 6)}, "key_rank: expected the shape of key_order"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        blocks(**change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query_order": torch.zeros(1, 2, 7, dtype=torch.int32)}, "query_order is no permutation"),
        ({"key_order": torch.tensor([[[6, 0, 1, 2, 3, 4]]])}, "key_order is no permutation of 0"),
        ({"key_order": torch.tensor([[[-1, 0, 1, 2, 3, 4]]])}, "key_order is no permutation of 0"),
        ({"key_rank": torch.arange(6).view(1, 1, 6)}, "key_rank does not hold the place"),
    ],
)
def test_orders_that_are_none_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        blocks(**change).validate()


def test_orders_of_another_dtype_are_refused() -> None:
    with pytest.raises(ArgumentTypeError, match="key_order has dtype torch"):
        blocks(key_order=torch.arange(6.0).view(1, 1, 6)).validate()


@pytest.mark.parametrize("offset", [None, -9, -5, 0, 3, 40])
@pytest.mark.parametrize("tile_size", [1, 4, 7, 20])
def test_own_keys_are_those_at_the_positions_of_a_tile(tile_size: int, offset: int | None) -> None:
    for num_keys in (20, 24, 13):
        problem = Problem(
            batch_size=2, num_query_heads=3, num_queries=20, num_keys=num_keys, is_causal=False,
            query_offset=offset,
        )  # fmt: skip
        mask = ListMask.own_keys(problem, tile_size=tile_size, device=torch.device("cpu"))
        mask.validate()
        tile = (torch.arange(20).unsqueeze(-1) // tile_size) * tile_size
        key = torch.arange(num_keys) - (num_keys - 20 if offset is None else offset)
        expected = (key >= tile) & (key < tile + tile_size)
        assert torch.equal(mask.to_dense(), expected.expand(2, 3, -1, -1))
        assert mask.is_own
