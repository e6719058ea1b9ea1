"""Ragged lists: joining, dropping and spreading keep order, and share what is shared."""

from __future__ import annotations

import pytest
import torch

from hyperframe import ragged as ragged_module
from hyperframe.ragged import append_lists, concatenate_lists, keep_in_lists, spread_heads


def ragged(
    shape: tuple[int, int, int], longest: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(100, (*shape, longest), generator=generator)
    count = torch.randint(longest + 1, shape, generator=generator)
    return index, count


def as_lists(index: torch.Tensor, count: torch.Tensor) -> list[list[int]]:
    pairs = zip(index.flatten(0, 2).tolist(), count.flatten().tolist(), strict=True)
    return [keys[:used] for keys, used in pairs]


def test_append_puts_the_second_list_behind_the_used_slots_of_the_first() -> None:
    index, count = ragged((2, 3, 4), 5, seed=0)
    more, more_count = ragged((2, 3, 4), 3, seed=1)
    weight = torch.randn(2, 3, 4, 3)
    joined, joined_weight, joined_count = append_lists(index, count, more, weight, more_count)
    expected = [
        a + b for a, b in zip(as_lists(index, count), as_lists(more, more_count), strict=True)
    ]
    assert as_lists(joined, joined_count) == expected
    # what was there has log weight 0, what came has its own
    for tile in range(24):
        used, added = count.flatten()[tile], more_count.flatten()[tile]
        weights = joined_weight.flatten(0, 2)[tile]
        assert torch.equal(weights[:used], torch.zeros(int(used)))
        assert torch.equal(weights[used : used + added], weight.flatten(0, 2)[tile, :added])


def test_append_without_counts_adds_every_slot() -> None:
    index, count = ragged((1, 2, 3), 4, seed=2)
    more = torch.arange(6).view(1, 1, 1, 6).expand(1, 2, 3, -1)
    joined, _, joined_count = append_lists(index, count, more, torch.zeros(1, 2, 3, 6))
    assert torch.equal(joined_count, count + 6)
    assert as_lists(joined, joined_count) == [
        keys + list(range(6)) for keys in as_lists(index, count)
    ]


def test_lists_that_all_tiles_share_stay_stored_once() -> None:
    index = torch.arange(4).view(1, 1, 1, 4).expand(2, 3, 5, -1)
    count = torch.full((1, 1, 1), 4).expand(2, 3, 5)
    more = torch.arange(3).view(1, 1, 1, 3).expand(2, 3, 5, -1)
    joined, weight, total = append_lists(index, count, more, torch.zeros(1).expand(2, 3, 5, 3))
    assert joined.shape == (2, 3, 5, 7)
    assert {joined.stride(2), weight.stride(2), total.stride(2)} == {0}
    pieces = [(index[:, :, :1], count[:, :, :1]), (more[:, :, :1], torch.full((1, 1, 1), 3))]
    whole, whole_count = concatenate_lists(pieces, (2, 3, 5), torch.device("cpu"))
    assert {whole.stride(2), whole_count.stride(2)} == {0}
    assert torch.equal(whole, joined)


def test_one_list_of_its_own_unshares_the_result_and_keeps_its_meaning() -> None:
    shared = (torch.arange(2).view(1, 1, 1, 2), torch.full((1, 1, 1), 2))
    own = ragged((2, 4, 3), 5, seed=3)
    by_key_head = ragged((2, 2, 3), 2, seed=4)
    index, count = concatenate_lists([shared, own, by_key_head], (2, 4, 3), torch.device("cpu"))
    grouped = [spread_heads(tensor, 4) for tensor in by_key_head]
    expected = [[0, 1, *a, *b] for a, b in zip(as_lists(*own), as_lists(*grouped), strict=True)]
    assert as_lists(index, count) == expected


def test_no_pieces_are_empty_lists() -> None:
    index, count = concatenate_lists([], (2, 3, 4), torch.device("cpu"))
    assert index.shape == (2, 3, 4, 0)
    assert torch.equal(count, torch.zeros(2, 3, 4, dtype=torch.int64))


def test_keep_drops_unused_and_unwanted_slots_and_keeps_the_order() -> None:
    index, count = ragged((2, 3, 4), 6, seed=5)
    kept, kept_count = keep_in_lists(index, count, index % 2 == 0)
    assert as_lists(kept, kept_count) == [
        [key for key in keys if key % 2 == 0] for keys in as_lists(index, count)
    ]


def test_spreading_gives_each_query_head_its_key_head() -> None:
    tensor = torch.arange(2).view(1, 2, 1)
    assert spread_heads(tensor, 6).flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert spread_heads(tensor, 2) is tensor


@pytest.mark.parametrize("dtypes", [(torch.int32, torch.int64), (torch.int64, torch.int32)])
def test_lists_stay_int32_where_either_was(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    (index, count), (more, more_count) = ragged((1, 2, 3), 4, 0), ragged((1, 2, 3), 2, 1)
    more = more.to(dtypes[1])
    joined, _, _ = append_lists(index.to(dtypes[0]), count, more, torch.zeros(1, 2, 3, 2))
    assert joined.dtype == torch.int32
    pieces = [(index.to(dtypes[0]), count), (more, more_count)]
    whole, _ = concatenate_lists(pieces, (1, 2, 3), torch.device("cpu"))
    assert whole.dtype == torch.int32


def test_lists_appended_in_chunks_of_tiles_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    (index, count), (more, more_count) = ragged((2, 3, 7), 4, 0), ragged((2, 3, 7), 5, 1)
    weight = torch.randn(2, 3, 7, 5)
    expected = append_lists(index, count, more, weight, more_count)
    monkeypatch.setattr(ragged_module, "_CHUNK_BYTES", 1)
    for found, at_once in zip(
        append_lists(index, count, more, weight, more_count), expected, strict=True
    ):
        assert torch.equal(found, at_once)
