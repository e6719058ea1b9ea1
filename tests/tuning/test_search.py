"""Options, choices and the search between what passed and what failed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperframe.tuning.costs import Cost
from hyperframe.tuning.options import EXACT, Option, layer_options
from hyperframe.tuning.paired import Increase
from hyperframe.tuning.search import Choice, Verified, cheapest, mildest, search
from hyperframe.tuning.sensitivity import Damage

LOSSES = st.lists(st.floats(0, 1), min_size=3, max_size=3)
COSTS = st.tuples(st.floats(0.1, 5), st.floats(1 / 3, 1))


def damage(*quadratic: float) -> Damage:
    return Damage(
        first=(0.0,) * len(quadratic), quadratic=quadratic, error=quadratic, seconds=1.0,
        exact_seconds=1.0,
    )  # fmt: skip


def cost(whole: float, share: float = 1 / 3, heads: int = 3) -> Cost:
    return Cost(whole=whole, one=share * whole, num_key_heads=heads)


@settings(max_examples=max(60, settings.default.max_examples))
@given(st.lists(st.tuples(LOSSES, COSTS), min_size=1, max_size=3), COSTS)
def test_no_other_assignment_of_two_rungs_is_preferable_to_what_is_offered(
    rungs: list[tuple[list[float], tuple[float, float]]], exact: tuple[float, float]
) -> None:
    damages = [damage(*losses) for losses, _ in rungs]
    costs = [cost(*of_rung) for _, of_rung in rungs]
    options = layer_options(damages, costs, cost(*exact), mixed=True)
    price = {EXACT: cost(*exact), **dict(enumerate(costs))}
    loss = {EXACT: (0.0,) * 3, **{number: x.quadratic for number, x in enumerate(damages)}}

    def numbers(assigned: tuple[int, ...]) -> tuple[float, float]:
        used = set(assigned)
        return (
            sum(price[rung].of(assigned.count(rung)) for rung in used),
            sum(loss[rung][head] for head, rung in enumerate(assigned)),
        )

    for option in options:
        assert (option.cost, option.loss) == pytest.approx(numbers(option.rungs), abs=1e-9)
    for assigned in itertools.product(price, repeat=3):
        if len(set(assigned)) > 2:
            continue
        # of two rungs the one of the better heads is the dearer: the other way round is no mix
        if len(set(assigned)) == 2:
            first, second = sorted(set(assigned), key=lambda rung: price[rung].whole)
            if price[first].whole == price[second].whole:
                continue
        whole, lost = numbers(assigned)
        assert any(x.cost <= whole + 1e-9 and x.loss <= lost + 1e-9 for x in options)


def test_all_heads_alike_stay_offered_where_a_mix_is_better() -> None:
    options = layer_options([damage(0.5, 0.0, 0.0)], [cost(1.0)], cost(3.0), mixed=True)
    assert [x.rungs for x in options] == [(EXACT,) * 3, (EXACT, 0, 0), (0, 0, 0)]
    plain = layer_options([damage(0.5, 0.0, 0.0)], [cost(1.0)], cost(3.0), mixed=False)
    assert [x.rungs for x in plain] == [(EXACT,) * 3, (0, 0, 0)]


def test_rungs_that_cost_more_than_exact_attention_are_no_option() -> None:
    options = layer_options([damage(0.1, 0.1, 0.1)], [cost(4.0)], cost(3.0), mixed=True)
    assert [x.rungs for x in options] == [(EXACT,) * 3]


def uniform(*pairs: tuple[float, float]) -> list[Option]:
    """Options of one layer: exact first, then rungs by cost and loss."""
    numbered = enumerate(pairs, start=EXACT)
    return [Option(rungs=(rung,), cost=price, loss=loss) for rung, (price, loss) in numbered]


LAYERS = {
    layer: uniform((10.0, 0.0), (5.0, 0.001 * 4**layer), (2.0, 0.004 * 4**layer))
    for layer in range(4)
}


def test_cheapest_and_mildest_keep_their_limits_and_gain_from_more() -> None:
    costs, losses = [], []
    for limit in (0.0, 0.001, 0.01, 0.1, 1.0):
        choice = cheapest(LAYERS, limit)
        assert choice.loss <= limit
        costs.append(choice.cost)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == 40.0
    assert costs[-1] == 8.0
    for limit in (8.0, 15.0, 25.0, 40.0):
        found = mildest(LAYERS, limit)
        assert found is not None
        assert found.cost <= limit
        losses.append(found.loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0
    assert mildest(LAYERS, 7.9) is None


def test_layers_are_mixed_only_where_that_saves_enough() -> None:
    mixed = Option(rungs=(0, EXACT), cost=6.0, loss=0.0)
    slightly = Option(rungs=(0, EXACT), cost=9.9, loss=0.0)
    plain = Option(rungs=(EXACT, EXACT), cost=10.0, loss=0.0)
    assert cheapest({0: [plain, mixed]}, 0.1).options[0] is mixed
    assert cheapest({0: [plain, slightly]}, 0.1).options[0] is plain


@pytest.mark.parametrize("truth", [0.3, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("error", [0.0, 0.001])
def test_search_ends_with_a_policy_that_keeps_the_limit(truth: float, error: float) -> None:
    # 40 layers that differ: small steps between policies
    options = {layer: uniform((10.0, 0.0), (5.0, 0.0002 * (1 + layer))) for layer in range(40)}
    measured: list[float] = []

    def verify(choice: Choice) -> Verified:
        measured.append(truth * choice.loss)
        return Verified(increase=Increase(mean=measured[-1], error=error))

    limit = 0.02
    trials = search(options, verify, limit=limit, rounds=5, confidence=0.98)
    assert len(measured) == len(trials) <= 5
    assert len({tuple(x.choice.options.items()) for x in trials}) == len(trials)
    for trial in trials:
        assert trial.passed == (trial.upper <= limit)
    passed = [trial for trial in trials if trial.passed]
    assert passed
    # within a few rounds half of what the limit and the error allow is used
    best = max(trial.verified.increase.mean for trial in passed)
    everything = truth * sum(0.0002 * (1 + layer) for layer in range(40))
    assert best >= min(0.5 * (limit - 2.6 * error), 0.99 * everything)


def test_search_gives_up_where_nothing_keeps_the_limit() -> None:
    def verify(choice: Choice) -> Verified:
        return Verified(increase=Increase(mean=1.0, error=0.1))

    trials = search(LAYERS, verify, limit=0.01, rounds=3, confidence=0.95)
    assert 1 <= len(trials) <= 3
    assert not any(trial.passed for trial in trials)


def test_limit_of_nothing_measures_nothing() -> None:
    def verify(choice: Choice) -> Verified:
        raise AssertionError("nothing is to be measured")

    assert search(LAYERS, verify, limit=0.0, rounds=3, confidence=0.9) == []


def test_search_stops_where_nothing_is_cheaper() -> None:
    calls = []

    def verify(choice: Choice) -> Verified:
        calls.append(choice)
        return Verified(increase=Increase(mean=0.0, error=1e-9))

    options = {0: uniform((10.0, 0.0), (1.0, 1e-6))}
    trials = search(options, verify, limit=0.01, rounds=4, confidence=0.95)
    assert len(calls) == 1
    assert trials[0].passed


def test_search_stops_where_the_upper_limit_is_as_near_as_it_gets() -> None:
    measured = []

    def verify(choice: Choice) -> Verified:
        measured.append(choice)
        # a wide error: the upper limit is at 0.97 of the limit, and more would not pass
        return Verified(increase=Increase(mean=0.005, error=0.0144 / 2.326 / 0.9901))

    options = {layer: uniform((10.0, 0.0), (5.0, 0.001)) for layer in range(40)}
    trials = search(options, verify, limit=0.02, rounds=5, confidence=0.98)
    assert len(measured) == len(trials) == 1
    assert 0.9 * 0.02 < trials[0].upper <= 0.02


def test_confidence_is_halved_from_failure_to_failure() -> None:
    def verify(choice: Choice) -> Verified:
        return Verified(increase=Increase(mean=0.05, error=0.001))

    options = {layer: uniform((10.0, 0.0), (5.0, 0.0002 * (1 + layer))) for layer in range(40)}
    trials = search(options, verify, limit=0.02, rounds=3, confidence=0.95)
    expected = [Increase(mean=0.05, error=0.001).upper(1 - 0.05 / 2**k) for k in (1, 2, 3)]
    assert [trial.upper for trial in trials] == pytest.approx(expected)


def test_negative_increases_do_not_stop_the_search() -> None:
    def verify(choice: Choice) -> Verified:
        return Verified(increase=Increase(mean=-choice.loss, error=0.0))

    trials = search(LAYERS, verify, limit=0.02, rounds=4, confidence=0.95)
    assert all(trial.passed for trial in trials)
    assert trials[-1].choice.cost < trials[0].choice.cost
    assert trials[-1].choice.loss > 0.02  # of the prediction alone nothing is believed
