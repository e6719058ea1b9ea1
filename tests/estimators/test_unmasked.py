"""Rows of masks, and what is known of row sums beside a sample."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.builder import build_plans
from hyperframe.estimators.unmasked import (
    held_keys,
    log_masked_sums,
    log_unmasked_sums,
    mean_logits,
    visible_keys,
)
from hyperframe.masks import EntryMask, HeavyMask, ListMask
from hyperframe.masks.select import rows_at
from hyperframe.testing import causal_mask
from hyperframe.testing.strategies import AttentionInputs, attention_inputs, masks


@given(masks(), st.integers(0, 20), st.integers(0, 1000))
def test_chosen_rows_are_those_of_the_dense_mask(mask: HeavyMask, count: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    shape = (mask.batch_size, mask.num_query_heads, count)
    index = torch.randint(mask.num_queries, shape, generator=g)
    expected = mask.to_dense().gather(2, index.unsqueeze(-1).expand(*shape, mask.num_keys))
    assert torch.equal(rows_at(mask, index), expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_chosen_rows_of_single_entries_are_those_of_the_dense_mask(is_causal: bool) -> None:
    g = torch.Generator().manual_seed(0)
    mask = EntryMask(
        batch_size=2, num_query_heads=4, num_queries=20, num_keys=30, is_causal=is_causal,
        key_index=torch.rand(2, 2, 3, 30, generator=g).argsort(dim=-1)[..., :9].sort(-1).values,
        key_count=torch.randint(10, (2, 2, 3), generator=g),
        row_bits=torch.randint(256, (2, 2, 3, 9), generator=g), tile_size=8,
    )  # fmt: skip
    index = torch.randint(20, (2, 4, 15), generator=g)
    expected = mask.to_dense().gather(2, index.unsqueeze(-1).expand(-1, -1, -1, 30))
    assert expected.any()
    assert torch.equal(rows_at(mask, index), expected)


@dataclass(frozen=True, kw_only=True, eq=False)
class _EveryOther(HeavyMask):
    """A form of mask that the library does not know."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        row, key = torch.arange(start, stop)[:, None], torch.arange(self.num_keys)
        return ((row + key) % 2 == 0).expand(self.batch_size, self.num_query_heads, -1, -1)


def test_chosen_rows_of_an_unknown_form_are_looked_up_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hyperframe.masks.select._CHUNK_ENTRIES", 100)
    mask = _EveryOther(batch_size=1, num_query_heads=2, num_queries=13, num_keys=9, is_causal=True)
    index = torch.tensor([[[0, 12, 5, 5], [1, 11, 4, 9]]])
    expected = mask.to_dense().gather(2, index.unsqueeze(-1).expand(-1, -1, -1, 9))
    assert torch.equal(rows_at(mask, index), expected)


@given(attention_inputs(), masks(), st.integers(0, 1000))
def test_masked_and_unmasked_sums_are_those_of_the_dense_mask(
    inputs: AttentionInputs, mask: HeavyMask, seed: int
) -> None:
    query, key, _ = inputs
    logits = 0.3 * query @ inputs.expanded_key().mT
    dense = mask.to_dense()
    visible = torch.ones_like(dense)
    if mask.is_causal:
        visible = causal_mask(*dense.shape[-2:]).expand_as(dense)
    plans = build_plans(mask, key_heads=key.shape[1])
    masked = logits.masked_fill(~dense, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(log_masked_sums(query, key, plans, scale=0.3), masked)
    assert torch.equal(held_keys(query, key, plans), dense.sum(-1))
    assert torch.equal(visible_keys(mask).expand(dense.shape[:3]), visible.sum(-1))
    g = torch.Generator().manual_seed(seed)
    rows = torch.rand(query.shape[:3], generator=g).argsort(-1)[..., :5].sort(-1).values
    unmasked = logits.masked_fill(dense | ~visible, -torch.inf).logsumexp(-1).gather(-1, rows)
    torch.testing.assert_close(log_unmasked_sums(query, key, mask, rows, scale=0.3), unmasked)
    mean = (logits.masked_fill(~visible, 0).sum(-1) / visible.sum(-1)).nan_to_num(0)
    torch.testing.assert_close(mean_logits(query, key, mask, scale=0.3), mean, rtol=1e-7, atol=1e-6)


def test_unmasked_sums_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 30, 3, generator=g)
    key = torch.randn(2, 2, 40, 3, generator=g)
    mask = ListMask.from_dense(torch.rand(2, 4, 30, 40, generator=g) < 0.3)
    rows = torch.rand(2, 4, 30, generator=g).argsort(-1)[..., :11]
    whole = log_unmasked_sums(query, key, mask, rows, scale=0.5)
    monkeypatch.setattr("hyperframe.estimators.unmasked._CHUNK_BYTES", 32 * 8 * 40 * 2)
    torch.testing.assert_close(log_unmasked_sums(query, key, mask, rows, scale=0.5), whole)


def test_small_rests_of_large_rows_are_not_lost_to_cancellation() -> None:
    # a held entry of e^60 beside ten of 1: the difference of two sums in float32 would be 0
    query = torch.ones(1, 1, 4, 1)
    key = torch.zeros(1, 1, 11, 1)
    key[:, :, 0] = 60
    dense = torch.zeros(1, 1, 4, 11, dtype=torch.bool)
    dense[..., 0] = True
    rows = torch.tensor([[[1, 3]]])
    found = log_unmasked_sums(query, key, ListMask.from_dense(dense), rows, scale=1.0)
    torch.testing.assert_close(found.exp(), torch.full((1, 1, 2), 10.0))
