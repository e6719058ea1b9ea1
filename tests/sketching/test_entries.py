"""Entries of columns: the exact test, and the mask that they become."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.sketching import entries
from hyperframe.sketching.columns import ColumnProblem
from hyperframe.sketching.entries import entry_mask, find_entries_exactly, verified


def problem(seed: int = 0, *, num_rows: int = 12, num_columns: int = 9) -> ColumnProblem:
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 2, num_rows, 4, generator=g, dtype=torch.float64)
    return ColumnProblem.of(query, torch.randn(1, 1, num_columns, 4, generator=g).double())


def all_rows(found: ColumnProblem) -> torch.Tensor:
    num_rows = found.query.shape[1]
    return torch.arange(num_rows).expand(*found.key.shape[:2], -1)


@pytest.mark.parametrize("sign", [None, 1.0, -1.0])
@pytest.mark.parametrize("tau", [0.5, 1.0, 5.0, 40.0])
def test_heavy_entries_are_those_of_the_definition(tau: float, sign: float | None) -> None:
    found = problem()
    logits = found.key @ found.query.transpose(-1, -2)
    expected = logits.square() >= 1 / tau
    if sign is not None:
        expected = expected & (logits * sign > 0)
    kept = verified(found.query, found.key, all_rows(found), tau=tau, limit=12, sign=sign)
    dense = torch.zeros(2, 9, 13, dtype=torch.bool)
    dense.scatter_(-1, torch.where(kept.row < 0, 12, kept.row), True)
    assert torch.equal(dense[..., :-1], expected)
    by_row = logits.gather(-1, kept.row.clamp(min=0))
    torch.testing.assert_close(kept.logit[kept.row >= 0], by_row[kept.row >= 0])


def test_candidates_that_are_none_are_no_entries_and_of_too_many_the_largest_stay() -> None:
    found = problem()
    logits = found.key @ found.query.transpose(-1, -2)
    kept = verified(found.query, found.key, all_rows(found), tau=1e9, limit=3)
    assert kept.row.shape == kept.logit.shape == (2, 9, 3)
    best = logits.abs().topk(3, dim=-1).indices
    assert torch.equal(kept.row.sort(dim=-1).values, best.sort(dim=-1).values)
    none = torch.full((2, 9, 5), -1)
    assert (verified(found.query, found.key, none, tau=1e9, limit=12).row == -1).all()


@pytest.mark.parametrize("sign", [None, 1.0, -1.0])
def test_the_exact_search_ranks_by_the_sign_that_is_asked_for(sign: float | None) -> None:
    found = problem()
    logits = found.key @ found.query.transpose(-1, -2)
    weight = logits.abs() if sign is None else sign * logits
    row = find_entries_exactly(found.query, found.key, count=4, sign=sign)
    assert torch.equal(row.sort(-1).values, weight.topk(4, dim=-1).indices.sort(-1).values)
    assert find_entries_exactly(found.query, found.key, count=99).shape == (2, 9, 12)


def by_hand(
    row: torch.Tensor, strength: torch.Tensor, num_rows: int, tile_size: int, max_keys: int,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The entries that stay, and the keys of each tile: `[heads, num_rows or tiles, n_k]`."""
    heads, num_keys, _ = row.shape
    tiles = -(-num_rows // tile_size)
    dense = torch.zeros(heads, num_rows, num_keys, dtype=torch.bool)
    lists = torch.zeros(heads, tiles, num_keys, dtype=torch.bool)
    for head in range(heads):
        best: list[dict[int, float]] = [{} for _ in range(tiles)]
        held = []
        for key in range(num_keys):
            for i, s in zip(row[head, key].tolist(), strength[head, key].tolist(), strict=True):
                if i < 0 or (is_causal and i + num_keys - num_rows < key):
                    continue
                held.append((i, key))
                pairs = best[i // tile_size]
                pairs[key] = max(pairs.get(key, -float("inf")), s)
        for tile, pairs in enumerate(best):
            # under a causal mask the keys of the tile itself stand last, the first of them first
            begin = tile * tile_size + num_keys - num_rows if is_causal else num_keys
            rank = {key: (key >= begin, -pairs[key] * (key < begin), key) for key in pairs}
            kept = sorted(pairs, key=rank.__getitem__)[:max_keys]
            lists[head, tile, kept] = True
        for i, key in held:
            dense[head, i, key] = lists[head, i // tile_size, key]
    return dense, lists


@given(
    num_rows=st.integers(1, 30), num_keys=st.integers(1, 12), slots=st.integers(1, 8),
    tile_size=st.sampled_from([1, 3, 16, 64]), max_keys=st.integers(1, 12),
    is_causal=st.booleans(), levels=st.sampled_from([2, 1000]), seed=st.integers(0, 9999),
)  # fmt: skip
def test_the_mask_is_the_entries_whose_pairs_a_tile_can_keep(
    num_rows: int, num_keys: int, slots: int, tile_size: int, max_keys: int, is_causal: bool,
    levels: int, seed: int,
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(4, num_keys, num_rows + slots, generator=g).argsort(dim=-1)[..., :slots]
    row = torch.where(order < num_rows, order, -1)
    # ties, negative strengths, and any values where there is no entry
    strength = torch.randint(-levels, levels, row.shape, generator=g).float()
    strength = strength.masked_fill(row < 0, float("nan"))
    mask = entry_mask(
        row, strength, batch_size=2, num_queries=num_rows, is_causal=is_causal,
        tile_size=tile_size, max_keys=max_keys,
    ).validate()  # fmt: skip
    dense, lists = by_hand(row, strength, num_rows, tile_size, max_keys, is_causal)
    assert torch.equal(mask.to_dense().flatten(0, 1), dense)
    assert torch.equal(mask.nnz().flatten(), dense.sum(dim=(-2, -1)))
    index, count = mask.key_index.flatten(0, 1), mask.key_count.flatten(0, 1)
    for head in range(4):
        for tile in range(lists.shape[1]):
            kept = index[head, tile, : count[head, tile]].tolist()
            assert kept == lists[head, tile].nonzero().flatten().tolist()


def test_a_head_at_a_time_gives_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch.randint(-1, 40, (4, 20, 1), generator=torch.Generator().manual_seed(0))
    options = {"batch_size": 1, "num_queries": 40, "is_causal": False, "tile_size": 8}
    expected = entry_mask(row, row.double(), max_keys=3, **options).to_dense()
    monkeypatch.setattr(entries, "_CHUNK_BYTES", 1)
    assert torch.equal(entry_mask(row, row.double(), max_keys=3, **options).to_dense(), expected)
