"""Heavy columns: planted columns are found, at the stated cost, and never from the future."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hyperframe.detectors import heavy_columns
from hyperframe.detectors.heavy_columns import HeavyColumns, column_scores
from hyperframe.errors import UnsupportedError
from tests.finding_laws import Largest
from tests.finding_laws import random_heads as tensors


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(num_keys: int, columns: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """All queries like the planted keys, and only those."""
    query, key = tensors(num_queries=num_keys, num_keys=num_keys)
    query[..., 0] += 5.0
    key[:, :, columns, 0] += 8.0
    return query, key


def test_column_scores_are_sums_of_softmax_rows() -> None:
    query, key = tensors()
    rows = torch.tensor([3, 7, 39])
    scores = column_scores(query, key, rows, scale=0.7)
    keys = key.double().repeat_interleave(2, dim=1)
    expected = torch.softmax(0.7 * query.double() @ keys.transpose(-1, -2), dim=-1)
    torch.testing.assert_close(scores.double(), expected[:, :, rows].sum(2), rtol=1e-5, atol=1e-6)


def test_planted_columns_are_found_and_held_by_every_row() -> None:
    query, key = planted(200, [3, 77, 150])
    mask = HeavyColumns(num_columns=3, num_queries=8).find(query, key, generator=generator())
    dense = mask.to_dense()
    assert dense[..., [3, 77, 150]].all()
    assert torch.equal(mask.nnz(), torch.full((2, 4), 3 * 200))


@pytest.mark.parametrize("strict", [False, True])
def test_planted_columns_are_found_under_a_causal_mask(strict: bool) -> None:
    columns = [3, 77, 150]
    query, key = planted(256, columns)
    detector = HeavyColumns(num_columns=24, num_queries=8, tile_size=16)
    find = detector.find_strict if strict else detector.find
    dense = find(query, key, is_causal=True, generator=generator()).to_dense()
    for column in columns:
        assert dense[:, :, column:, column].all()


def test_the_strict_form_follows_earlier_queries_and_the_other_one_the_rows_own() -> None:
    query, key = torch.zeros(1, 1, 64, 4), torch.zeros(1, 1, 64, 4)
    query[:, :, :32, 0] = query[:, :, 32:, 1] = 5.0
    key[:, :, 4, 0] = key[:, :, 9, 1] = 9.0
    detector = HeavyColumns(num_columns=1, num_queries=8, tile_size=32)
    strict = detector.find_strict(query, key, is_causal=True).to_dense()[0, 0]
    loose = detector.find(query, key, is_causal=True).to_dense()[0, 0]
    assert strict[40, 4]
    assert not strict[40, 9]
    assert loose[40, 9]
    assert not loose[40, 4]


@given(
    num_queries=st.integers(1, 60),
    num_keys=st.integers(1, 60),
    num_columns=st.integers(1, 30),
    tile_size=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_a_causal_row_holds_its_own_tile_and_at_most_its_budget_of_columns(
    num_queries: int, num_keys: int, num_columns: int, tile_size: int, seed: int
) -> None:
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    detector = HeavyColumns(num_columns=num_columns, num_queries=3, tile_size=tile_size)
    mask = detector.find(query, key, is_causal=True, generator=generator(seed))
    dense, offset = mask.to_dense(), num_keys - num_queries
    size = min(tile_size, num_queries)
    for row in range(num_queries):
        begin, position = row // size * size + offset, row + offset
        own = dense[:, :, row, max(0, begin) : max(0, position + 1)]
        assert own.all()
        assert dense[:, :, row].sum(-1).max() - own.shape[-1] <= num_columns
        if begin <= 0:
            assert not dense[:, :, row, max(0, position + 1) :].any()


@given(
    num_queries=st.integers(1, 60),
    num_keys=st.integers(1, 60),
    cut=st.integers(0, 59),
    seed=st.integers(0, 1000),
)
@example(num_queries=60, num_keys=60, cut=31, seed=0)
@example(num_queries=40, num_keys=60, cut=21, seed=0)
@example(num_queries=60, num_keys=40, cut=41, seed=0)
def test_no_later_key_moves_a_causal_row(
    num_queries: int, num_keys: int, cut: int, seed: int
) -> None:
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    detector = HeavyColumns(num_columns=6, num_queries=3, tile_size=8)
    cut = min(cut, num_queries)
    before = detector.find(query, key, is_causal=True, generator=generator(seed)).to_dense()
    key[:, :, max(0, cut + num_keys - num_queries) :] *= -5
    after = detector.find(query, key, is_causal=True, generator=generator(seed)).to_dense()
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])


@given(
    num_queries=st.integers(1, 60),
    missing=st.integers(0, 10),
    cut=st.integers(0, 59),
    seed=st.integers(0, 1000),
)
@example(num_queries=60, missing=0, cut=31, seed=0)
@example(num_queries=53, missing=9, cut=41, seed=0)
def test_no_later_key_or_query_moves_a_strictly_causal_row(
    num_queries: int, missing: int, cut: int, seed: int
) -> None:
    num_keys = max(1, num_queries - missing)
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    detector = HeavyColumns(num_columns=6, num_queries=3, tile_size=8)
    find, cut = detector.find_strict, min(cut, num_queries)
    before = find(query, key, is_causal=True, generator=generator(seed)).to_dense()
    query[:, :, cut:] *= -5
    key[:, :, max(0, cut + num_keys - num_queries) :] *= -5
    after = find(query, key, is_causal=True, generator=generator(seed)).to_dense()
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])


def test_in_a_strict_rectangle_the_rows_themselves_do_not_vote() -> None:
    query, key = tensors()
    earlier = torch.randn(2, 4, 40, 4, generator=generator(3))
    detector = HeavyColumns(num_columns=5, num_queries=7)
    one = detector.find_strict(query, key, earlier_query=earlier)
    two = detector.find_strict(-3 * query, key, earlier_query=earlier)
    assert torch.equal(one.to_dense(), two.to_dense())
    other = detector.find_strict(query, key, earlier_query=-earlier)
    assert not torch.equal(one.to_dense(), other.to_dense())


def test_without_earlier_queries_the_strict_form_is_refused() -> None:
    query, key = tensors(num_queries=10, num_keys=30)
    for is_causal in (False, True):
        with pytest.raises(UnsupportedError, match=r"strict_causal=True: heavy_columns.*10 quer"):
            HeavyColumns().find_strict(query, key, is_causal=is_causal)


def test_without_a_generator_the_middle_rows_vote_and_the_result_is_fixed() -> None:
    query, key = tensors()
    detector = HeavyColumns(num_columns=5, num_queries=4)
    assert torch.equal(detector.find(query, key).to_dense(), detector.find(query, key).to_dense())
    others = torch.tensor([r for r in range(40) if r not in (4, 14, 24, 34)])
    changed = query.clone()
    changed[:, :, others] = 7.0
    assert torch.equal(detector.find(changed, key).to_dense(), detector.find(query, key).to_dense())


def test_voters_are_one_random_row_of_each_run() -> None:
    from hyperframe.detectors.heavy_columns import _one_in_each_run

    for length, count in ((40, 4), (41, 4), (3, 8), (1, 1)):
        seen = set()
        for seed in range(60):
            rows = _one_in_each_run(length, count, torch.device("cpu"), generator(seed))
            used = min(count, length)
            bounds = torch.arange(used + 1) * length // used
            assert ((bounds[:-1] <= rows) & (rows < bounds[1:])).all()
            seen |= set(rows.tolist())
        # a row is missed by 60 draws with probability (10/11)^60 < 0.4 %: most must be there
        assert len(seen) >= 0.8 * length


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_intermediate_grows_with_the_square_of_the_length(is_causal: bool) -> None:
    detector = HeavyColumns(num_columns=16, num_queries=8, tile_size=32)
    largest = []
    for n in (512, 1024):
        query, key = torch.zeros(1, 2, n, 8), torch.zeros(1, 2, n, 8)
        with Largest() as record:
            detector.find(query, key, is_causal=is_causal, generator=generator())
        largest.append(record.numel)
        # votes of 8 rows, lists of 16 + 32 keys for every 32 rows, over about ten levels
        assert record.numel <= 2 * n * 32
    assert largest[1] <= 2.2 * largest[0]


def test_columns_are_stored_once_for_all_rows() -> None:
    query, key = tensors(num_queries=40)
    mask = HeavyColumns(num_columns=5).find(query, key)
    assert mask.key_index.shape == (2, 4, 1, 5)


def test_causal_lists_are_int32_and_stored_at_their_own_length() -> None:
    query, key = torch.zeros(1, 2, 4096, 4), torch.zeros(1, 2, 4096, 4)
    mask = HeavyColumns(num_columns=64, num_queries=4, tile_size=16).find(
        query, key, is_causal=True
    )
    assert mask.key_index.dtype == torch.int32
    assert mask.key_index.untyped_storage().nbytes() <= 4 * 2 * 256 * (64 + 16 + 1)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("num_keys", [90, 100, 130])
def test_rectangles_scored_in_chunks_are_the_same(
    num_keys: int, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if strict and num_keys > 100:
        pytest.skip("refused: no earlier queries")
    query, key = tensors(num_queries=100, num_keys=num_keys)
    detector = HeavyColumns(num_columns=9, num_queries=3, tile_size=8)
    find = detector.find_strict if strict else detector.find
    whole = find(query, key, is_causal=True, generator=generator())
    monkeypatch.setattr(heavy_columns, "_CHUNK_BYTES", 1)
    parts = find(query, key, is_causal=True, generator=generator())
    assert torch.equal(whole.to_dense(), parts.to_dense())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("level", ["stacked", "all"])
def test_rows_before_every_key_take_no_budget(level: str, strict: bool) -> None:
    """With more queries than keys, the keys that are not there are never chosen."""
    num_keys, num_columns, size = (52, 6, 4) if level == "stacked" else (40, 6, 8)
    query, key = tensors(num_queries=64, num_keys=num_keys)
    key[..., 0] -= 9.0  # every real key loses against a zero key
    query[..., 0] += 9.0
    detector = HeavyColumns(num_columns=num_columns, num_queries=3, tile_size=size)
    find = detector.find_strict if strict else detector.find
    mask = find(query, key, is_causal=True, generator=generator())
    dense, offset = mask.to_dense(), num_keys - 64
    for row in range(64):
        begin = max(0, row // size * size + offset)  # keys before the row's own tile
        held = dense[:, :, row, :begin].sum(dim=-1)
        # rectangles that are shorter than their share leave some of it
        assert (held >= min(begin, num_columns // 3)).all()
        if begin >= 4 * num_columns and row // size % 2 == 0:
            assert (held >= num_columns - 2).all()


def test_the_one_present_key_of_a_rectangle_is_found() -> None:
    # rows 0..7 come before every key; of the rectangle before row 16, keys 0..7 of 16 are there
    query, key = tensors(num_queries=32, num_keys=24)
    key[..., 0] -= 9.0
    query[..., 0] += 9.0
    mask = HeavyColumns(num_columns=8, num_queries=3, tile_size=16).find(query, key, is_causal=True)
    assert mask.to_dense()[:, :, 16:, :8].all()
