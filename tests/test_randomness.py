"""Randomness: explicit, seeded, spread over all seeds, the same on every machine."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.randomness import fold_in, make_generator, normal, uniform

CPU = torch.device("cpu")
integers = st.integers(-(2**70), 2**70)


@given(seed=integers, data=st.lists(integers, max_size=3))
def test_a_folded_seed_is_a_63_bit_number_that_depends_on_its_arguments_alone(
    seed: int, data: list[int]
) -> None:
    folded = fold_in(seed, *data)
    assert 0 <= folded < 2**63
    assert fold_in(seed, *data) == folded
    torch.Generator().manual_seed(folded)


def test_seeds_and_data_that_differ_give_seeds_that_differ() -> None:
    data = [(), *((a,) for a in range(50)), *((a, b) for a in range(9) for b in range(9))]
    seen = {fold_in(seed, *numbers) for seed in range(50) for numbers in data}
    # a birthday collision of 6,600 63-bit numbers has a chance of 2e-12
    assert len(seen) == 50 * (1 + 50 + 81)


def test_the_order_of_data_matters() -> None:
    assert fold_in(1, 2, 3) != fold_in(1, 3, 2) != fold_in(2, 1, 3)
    assert fold_in(0, 1) != fold_in(1, 0)


def test_neighbouring_seeds_differ_in_about_half_of_their_bits() -> None:
    flips = [(fold_in(s) ^ fold_in(s + 1)).bit_count() for s in range(2000)]
    # the mean of 2,000 sums of 63 fair bits: 31.5, within 5 standard errors (chance 6e-7)
    assert abs(sum(flips) / 2000 - 31.5) <= 5 * math.sqrt(63 / 4 / 2000)


def test_folded_seeds_are_what_they_always_were() -> None:
    # a change here changes the draws behind every seed that users have written down
    found = [fold_in(0), fold_in(1), fold_in(0, 1), fold_in(-1)]
    assert found == [
        2426572823872625407,
        5732950727793085071,
        6156086449524660550,
        2844572632055810722,
    ]


def test_a_generator_is_new_on_every_call_and_seeded() -> None:
    one, two, other = make_generator(3, "cpu"), make_generator(3, CPU), make_generator(4, "cpu")
    assert one is not two
    draws = [torch.rand(5, generator=g) for g in (one, two, other)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_without_a_seed_the_global_generator_gives_one() -> None:
    torch.manual_seed(1)
    first, second = make_generator(None, "cpu"), make_generator(None, "cpu")
    assert first.initial_seed() != second.initial_seed()
    torch.manual_seed(1)
    assert make_generator(None, "cpu").initial_seed() == first.initial_seed()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert make_generator(None, "cpu").initial_seed() == first.initial_seed()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_uniform_draws_lie_in_0_to_1_and_follow_the_generator(dtype: torch.dtype) -> None:
    draws = uniform((3, 1000), CPU, make_generator(0, "cpu"), dtype)
    assert draws.dtype == dtype
    assert draws.shape == (3, 1000)
    assert ((draws >= 0) & (draws < 1)).all()
    assert torch.equal(draws, uniform((3, 1000), CPU, make_generator(0, "cpu"), dtype))
    assert not torch.equal(draws[0], draws[1])


@pytest.mark.statistical
def test_draws_have_the_moments_of_their_distributions() -> None:
    size = 40_000
    # means and variances, within 5 standard errors each: four checks, false alarms 2.3e-6
    u = uniform((size,), CPU, make_generator(2, "cpu"))
    z = normal((size,), CPU, make_generator(2, "cpu")).double()
    assert abs(u.mean() - 1 / 2) <= 5 * math.sqrt(1 / 12 / size)
    assert abs(u.var() - 1 / 12) <= 5 * math.sqrt(1 / 180 / size)
    assert abs(z.mean()) <= 5 * math.sqrt(1 / size)
    assert abs(z.var() - 1) <= 5 * math.sqrt(2 / size)


def test_draws_are_made_where_the_generator_lives_and_moved() -> None:
    # a CPU generator gives the same numbers for tensors anywhere; "meta" stands for anywhere
    assert uniform((4,), torch.device("meta"), make_generator(0, "cpu")).device.type == "meta"
    assert normal((4,), torch.device("meta"), make_generator(0, "cpu")).device.type == "meta"


def test_without_a_generator_the_global_one_draws() -> None:
    torch.manual_seed(0)
    first = [uniform((4,), CPU, None), normal((4,), CPU, None)]
    torch.manual_seed(0)
    assert torch.equal(uniform((4,), CPU, None), first[0])
    assert torch.equal(normal((4,), CPU, None), first[1])
