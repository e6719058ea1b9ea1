"""Costs of rungs: counted in keys, timed in seconds, and shared out among key heads."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from hyperframe.attention import HyperAttention
from hyperframe.tuning.costs import Cost, exact_cost, measure_cost, with_measured
from hyperframe.tuning.rungs import DEFAULT_LADDER, ladder, parse_rung
from hyperframe.tuning.sensitivity import Damage

WINDOW = parse_rung("sliding_window(width=16, num_sinks=0); num_samples=0")


def sample(heads: int = 4, key_heads: int = 2, n: int = 100) -> Any:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, n, 8, generator=generator)
    key = torch.randn(1, key_heads, n, 8, generator=generator)
    return query, key, key, None, True


def test_keys_are_those_that_count_for_a_query() -> None:
    assert exact_cost(sample(), kind="keys").whole == (1 + 100) / 2
    found = measure_cost(WINDOW, sample(), kind="keys", exact=50.5)
    # rows near the beginning see fewer than the 16 keys of the window
    assert found.whole == pytest.approx((sum(range(1, 17)) + 84 * 16) / 100)
    assert found.of(1) == pytest.approx(found.whole / 2)
    assert found.of(0) == 0.0


def test_seconds_are_the_least_of_some_calls_of_all_heads_and_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def slow(self: Any, query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        calls.append(query.shape[1])
        # 10 ms a call and 10 ms a key head, and the first call compiles something
        time.sleep(0.01 + 0.005 * query.shape[1] + 0.05 * (len(calls) == 1))
        return query

    monkeypatch.setattr(HyperAttention, "__call__", slow)
    found = measure_cost(WINDOW, sample(), kind="seconds", exact=0.1)
    assert calls == [4] * 4 + [2] * 4
    assert 0.03 <= found.whole < 0.08
    assert 0.02 <= found.of(1) < found.whole
    # what takes several times as long as exact attention is called once
    calls.clear()
    hopeless = measure_cost(WINDOW, sample(), kind="seconds", exact=0.001)
    assert calls == [4]
    assert hopeless.whole > 0.03


def test_measured_seconds_keep_the_share_of_one_head() -> None:
    damages = [
        Damage(first=(0.0,), quadratic=(0.0,), error=(0.0,), seconds=s, exact_seconds=2 * s)
        for s in (1.0, 3.0, 8.0)
    ]
    cost = Cost(whole=4.0, one=3.0, num_key_heads=2)
    found = with_measured(cost, damages)
    assert (found.whole, found.one) == (3.0, 2.25)
    assert with_measured(cost, damages, exact=True).whole == 6.0


def test_one_key_head_costs_what_all_do() -> None:
    assert Cost(whole=4.0, one=2.0, num_key_heads=1).of(1) == 4.0


def test_default_ladder_can_be_made_and_never_answers_exactly() -> None:
    rungs = ladder(DEFAULT_LADDER)
    assert len(rungs) == len(DEFAULT_LADDER)
    for rung in rungs:
        # leaves of the recursion apart
        assert rung.options["min_seq_len"] == 0 or rung.options["causal"] == "recursive"
        assert rung.attention(7).seed == 7
