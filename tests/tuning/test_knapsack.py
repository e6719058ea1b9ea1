"""The choice of one option for each item: against all combinations."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperframe.tuning.knapsack import choose

NUMBERS = st.floats(0, 10, allow_nan=False, allow_subnormal=False)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[list[float]], list[list[float]], float]:
    """Up to five items of up to four options, and a capacity that is tight, roomy or too small."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    values, weights = (
        [draw(st.lists(NUMBERS, min_size=size, max_size=size)) for size in sizes] for _ in range(2)
    )
    least, most = (sum(pick(of_item) for of_item in weights) for pick in (min, max))
    share = draw(st.floats(-0.2, 1.2))
    return values, weights, max(0.0, least + share * (most - least))


def total(table: list[list[float]], picks: tuple[int, ...]) -> float:
    return math.fsum(of_item[pick] for of_item, pick in zip(table, picks, strict=True))


def best(values: list[list[float]], weights: list[list[float]], capacity: float) -> float:
    every = itertools.product(*(range(len(of_item)) for of_item in values))
    return min(
        (total(values, picks) for picks in every if total(weights, picks) <= capacity),
        default=math.inf,
    )


@settings(max_examples=max(150, settings.default.max_examples))
@given(tables())
def test_fits_and_is_as_good_as_any_that_fits_a_slightly_smaller_capacity(
    problem: tuple[list[list[float]], list[list[float]], float],
) -> None:
    values, weights, capacity = problem
    least = math.fsum(map(min, weights))
    picks = choose(values, weights, capacity, grid=500)
    if picks is None:
        assert least > capacity
        return
    assert total(weights, picks) <= capacity + 1e-9
    assert total(values, picks) >= best(values, weights, capacity + 1e-9) - 1e-9
    # what docstring and module promise: rounding costs a part of the free capacity, no more
    smaller = capacity - len(values) / 500 * (capacity - least) - 1e-9
    assert total(values, picks) <= best(values, weights, smaller) + 1e-9


@pytest.mark.parametrize("seed", range(40))
def test_convex_tables_are_solved_within_five_percent_of_the_saving(seed: int) -> None:
    # as a ladder of rungs: each step saves less and loses more than the one before
    draw = random.Random(seed).random
    items, options = 1 + seed % 5, 2 + seed % 3
    values, weights = [], []
    for _ in range(items):
        saved = sorted((draw() + 0.05 for _ in range(options)), reverse=True)
        lost = sorted(draw() + 0.05 for _ in range(options))
        values.append([10.0 - sum(saved[:k]) for k in range(options + 1)])
        weights.append([sum(lost[:k]) for k in range(options + 1)])
    capacity = draw() * math.fsum(max(of_item) for of_item in weights)
    picks = choose(values, weights, capacity)
    assert picks is not None
    assert total(weights, picks) <= capacity
    exact = total(values, (0,) * items)
    saving = exact - best(values, weights, capacity)
    # the seeds are fixed: a best choice within a thousandth of the capacity could be missed
    assert exact - total(values, picks) >= 0.95 * saving - 1e-9


def test_what_the_lightest_options_weigh_is_not_rounded() -> None:
    # 0.1 three times is more than 0.3 in floating point, and on any grid
    values, weights = [[1.0]] * 3, [[0.1]] * 3
    assert choose(values, weights, 0.3) == (0, 0, 0)
    assert choose(values, weights, 0.29) is None


def test_capacity_of_nothing_takes_what_weighs_nothing() -> None:
    assert choose([[3.0, 2.0, 1.0]], [[0.0, 0.0, 1e-9]], 0.0) == (1,)


def test_no_capacity_limit_takes_the_least_values() -> None:
    assert choose([[3.0, 1.0], [1.0, 5.0]], [[0.0, 9.0], [4.0, 0.0]], math.inf) == (1, 0)


def test_exchanges_use_what_rounding_left() -> None:
    # on a grid of two steps both cannot be exchanged; in truth they just fit
    assert choose([[1.0, 0.0]] * 3, [[0.0, 1.0]] * 3, 3.0, grid=2) == (1, 1, 1)


@pytest.mark.parametrize("capacity", [0.3, 0.9, 1.6])
def test_sides_may_be_swapped(capacity: float) -> None:
    costs, losses = [[1.0, 0.5, 0.1]] * 2, [[0.0, 0.2, 0.9]] * 2
    picks = choose(losses, costs, capacity)
    assert picks is not None
    assert total(losses, picks) == best(losses, costs, capacity)
