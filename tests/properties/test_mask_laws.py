"""Laws that every form of mask keeps."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.masks import BlockMask, HeavyMask, ListMask, RangeMask
from hyperframe.testing.strategies import Problem, masks, problems

LISTS = ("list", "columns", "entries")


def causal(mask: HeavyMask) -> torch.Tensor:
    ones = torch.ones(mask.num_queries, mask.num_keys, dtype=torch.bool)
    return ones.tril(mask.num_keys - mask.num_queries)


@given(masks())
def test_dense_form_count_and_rows_agree(mask: HeavyMask) -> None:
    dense = mask.to_dense()
    assert dense.dtype == torch.bool
    assert dense.shape == (
        mask.batch_size, mask.num_query_heads, mask.num_queries, mask.num_keys
    )  # fmt: skip
    assert torch.equal(mask.nnz(), dense.sum(dim=(-2, -1)))
    for start in range(mask.num_queries):
        for stop in (start + 1, mask.num_queries):
            assert torch.equal(mask.rows(start, stop), dense[:, :, start:stop])


@given(masks(is_causal=False))
def test_a_causal_mask_is_the_mask_below_the_diagonal(mask: HeavyMask) -> None:
    if not list(mask.parts())[1:]:
        same = replace(mask, is_causal=True)
        assert torch.equal(same.to_dense(), mask.to_dense() & causal(mask))


@given(problems(), st.booleans(), st.data())
def test_union_is_associative_commutative_and_idempotent(
    problem: Problem, is_causal: bool, data: st.DataObject
) -> None:
    a, b, c = (data.draw(masks(problem, is_causal=is_causal)) for _ in range(3))
    union = (a | b).to_dense()
    assert torch.equal(union, a.to_dense() | b.to_dense())
    assert torch.equal(union, (b | a).to_dense())
    assert torch.equal((a | a).to_dense(), a.to_dense())
    assert torch.equal(((a | b) | c).to_dense(), (a | (b | c)).to_dense())
    assert torch.equal((a | b).nnz(), union.sum(dim=(-2, -1)))


@given(masks(), st.booleans())
def test_a_dense_mask_makes_the_round_trip(mask: HeavyMask, is_causal: bool) -> None:
    dense = mask.to_dense()
    again = ListMask.from_dense(dense, is_causal=is_causal)
    assert torch.equal(again.to_dense(), dense & causal(mask) if is_causal else dense)


@given(masks(forms=LISTS), st.data())
def test_smaller_tiles_hold_the_same_entries(mask: ListMask, data: st.DataObject) -> None:
    sizes = range(1, mask.num_queries + 2)
    if mask.tile_size < mask.num_queries:
        sizes = [size for size in sizes if mask.tile_size % size == 0]
    assert torch.equal(mask.retile(data.draw(st.sampled_from(sizes))).to_dense(), mask.to_dense())


@given(masks(forms=LISTS, is_causal=False), st.data())
def test_a_rectangle_of_a_mask_is_the_block_of_its_dense_form(
    mask: ListMask, data: st.DataObject
) -> None:
    row = data.draw(st.integers(0, mask.num_queries - 1))
    rows = data.draw(st.integers(1, mask.num_queries - row))
    key = data.draw(st.integers(0, mask.num_keys - 1))
    keys = data.draw(st.integers(1, mask.num_keys - key))
    part = mask.restricted(row, rows, key, keys)
    block = mask.to_dense()[:, :, row : row + rows, key : key + keys]
    assert torch.equal(part.to_dense(), block)
    assert part.key_index.shape[2] == -(-rows // part.tile_size)


@given(masks(forms=["range", "range_of_rows", "block"]))
def test_every_row_of_a_range_mask_has_one_slot_and_one_range(
    mask: RangeMask | BlockMask,
) -> None:
    if isinstance(mask, BlockMask):
        mask = mask.to_ranges()
    slots = mask.query_order.sort(dim=-1).values[..., -mask.num_queries :]
    assert torch.equal(slots, torch.arange(mask.num_queries).expand_as(slots))
    start, stop = mask.row_ranges()
    rank = mask.key_rank().repeat_interleave(mask.num_query_heads // mask.key_order.shape[1], 1)
    rank = rank.unsqueeze(2)
    held = (start.unsqueeze(-1) <= rank) & (rank < stop.unsqueeze(-1))
    assert torch.equal(held & causal(mask) if mask.is_causal else held, mask.to_dense())
    assert ((stop - start).clamp(min=0) <= mask.max_keys).all()


@given(problems(), st.booleans(), st.data())
def test_ranges_of_rows_are_the_ranges_that_the_rows_named(
    problem: Problem, is_causal: bool, data: st.DataObject
) -> None:
    shape = (problem.batch, problem.query_heads, problem.num_queries)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    # rows of one start share a range; about half of them name none
    start = torch.randint(problem.num_keys, shape, generator=generator)
    length = torch.randint(
        -problem.num_keys, problem.num_keys, (problem.num_keys,), generator=generator
    )
    stop = (start + length[start]).clamp(max=problem.num_keys)
    order = torch.rand(problem.batch, problem.key_heads, problem.num_keys, generator=generator)
    mask = RangeMask.of_rows(
        start, start, stop, order.argsort(-1), max_keys=problem.num_keys,
        max_groups=problem.num_keys, tile_size=data.draw(st.integers(1, 5)), is_causal=is_causal,
    )  # fmt: skip
    rank = order.argsort(-1).argsort(-1).repeat_interleave(
        problem.query_heads // problem.key_heads, 1
    ).unsqueeze(2)  # fmt: skip
    held = (start.unsqueeze(-1) <= rank) & (rank < stop.unsqueeze(-1))
    assert torch.equal(mask.to_dense(), held & causal(mask) if is_causal else held)


@given(masks(forms=["block"]))
def test_a_block_mask_holds_blocks_of_equal_rank_inside_its_rectangles(mask: BlockMask) -> None:
    expected = torch.zeros(
        mask.batch_size, mask.num_query_heads, mask.num_queries, mask.num_keys, dtype=torch.bool
    )
    group = mask.num_query_heads // mask.key_order.shape[1]
    for batch, head in torch.cartesian_prod(
        torch.arange(mask.batch_size), torch.arange(mask.num_query_heads)
    ).tolist():
        rows = mask.query_order[batch, head].tolist()
        keys = mask.key_order[batch, head // group].tolist()
        for row_start, row_stop, key_start, key_stop in mask.rectangles:
            own_rows, own_keys = rows[row_start:row_stop], keys[key_start:key_stop]
            blocks = -(-len(own_keys) // mask.block_size)
            for b in range(blocks):
                held = own_keys[b * len(own_keys) // blocks : (b + 1) * len(own_keys) // blocks]
                for row in own_rows[
                    b * len(own_rows) // blocks : (b + 1) * len(own_rows) // blocks
                ]:
                    expected[batch, head, row, held] = True
    if mask.is_causal:
        expected &= causal(mask)
    assert torch.equal(mask.to_dense(), expected)
    assert torch.equal(mask.to_ranges().to_dense(), expected)
    assert torch.equal(mask.nnz(), expected.sum(dim=(-2, -1)))
    assert mask.validate() is mask
    rank = mask.rank_of_keys().gather(-1, mask.key_order.long())
    assert torch.equal(rank.long(), torch.arange(mask.num_keys).expand_as(rank))
    assert mask.is_full == all(k1 - k0 <= mask.block_size for _, _, k0, k1 in mask.rectangles)
    covered = {row for start, stop, _, _ in mask.rectangles for row in range(start, stop)}
    assert mask.covers_all_rows == (len(covered) == mask.num_queries)
