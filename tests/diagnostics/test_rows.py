"""kappa and entropy: what rows are like."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.diagnostics import (
    entropy,
    kappa,
    log_kappa,
    mask_quality,
    sampled_log_kappa,
    sampled_mass,
)
from hyperframe.masks import BandMask, HeavyMask, ListMask
from hyperframe.ragged import spread_heads
from hyperframe.testing.strategies import AttentionInputs, attention_inputs, masks
from tests.diagnostics import dense

SCALES = st.sampled_from([None, 1.5, -0.5])


def no_mask(query: torch.Tensor, key: torch.Tensor, is_causal: bool = False) -> HeavyMask:
    nothing = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.bool)
    return ListMask.from_dense(nothing, is_causal=is_causal)


@given(attention_inputs(), masks(), SCALES)
def test_kappa_is_the_ratio_of_the_unmasked_row_sums(
    inputs: AttentionInputs, mask: HeavyMask, scale: float | None
) -> None:
    query, key, _ = inputs
    found = log_kappa(query, key, mask, scale=scale)
    expected = dense.log_kappa(query, key, mask, scale)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-8)
    assert torch.equal(kappa(query, key, mask, scale=scale), found.exp())
    assert (found >= 0).all()


@given(attention_inputs(), masks(), SCALES)
def test_centred_is_the_same_of_keys_without_their_mean(
    inputs: AttentionInputs, mask: HeavyMask, scale: float | None
) -> None:
    query, key, _ = inputs
    found = log_kappa(query, key, mask, scale=scale, centred=True)
    centred = key - key.mean(dim=2, keepdim=True)
    expected = dense.log_kappa(query, centred, mask, scale)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-8)


def test_kappa_sees_a_shift_of_all_keys_which_the_softmax_does_not() -> None:
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 20, 4, generator=g).double() for _ in range(2))
    mask = no_mask(query, key)
    for size in (0.0, 5.0, 100.0):
        shift = torch.full((4,), size).double()
        moved = key + shift
        torch.testing.assert_close(entropy(query, moved), entropy(query, key))
        centred = log_kappa(query, moved, mask, centred=True)
        torch.testing.assert_close(centred, log_kappa(query, key, mask, centred=True))
        # every row sum is multiplied by exp(scale <q_i, shift>), and nothing else happens
        logs = dense.logits(query, key).logsumexp(dim=-1) + 0.5 * query @ shift
        torch.testing.assert_close(
            log_kappa(query, moved, mask), logs.amax(dim=-1) - logs.amin(dim=-1)
        )


def test_kappas_beyond_the_range_have_a_logarithm() -> None:
    query = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    mask = no_mask(query, query)
    large = torch.full((1, 1, 2, 1), 450.0)  # 10^195: far above float32
    assert kappa(query, large, mask).item() == pytest.approx(math.exp(450), rel=1e-9)
    huge = 10 * large
    assert kappa(query, huge, mask).item() == math.inf
    assert log_kappa(query, huge, mask).item() == 4500.0
    assert kappa(query, huge, mask, centred=True).item() == 1.0


def test_rows_with_nothing_left_do_not_count() -> None:
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 6, 3, generator=g).double() for _ in range(2))
    held = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    held[:, :, :4] = True
    rest = dense.logits(query, key).logsumexp(dim=-1)[0, 0, 4:]
    found = log_kappa(query, key, ListMask.from_dense(held))
    torch.testing.assert_close(found.item(), (rest[0] - rest[1]).abs().item())
    # one row is like itself, and so are none
    held[:, :, 4] = True
    assert kappa(query, key, ListMask.from_dense(held)).item() == 1.0
    assert kappa(query, key, ListMask.from_dense(torch.ones_like(held))).item() == 1.0


def test_under_causality_sums_grow_with_the_prefix() -> None:
    x = torch.zeros(1, 1, 8, 2)
    assert kappa(x, x, no_mask(x, x)).item() == 1.0
    assert kappa(x, x, no_mask(x, x, is_causal=True)).item() == pytest.approx(8.0)
    window = BandMask(
        batch_size=1, num_query_heads=1, num_queries=8, num_keys=8, is_causal=True, left=2,
        right=0, on_device=x.device,
    )  # fmt: skip
    # rows 3 to 7 have one to five keys before their windows, the others none
    assert kappa(x, x, window).item() == pytest.approx(5.0)


def test_the_offset_of_the_mask_says_what_rows_see() -> None:
    x = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 9, 2)
    # keys 0 to 3 + i are visible, without the one at 3 + i: 3, 4, 5 and 6
    window = BandMask(
        batch_size=1, num_query_heads=1, num_queries=4, num_keys=9, is_causal=True, left=0,
        right=0, query_offset=3, on_device=x[0].device,
    )  # fmt: skip
    assert kappa(*x, window).item() == pytest.approx(6 / 3)
    assert sampled_log_kappa(*x, window, num_rows=4).exp().value.item() == pytest.approx(2.0)
    assert mask_quality(*x, window).density.item() == pytest.approx(4 / (4 + 5 + 6 + 7))
    expected = (1 / 4 + 1 / 5 + 1 / 6 + 1 / 7) / 4
    assert mask_quality(*x, window).mass.item() == pytest.approx(expected)
    assert sampled_mass(*x, window, num_rows=4).value.item() == pytest.approx(expected)


@given(attention_inputs(), st.booleans(), SCALES)
def test_entropy_is_that_of_the_softmax(
    inputs: AttentionInputs, is_causal: bool, scale: float | None
) -> None:
    query, key, _ = inputs
    found = entropy(query, key, scale=scale, is_causal=is_causal)
    share = dense.softmax(query, key, scale=scale, is_causal=is_causal)
    torch.testing.assert_close(found, torch.special.entr(share).sum(dim=-1), rtol=1e-8, atol=1e-9)
    assert (found >= 0).all()
    assert (found <= math.log(key.shape[2]) + 1e-12).all()


def test_entropy_counts_the_keys_that_share_the_mass() -> None:
    n = 12
    query = torch.ones(1, 1, 3, 1).double()
    key = torch.where(torch.arange(n) < 5, 0.0, -1e6).view(1, 1, n, 1).double()
    torch.testing.assert_close(entropy(query, key).exp(), torch.full((1, 1, 3), 5.0).double())
    assert entropy(query, key[:, :, :1]).tolist() == [[[0.0] * 3]]
    # rows before all keys
    assert entropy(query, key[:, :, :2], is_causal=True)[0, 0, 0].item() == 0.0


def test_heads_of_a_group_share_their_keys() -> None:
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, h, 9, 3, generator=g).double() for h in (6, 2))
    spread = spread_heads(key, 6)
    mask = no_mask(query, key)
    torch.testing.assert_close(entropy(query, key), entropy(query, spread))
    torch.testing.assert_close(kappa(query, key, mask), kappa(query, spread, mask))
