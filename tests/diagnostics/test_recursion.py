"""The recursion's report: that very call, rectangle by rectangle, against dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe import HyperAttention
from hyperframe.detectors import create
from hyperframe.diagnostics import RectangleReport, recursion_report
from hyperframe.diagnostics import scores as module
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.estimators.causal_approx_d import causal_approx_d
from hyperframe.kernels import exact_attention
from hyperframe.rectangles import leaf_size
from hyperframe.state import AttentionState, empty_state, merge
from hyperframe.testing import dense_attention
from hyperframe.trace import Solved, tracing
from tests.diagnostics import dense

SCALE = 0.4
LEVELS = "sort_lsh(block_size=5)"  # finds all levels at once
STACKED = "pca_tree(leaf_size=4, num_leaves=2, tile_size=8, chunk_size=16)"
SINGLE = "sliding_window(width=9, num_sinks=2)"  # by position, one rectangle after another


def tensors(num_queries: int = 42, num_keys: int = 42) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(num_queries)
    query = torch.randn(2, 4, num_queries, 6, generator=g, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, num_keys, 6, generator=g, dtype=torch.float64)
    return query, key + 0.5, value


def attention(detector: str, **options: Any) -> HyperAttention:
    return HyperAttention(
        detector=detector, sampler="uniform", causal="recursive",
        **{"num_samples": 0, "min_seq_len": 6, **options},
    )  # fmt: skip


def cut(places: tuple[int, int, int, int], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    query, *rest = inputs
    return query[:, :, places[0] : places[1]], *(x[:, :, places[2] : places[3]] for x in rest)


@pytest.mark.parametrize("num_queries, num_keys", [(42, 42), (29, 42), (42, 30)])
@pytest.mark.parametrize("detector", [STACKED, SINGLE])
def test_every_measure_is_that_of_the_dense_rectangle(
    detector: str, num_queries: int, num_keys: int
) -> None:
    inputs = tensors(num_queries, num_keys)
    report = recursion_report(attention(detector), *inputs, scale=SCALE)
    offset = num_keys - num_queries
    exact = torch.logsumexp(dense.logits(*inputs[:2], scale=SCALE, is_causal=True), dim=-1)
    assert report.num_calls == len(report.rectangles) >= 4
    for one in report.rectangles:
        query, key, value = cut(one.places, *inputs)
        mask = create(detector).find_rectangle(
            query, key, scale=SCALE, query_start=one.places[0] + offset, key_start=one.places[2],
            first_row=one.places[0], earlier_query=None,
        )  # fmt: skip
        softmax = dense.softmax(query, key, scale=SCALE)
        held = mask.to_dense()
        torch.testing.assert_close(one.alpha, dense.alpha(query, key, scale=SCALE))
        torch.testing.assert_close(one.kappa.log(), dense.log_kappa(query, key, mask, scale=SCALE))
        centred = key - key.mean(dim=2, keepdim=True)
        torch.testing.assert_close(
            one.centred_kappa.log(), dense.log_kappa(query, centred, mask, scale=SCALE)
        )
        torch.testing.assert_close(one.mass, (softmax * held).sum(-1).mean(-1))
        # without samples the output is the softmax over what is held
        kept = (softmax * held) / (softmax * held).sum(-1, keepdim=True)
        spread = value.repeat_interleave(2, dim=1)
        out, expected = kept.nan_to_num() @ spread, softmax @ spread
        error = (out - expected).flatten(2).norm(dim=-1) / expected.flatten(2).norm(dim=-1)
        torch.testing.assert_close(one.error, error)
        # of all that the row holds anywhere, which the whole call's normaliser says
        assert ((one.weight >= 0) & (one.weight <= 1 + 1e-12)).all()
        rows = exact[:, :, one.places[0] : one.places[1]]
        assert rows.isfinite().all()


def the_call(detector: str, *inputs: torch.Tensor, **options: Any) -> tuple[Any, list[Solved]]:
    seen: list[Solved] = []
    with tracing(seen.append):
        found = attention(detector, **options)(
            *inputs, scale=SCALE, is_causal=True, return_lse=True
        )
    return found, seen


@pytest.mark.parametrize("num_samples", [0, 4])
@pytest.mark.parametrize("detector", [LEVELS, STACKED, SINGLE])
def test_what_was_seen_and_the_leaves_merge_to_the_output_of_the_call(
    detector: str, num_samples: int
) -> None:
    query, key, value = tensors()
    (out, lse), seen = the_call(detector, query, key, value, num_samples=num_samples)
    leaf = leaf_size(42, 6)
    states = []
    for start in range(0, 42, leaf):
        part = slice(start, start + leaf)
        states.append(
            exact_attention(*(x[:, :, part] for x in (query, key, value)), scale=SCALE,
                            is_causal=True)
        )  # fmt: skip
    whole = AttentionState(*(torch.cat(x, dim=2) for x in zip(*states, strict=True)))
    assert {solved.is_level for solved in seen} == {detector == LEVELS}
    for solved in seen:
        if solved.is_level:
            whole = merge(whole, solved.state)
            continue
        count, rows = solved.query.shape[0] // 2, solved.query.shape[2]
        for number in range(count):
            start = solved.first_row + 2 * solved.key.shape[2] * number
            own = AttentionState(*(x[number::count] for x in solved.state))
            # where it says it is, the inputs are
            assert torch.equal(solved.query[number::count], query[:, :, start : start + rows])
            all_rows = empty_state(query, value)
            all_rows.out[:, :, start : start + rows] = own.out
            all_rows.lse[:, :, start : start + rows] = own.lse
            whole = merge(whole, all_rows)
    torch.testing.assert_close(whole.out, out)
    torch.testing.assert_close(whole.lse, lse)


def test_of_levels_mass_and_error_are_those_of_the_states_that_were_seen() -> None:
    inputs = tensors()
    (out, lse), seen = the_call(LEVELS, *inputs)
    report = recursion_report(attention(LEVELS), *inputs, scale=SCALE)
    assert torch.equal(report.out, out)
    by_keys = {solved.mask.rectangles[0]: solved for solved in seen}  # type: ignore[attr-defined]
    found: dict[tuple[int, int, int, int], RectangleReport] = {
        one.places: one for one in report.rectangles
    }
    checked = 0
    for solved in by_keys.values():
        for places in solved.mask.rectangles:  # type: ignore[attr-defined]
            part = cut(places, *inputs)
            exact = dense_attention(*part, scale=SCALE, is_causal=False)
            rows = slice(places[0], places[1])
            own = AttentionState(*(x[:, :, rows] for x in solved.state))
            mass = (own.lse - exact.lse).exp().mean(dim=-1)
            torch.testing.assert_close(found[places].mass, mass)
            error = (own.out - exact.out).flatten(2).norm(dim=-1)
            error = error / exact.out.flatten(2).norm(dim=-1)
            torch.testing.assert_close(found[places].error, error)
            weight = (own.lse - lse[:, :, rows]).exp().mean(dim=-1)
            torch.testing.assert_close(found[places].weight, weight)
            checked += 1
    assert checked == report.num_calls == 6
    assert all(one.mass.min() > 0 and one.mass.max() < 1 for one in report.rectangles)


@pytest.mark.parametrize("detector", [LEVELS, STACKED])
def test_what_is_held_entirely_has_all_mass_and_no_error(detector: str) -> None:
    full = {LEVELS: "sort_lsh(block_size=42)", STACKED: "oracle(budget=42)"}[detector]
    report = recursion_report(attention(full), *tensors())
    exact = dense_attention(*tensors(), scale=6**-0.5, is_causal=True)
    torch.testing.assert_close(report.out, exact.out)
    for one in report.rectangles:
        torch.testing.assert_close(one.mass, torch.ones_like(one.mass))
        assert (one.error < 1e-12).all()
        assert (one.kappa == 1).all()  # nothing is left to compare
    # every row's leaf and rectangles share its normaliser
    weight = torch.zeros(42, dtype=torch.float64)
    for one in report.rectangles:
        weight[one.places[0] : one.places[1]] += one.weight[0, 0]
    assert (weight[6:] > 0).all()


@given(
    num_queries=st.integers(1, 40), num_keys=st.integers(1, 40), leaf=st.integers(1, 12),
    detector=st.sampled_from([LEVELS, STACKED, SINGLE]),
)  # fmt: skip
def test_calls_and_depths_are_those_of_algorithm_4(
    num_queries: int, num_keys: int, leaf: int, detector: str
) -> None:
    inputs = tensors(num_queries, num_keys)
    if num_keys <= leaf or num_queries == 1:
        report = recursion_report(attention(detector, min_seq_len=leaf), *inputs)
        assert (report.depth, report.num_calls) == (0, 0)
        assert report.leaves == ((max(0, num_queries - num_keys), num_queries),)
        return
    report = recursion_report(attention(detector, min_seq_len=leaf), *inputs)
    _, record = causal_approx_d(*inputs[:2], detector="sort_lsh", longest_leaf=leaf, num_samples=1)
    assert report.depth == record.depth
    assert report.leaves == record.leaves
    assert {(one.places, one.depth) for one in report.rectangles} == {
        (one.places, one.depth) for one in record.rectangles
    }
    assert report.num_calls == record.num_calls
    assert [(one.depth, one.places) for one in report.rectangles] == sorted(
        (one.depth, one.places) for one in report.rectangles
    )


@pytest.mark.parametrize("detector", [LEVELS, STACKED, SINGLE])
def test_the_output_is_that_of_a_call_without_a_report(detector: str) -> None:
    inputs = tensors()
    chosen = attention(detector, num_samples=4, seed=3)
    report = recursion_report(chosen, *inputs, scale=SCALE)
    assert torch.equal(report.out, chosen(*inputs, scale=SCALE, is_causal=True))
    other = recursion_report(chosen.replace(seed=4), *inputs, scale=SCALE)
    assert not torch.equal(report.out, other.out)


@pytest.mark.parametrize("detector", [LEVELS, STACKED])
def test_a_few_rows_at_a_time_give_the_same(detector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, largest = attention(detector, num_samples=4), []
    whole = recursion_report(chosen, *tensors())
    original = module.Scores._logits

    def logits(self: Any, rows: torch.Tensor) -> torch.Tensor:
        found = original(self, rows)
        largest.append(found.shape[2])
        return found

    monkeypatch.setattr(module, "_CHUNK_ENTRIES", 1)
    monkeypatch.setattr(module, "_FEWEST_ROWS", 3)
    monkeypatch.setattr(module.Scores, "_logits", logits)
    parts = recursion_report(chosen, *tensors())
    assert max(largest) == 3
    for found, expected in zip(parts.rectangles, whole.rectangles, strict=True):
        for name in ("alpha", "kappa", "centred_kappa", "mass", "error", "weight"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_gradients_are_not_kept_and_low_precision_is_taken() -> None:
    inputs = [x.bfloat16().requires_grad_() for x in tensors()]
    report = recursion_report(attention(LEVELS, num_samples=4), *inputs)
    assert not report.out.requires_grad
    assert report.out.dtype == torch.bfloat16
    for one in report.rectangles:
        assert all(torch.isfinite(x).all() for x in (one.alpha, one.kappa, one.mass, one.error))


def test_what_does_not_recurse_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"has causal='single_pass'.*replace"):
        recursion_report(HyperAttention(), *tensors())
    with pytest.raises(ArgumentTypeError, match="expected a HyperAttention, got str"):
        recursion_report("sort_lsh", *tensors())  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("detector", [STACKED, SINGLE])
def test_a_gpu_finds_the_same(detector: str) -> None:
    inputs = tensors()
    here = recursion_report(attention(detector), *inputs)
    there = recursion_report(attention(detector), *(x.cuda() for x in inputs))
    assert [one.places for one in there.rectangles] == [one.places for one in here.rectangles]
    for found, expected in zip(there.rectangles, here.rectangles, strict=True):
        for name in ("alpha", "kappa", "centred_kappa", "mass", "error", "weight"):
            torch.testing.assert_close(
                getattr(found, name).cpu(), getattr(expected, name), rtol=1e-8, atol=1e-9
            )
