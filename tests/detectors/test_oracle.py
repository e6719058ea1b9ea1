"""Oracle: exactly the largest logits of every row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.detectors import oracle
from hyperframe.detectors.oracle import Oracle


def tensors(
    seed: int = 0, *, num_queries: int = 20, num_keys: int = 20
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, num_queries, 3, generator=g, dtype=torch.float64)
    return query, torch.randn(2, 2, num_keys, 3, generator=g, dtype=torch.float64)


@given(
    num_queries=st.integers(1, 25),
    num_keys=st.integers(1, 25),
    budget=st.integers(1, 30),
    is_causal=st.booleans(),
    scale=st.sampled_from([None, 2.0, -1.0]),
    seed=st.integers(0, 1000),
)
def test_a_row_holds_its_largest_visible_logits(
    num_queries: int, num_keys: int, budget: int, is_causal: bool, scale: float | None, seed: int
) -> None:
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    detector = Oracle(budget=budget)
    logits = (scale or 1.0) * query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if is_causal:
        visible = visible.tril(num_keys - num_queries)
    better = (logits.unsqueeze(-2) > logits.unsqueeze(-1)) & visible[:, None, :]
    expected = visible & (better.sum(-1) < budget)
    for find in (detector.find, detector.find_strict):
        dense = find(query, key, scale=scale, is_causal=is_causal).to_dense()
        assert torch.equal(dense, expected)


def test_with_ties_a_row_still_holds_exactly_its_budget() -> None:
    query, key = torch.zeros(1, 1, 9, 2), torch.zeros(1, 1, 9, 2)
    assert Oracle(budget=4).find(query, key).to_dense().sum(-1).unique().tolist() == [4]
    causal = Oracle(budget=4).find(query, key, is_causal=True).to_dense().sum(-1)
    assert causal[0, 0].tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_found_in_chunks_are_the_same(
    monkeypatch: pytest.MonkeyPatch, is_causal: bool
) -> None:
    query, key = tensors()
    whole = Oracle(budget=5).find(query, key, is_causal=is_causal).to_dense()
    monkeypatch.setattr(oracle, "_CHUNK_ENTRIES", 8 * 20 * 3)
    assert torch.equal(Oracle(budget=5).find(query, key, is_causal=is_causal).to_dense(), whole)
