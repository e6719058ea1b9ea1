"""EntryMask: the entries themselves as a mask, all rows of a tile in a plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.builder import build_plans
from hyperframe.errors import ArgumentError
from hyperframe.masks import EntryMask, ListMask
from hyperframe.masks.select import rows_at


def entries(
    seed: int = 0, *, heads: int = 4, num_queries: int = 11, num_keys: int = 9, tile_size: int = 4,
    is_causal: bool = False,
) -> EntryMask:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    shape = (2, heads, -(-num_queries // tile_size), num_keys)
    index = torch.rand(shape, generator=g).argsort(dim=-1)[..., :5]
    count = torch.randint(index.shape[-1] + 1, shape[:3], generator=g)
    used = torch.arange(index.shape[-1]) < count.unsqueeze(-1)
    index = torch.where(used, index, 10_000).sort(dim=-1).values
    return EntryMask(
        batch_size=2, num_query_heads=4, num_queries=num_queries, num_keys=num_keys,
        is_causal=is_causal, key_index=index, key_count=count, tile_size=tile_size,
        row_bits=torch.randint(1 << 62, index.shape, generator=g) * 2 + 1,
    )  # fmt: skip


def by_hand(mask: EntryMask) -> torch.Tensor:
    dense = torch.zeros(2, 4, mask.num_queries, mask.num_keys, dtype=torch.bool)
    group = 4 // mask.key_index.shape[1]
    for place in torch.cartesian_prod(*map(torch.arange, dense.shape[:3])).tolist():
        b, h, i = place
        at = (b, h // group, i // mask.tile_size)
        for slot in range(int(mask.key_count[at])):
            key, bits = int(mask.key_index[at][slot]), int(mask.row_bits[at][slot])
            is_visible = not mask.is_causal or key <= i + mask.num_keys - mask.num_queries
            dense[b, h, i, key] = is_visible and bool(bits >> i % mask.tile_size & 1)
    return dense


@given(
    heads=st.sampled_from([2, 4]), num_queries=st.integers(1, 80), num_keys=st.integers(1, 9),
    tile_size=st.sampled_from([1, 4, 64]), is_causal=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_the_mask_is_its_entries_and_a_plan_holds_all_rows_of_their_tiles(
    heads: int, num_queries: int, num_keys: int, tile_size: int, is_causal: bool, seed: int
) -> None:
    mask = entries(
        seed, heads=heads, num_queries=num_queries, num_keys=num_keys, tile_size=tile_size,
        is_causal=is_causal,
    ).validate()  # fmt: skip
    dense = mask.to_dense()
    assert torch.equal(dense, by_hand(mask))
    assert torch.equal(mask.rows(0, 1), dense[:, :, :1])
    assert torch.equal(mask.nnz(), dense.sum(dim=(-2, -1)))
    index = torch.randint(num_queries, (2, 4, 3), generator=torch.Generator().manual_seed(seed))
    expected = dense.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, num_keys))
    assert torch.equal(rows_at(mask, index), expected)
    lists = mask.to_lists().to_dense()
    assert (lists | ~dense).all()
    (plan,) = build_plans(mask, key_heads=2)
    weight = plan.to_dense()
    if is_causal:
        weight = weight * torch.ones(num_queries, num_keys).tril(num_keys - num_queries)
    assert torch.equal(weight > 0, lists)


def test_a_union_with_other_lists_is_the_union_of_the_entries() -> None:
    mask = entries(is_causal=True)
    column = ListMask.columns(
        torch.full((2, 2, 1), 3), num_query_heads=4, num_queries=11, num_keys=9, is_causal=True
    )
    union = mask | column
    assert torch.equal(union.to_dense(), mask.to_dense() | column.to_dense())
    (plan,) = build_plans(union, key_heads=2)
    expected = mask.to_lists().to_dense() | column.to_dense()
    assert torch.equal(plan.to_dense() > 0, expected)


@pytest.mark.parametrize("tile_size", [0, 65])
def test_tiles_that_do_not_fit_a_word_are_refused(tile_size: int) -> None:
    with pytest.raises(ArgumentError, match=f"tile_size={tile_size}: .*1 to 64 rows"):
        replace(entries(), tile_size=tile_size)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"row_bits": torch.zeros(2, 4, 3, 4, dtype=torch.int64)}, "row_bits is torch.int64"),
        ({"row_bits": torch.zeros(2, 4, 3, 5, dtype=torch.int32)}, "row_bits is torch.int32"),
        (
            {"key_count": torch.full((2, 4, 3), 6), "key_index": torch.zeros(2, 4, 3, 5).long()},
            "key_count is outside 0..5",
        ),
        (
            {"key_count": torch.full((2, 4, 3), 5), "key_index": torch.full((2, 4, 3, 5), 9)},
            "key_index holds 9",
        ),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_are_refused(change: dict[str, Any], words: str) -> None:
    mask = replace(entries(), **change)
    with pytest.raises(ArgumentError, match=words):
        mask.validate()
