"""Merging attention states: the neutral element, far-apart normalisers, gradients through both."""

from __future__ import annotations

import math

import pytest
import torch

from hyperframe.state import AttentionState, empty_state, merge

ROWS = (2, 3, 5)
INF = math.inf


def random_state(
    seed: int, *, empty_rows: bool = False, dtype: torch.dtype = torch.float64
) -> AttentionState:
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(*ROWS, 4, generator=generator, dtype=torch.float64)
    lse = 3 * torch.randn(ROWS, generator=generator, dtype=torch.float64)
    if empty_rows:
        is_empty = torch.rand(ROWS, generator=generator) < 0.4
        out, lse = out.masked_fill(is_empty.unsqueeze(-1), 0), lse.masked_fill(is_empty, -INF)
    return AttentionState(out=out.to(dtype), lse=lse)


def test_one_state_merges_to_itself() -> None:
    state = random_state(0)
    assert merge(state) is state


def test_the_empty_state_is_neutral_on_either_side() -> None:
    state = random_state(1, empty_rows=True)
    query = torch.zeros(*ROWS, 7, dtype=torch.float64)
    empty = empty_state(query, torch.zeros(2, 1, 6, 4, dtype=torch.float64))
    for merged in (merge(state, empty), merge(empty, state), merge(empty, state, empty)):
        torch.testing.assert_close(merged.out, state.out, rtol=0, atol=0)
        torch.testing.assert_close(merged.lse, state.lse, rtol=0, atol=1e-15)


def test_rows_empty_in_every_state_stay_empty_without_nan() -> None:
    query = torch.zeros(*ROWS, 4)
    merged = merge(empty_state(query, query), empty_state(query, query))
    assert torch.equal(merged.out, torch.zeros(*ROWS, 4))
    assert torch.equal(merged.lse, torch.full(ROWS, -INF))


@pytest.mark.parametrize(
    "query_dtype, lse_dtype",
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_the_empty_state_has_the_dtypes_of_attention(
    query_dtype: torch.dtype, lse_dtype: torch.dtype
) -> None:
    query = torch.ones(1, 2, 3, 4, dtype=query_dtype)
    out, lse = empty_state(query, torch.ones(1, 1, 5, 6, dtype=query_dtype))
    assert (out.dtype, out.shape) == (query_dtype, (1, 2, 3, 6))
    assert (lse.dtype, lse.shape) == (lse_dtype, (1, 2, 3))


@pytest.mark.parametrize("gap", [16.0, 100.0, 1e4, 3e38])
def test_far_apart_normalisers_neither_saturate_nor_overflow(gap: float) -> None:
    # a merge that adds an epsilon to a weight of exp(-gap) stops at about 16
    low = AttentionState(torch.full((1, 1, 1, 2), 7.0), torch.full((1, 1, 1), -gap / 2))
    high = AttentionState(torch.full((1, 1, 1, 2), 2.0), torch.full((1, 1, 1), gap / 2))
    for merged in (merge(low, high), merge(high, low)):
        share = math.exp(-gap)
        torch.testing.assert_close(merged.lse, high.lse + math.log1p(share))
        torch.testing.assert_close(
            merged.out, high.out + 5.0 * share / (1 + share), rtol=1e-6, atol=0
        )


def test_the_share_of_a_far_smaller_state_is_kept() -> None:
    # exp(-40) is below the resolution of the sum, but not of the share
    low = AttentionState(torch.ones(1, 1, 1, 1), torch.full((1, 1, 1), -40.0))
    high = AttentionState(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1))
    torch.testing.assert_close(merge(low, high).out.item(), math.exp(-40.0), rtol=1e-6, atol=0)


def test_merging_is_softmax_over_disjoint_key_sets() -> None:
    logits = torch.randn(*ROWS, 12, dtype=torch.float64)
    value = torch.randn(*ROWS, 12, 4, dtype=torch.float64)

    def attend(keys: slice) -> AttentionState:
        part = logits[..., keys]
        out = torch.einsum("...k,...kd->...d", part.softmax(-1), value[..., keys, :])
        return AttentionState(out=out, lse=part.logsumexp(-1))

    merged = merge(attend(slice(0, 1)), attend(slice(1, 8)), attend(slice(8, 12)))
    whole = attend(slice(0, 12))
    torch.testing.assert_close(merged.out, whole.out)
    torch.testing.assert_close(merged.lse, whole.lse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_outputs_are_accumulated_in_the_precision_of_the_normalisers(
    dtype: torch.dtype,
) -> None:
    states = [random_state(seed, dtype=dtype) for seed in range(5)]
    merged = merge(*states)
    exact = merge(*(AttentionState(state.out.double(), state.lse) for state in states))
    assert merged.out.dtype == dtype
    # one rounding, at the end
    assert torch.equal(merged.out, exact.out.to(dtype))


@pytest.mark.parametrize("empty_rows", [False, True])
def test_gradients_flow_through_the_outputs_and_normalisers_of_every_state(
    empty_rows: bool,
) -> None:
    states = [random_state(seed) for seed in (2, 3, 4)]
    inputs = [tensor.requires_grad_() for state in states for tensor in state]
    # rows that are empty in one state, and in all
    is_empty = torch.zeros(3, *ROWS, dtype=torch.bool)
    if empty_rows:
        is_empty[0, :, 0], is_empty[:, :, 1] = True, True

    def merged(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = [
            AttentionState(
                tensors[2 * i].masked_fill(is_empty[i].unsqueeze(-1), 0),
                tensors[2 * i + 1].masked_fill(is_empty[i], -INF),
            )
            for i in range(3)
        ]
        out, lse = merge(*made)
        return out, lse.masked_fill(is_empty.all(dim=0), 0)

    assert torch.autograd.gradcheck(merged, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_is_removed_leaves_what_the_others_hold(dtype: torch.dtype) -> None:
    states = [random_state(seed, empty_rows=True, dtype=dtype) for seed in range(3)]
    whole = merge(*states, states[0], removed=[states[0]])
    expected = merge(*states)
    # the part that was added twice must not be so large that what is left loses its digits
    is_small = states[0].lse < expected.lse + 1
    torch.testing.assert_close(whole.lse[is_small], expected.lse[is_small])
    tolerance = {"rtol": 0.0, "atol": 2**-4} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(whole.out[is_small], expected.out[is_small], **tolerance)


def test_a_state_less_itself_is_empty_and_gradients_flow_through_what_is_removed() -> None:
    state = random_state(5)
    nothing = merge(state, removed=[state])
    assert torch.equal(nothing.lse, torch.full(ROWS, -INF))
    assert torch.isfinite(nothing.out).all()
    kept, gone = random_state(6), random_state(7)
    parts = [x.requires_grad_() for x in (kept.out, kept.lse + 9, gone.out, gone.lse.clamp(max=2))]

    def merged(*x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return merge(AttentionState(*x[:2]), removed=[AttentionState(*x[2:])])

    assert torch.autograd.gradcheck(merged, parts)
