"""Algorithm 4 for row sums: against its transcription, its geometry, and its record."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.detectors import create as create_detector
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.estimators import create
from hyperframe.estimators.causal_approx_d import causal_approx_d
from hyperframe.masks import HeavyMask
from hyperframe.randomness import Stream
from hyperframe.rectangles import causal_levels, leaf_size, level_rectangles
from hyperframe.testing import dense_attention
from tests.estimators.transcriptions import causal_approx_d as transcription
from tests.estimators.transcriptions import entries


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(num_queries: int, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator()
    query = torch.randn(1, 2, num_queries, 3, generator=g, dtype=torch.float64)
    return query, torch.randn(1, 1, num_keys, 3, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["approx_d(num_rows=20)", "uniform", "exact", "kde"])
@pytest.mark.parametrize("length", [1, 13, 32, 41])
def test_row_sums_are_those_of_the_paper_with_the_same_calls(estimator: str, length: int) -> None:
    query, key = tensors(length, length)
    detector = create_detector("oracle(budget=2)")
    options: dict[str, Any] = {"scale": 0.8, "num_samples": 3}
    sums, _ = causal_approx_d(
        query, key, detector=detector, estimator=estimator, longest_leaf=5,
        generator=generator(7), **options,
    )  # fmt: skip
    source = [generator(7), generator(7)]
    for head in range(2):

        def unmasked(rows: range, columns: range, head: int = head) -> list[float]:
            q, k = query[:, :, rows.start : rows.stop], key[:, :, columns.start : columns.stop]
            mask = detector.find(q, k, scale=0.8)
            found = create(estimator).row_sums(q, k, mask, **options, generator=source[head])
            found_here: list[float] = found.log_sum[0, head].exp().tolist()
            return found_here

        a = entries(query[0, head], key[0, 0], 0.8)
        expected = torch.tensor(transcription(a, leaf_size(length, 5), unmasked)).double().log()
        torch.testing.assert_close(sums.log_sum[0, head], expected, rtol=0, atol=1e-5)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 20))
def test_every_visible_entry_is_counted_once(
    num_queries: int, num_keys: int, longest_leaf: int
) -> None:
    query, key = tensors(num_queries, num_keys)
    sums, record = causal_approx_d(
        query, key, detector="sliding_window(width=3)", longest_leaf=longest_leaf, num_samples=80
    )  # as many samples as keys: every call is exact
    exact = dense_attention(query, key, key, is_causal=True).lse
    torch.testing.assert_close(sums.log_sum, exact)
    counted = torch.zeros(num_queries, num_keys)
    offset = num_keys - num_queries
    for start, stop in record.leaves:
        assert stop - start <= longest_leaf
        counted[start:stop, start + offset : stop + offset] += torch.ones(
            stop - start, stop - start
        ).tril()
    for call in record.rectangles:
        first_row, last_row, first_key, last_key = call.places
        assert last_key <= first_row + offset  # no key comes after a query
        counted[first_row:last_row, first_key:last_key] += 1
    assert torch.equal(counted, torch.ones(num_queries, num_keys).tril(offset))


@pytest.mark.parametrize("length, longest_leaf", [(1, 4), (4, 4), (5, 4), (64, 4), (97, 10)])
def test_the_record_holds_the_calls_of_the_recursion(length: int, longest_leaf: int) -> None:
    query, key = tensors(length, length)
    _, record = causal_approx_d(query, key, longest_leaf=longest_leaf, num_samples=2)
    leaf = leaf_size(length, longest_leaf)
    levels = causal_levels(length, leaf)
    expected = sorted(places for level in levels for places in level_rectangles(level, length))
    assert sorted(call.places for call in record.rectangles) == expected
    assert record.num_calls == len(expected) == len(record.leaves) - 1
    assert record.depth == len(levels)
    assert all(call.alpha is None and call.kappa is None for call in record.rectangles)
    assert sorted({call.depth for call in record.rectangles}) == list(range(len(levels)))


def test_measures_are_taken_of_each_rectangle() -> None:
    query, key = tensors(24, 30)

    def alpha(q: torch.Tensor, k: torch.Tensor, *, scale: float) -> torch.Tensor:
        share = (scale * q @ k.mT).softmax(-1)
        return k.shape[2] * share.square().sum(dim=-2).amax(dim=-1)

    def kappa(q: torch.Tensor, k: torch.Tensor, mask: HeavyMask, *, scale: float) -> torch.Tensor:
        rest = (scale * q @ k.mT).exp().masked_fill(mask.to_dense(), 0).sum(-1)
        return rest.amax(-1) / rest.amin(-1)

    options: dict[str, Any] = {"longest_leaf": 6, "num_samples": 3, "scale": 0.5}
    options["detector"] = "oracle(budget=2)"
    plain, _ = causal_approx_d(query, key, generator=generator(), **options)
    sums, record = causal_approx_d(
        query, key, generator=generator(), alpha=alpha, kappa=kappa, **options
    )
    assert torch.equal(sums.log_sum, plain.log_sum)
    for call in record.rectangles:
        first_row, last_row, first_key, last_key = call.places
        q, k = query[:, :, first_row:last_row], key[:, :, first_key:last_key]
        assert call.alpha is not None
        assert call.kappa is not None
        assert torch.equal(call.alpha, alpha(q, k, scale=0.5))
        assert call.kappa.shape == (1, 2)
        assert (call.kappa >= 1).all()


def test_row_sums_have_a_gradient_and_follow_their_source() -> None:
    query, key = (x.requires_grad_() for x in tensors(20, 26))

    def log_sum(source: Any) -> torch.Tensor:
        sums, _ = causal_approx_d(
            query, key, detector="sliding_window(width=2)", longest_leaf=4, num_samples=3,
            generator=source,
        )  # fmt: skip
        return sums.log_sum

    assert torch.equal(log_sum(generator(1)), log_sum(generator(1)))
    assert not torch.equal(log_sum(generator(1)), log_sum(generator(2)))
    assert torch.equal(log_sum(Stream(1)), log_sum(Stream(1)))
    grads = torch.autograd.grad(log_sum(Stream(1)).sum(), [query, key])
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


def test_rows_without_keys_have_the_sum_0_and_finite_gradients() -> None:
    query, key = (x.requires_grad_() for x in tensors(20, 9))
    sums, _ = causal_approx_d(query, key, longest_leaf=3, num_samples=2)
    assert (sums.log_sum[:, :, :11] == -torch.inf).all()
    grads = torch.autograd.grad(sums.log_sum[:, :, 11:].sum(), [query, key])
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"num_samples": -1}, ArgumentError, "causal_approx_d: num_samples=-1"),
        ({"longest_leaf": 0}, ArgumentError, "causal_approx_d: longest_leaf=0"),
        ({"longest_leaf": 2.0}, ArgumentTypeError, "causal_approx_d: longest_leaf=2.0"),
        ({"estimator": 3}, ArgumentTypeError, "estimator=3"),
        ({"generator": 3}, ArgumentTypeError, "generator=3"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        causal_approx_d(*tensors(8, 8), **options)
