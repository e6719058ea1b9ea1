"""Hash functions: arithmetic modulo the prime, and the independence that is promised."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.errors import ArgumentError
from hyperframe.randomness import Stream
from hyperframe.sketching.hashing import (
    PRIME,
    PolynomialHash,
    next_prime,
    pairwise_permutations,
    random_signs,
)  # fmt: skip

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, independence: int, seed: int = 0) -> PolynomialHash:
    return PolynomialHash.draw(
        shape, independence=independence, device=CPU, generator=generator(seed)
    )


@given(
    coefficients=st.lists(st.integers(0, PRIME - 1), min_size=1, max_size=5),
    index=st.lists(st.integers(0, PRIME - 1), min_size=1, max_size=5),
)
def test_residues_are_those_of_exact_integers(coefficients: list[int], index: list[int]) -> None:
    index += [0, PRIME - 1]
    found = PolynomialHash(coefficients=torch.tensor(coefficients)).residues(torch.tensor(index))
    degree = len(coefficients) - 1
    expected = [
        sum(c * x ** (degree - power) for power, c in enumerate(coefficients)) % PRIME
        for x in index
    ]
    assert found.tolist() == expected


def test_the_largest_coefficients_do_not_overflow() -> None:
    found = PolynomialHash(coefficients=torch.full((4,), PRIME - 1)).residues(
        torch.tensor([PRIME - 1])
    )
    assert found.tolist() == [((PRIME - 1) * sum((PRIME - 1) ** i for i in range(4))) % PRIME]


def test_a_family_has_the_shape_of_its_draw_and_of_its_indices() -> None:
    hashes = draw(2, 3, independence=2)
    index = torch.arange(20).view(4, 5)
    assert hashes.count == 6
    assert hashes.residues(index).shape == (2, 3, 4, 5)
    assert hashes.buckets(index, 7).shape == (2, 3, 4, 5)
    signs = hashes.signs(index, torch.float32)
    assert signs.dtype == torch.float32
    assert signs.unique().tolist() == [-1, 1]
    again = draw(2, 3, independence=2)
    assert torch.equal(hashes.coefficients, again.coefficients)
    assert hashes.coefficients.flatten().unique().numel() == 12


@given(num_buckets=st.sampled_from([1, 2, 7, 64, 1000, PRIME - 1, PRIME]), seed=st.integers(0, 99))
def test_buckets_are_runs_of_residues_as_equal_as_can_be(num_buckets: int, seed: int) -> None:
    # x -> x maps indices onto themselves
    identity = PolynomialHash(coefficients=torch.tensor([1, 0]))
    bounds = [bucket * PRIME // num_buckets for bucket in (0, num_buckets // 2, num_buckets - 1)]
    index = torch.tensor([0, PRIME - 1, *bounds, *[min(PRIME - 1, x + seed) for x in bounds]])
    found = identity.buckets(index, num_buckets)
    assert found.tolist() == [x * num_buckets // PRIME for x in index.tolist()]
    assert found.min() == 0
    assert found.max() == num_buckets - 1


@pytest.mark.statistical
def test_pairs_collide_as_seldom_as_independent_ones() -> None:
    # 20,000 pairwise independent functions, 8 buckets: a pair collides 2,500 times on average,
    # standard deviation 47. six of them, for 10 pairs: a false alarm once in 10^7
    values = draw(20_000, independence=2).buckets(torch.tensor([0, 1, 2, 7, 2**30]), 8)
    for a, b in torch.combinations(torch.arange(5)).tolist():
        assert abs(int((values[:, a] == values[:, b]).sum()) - 2500) < 6 * 47


@pytest.mark.statistical
def test_products_of_four_signs_vanish_on_average() -> None:
    # of 20,000 products of independent signs the sum has standard deviation 142; 6 of them
    signs = draw(20_000, independence=4).signs(torch.tensor([3, 4, 5, 6]))
    for count in range(1, 5):
        assert abs(int(signs[:, :count].prod(dim=1).sum())) < 6 * math.sqrt(20_000)


@pytest.mark.parametrize("independence", [0, -1])
def test_a_function_without_coefficients_is_refused(independence: int) -> None:
    with pytest.raises(ArgumentError, match=f"independence={independence}.*2 makes it pairwise"):
        draw(3, independence=independence)


@pytest.mark.parametrize("num_buckets", [0, PRIME + 1])
def test_a_number_of_buckets_out_of_range_is_refused(num_buckets: int) -> None:
    with pytest.raises(ArgumentError, match=f"num_buckets={num_buckets}"):
        draw(3, independence=2).buckets(torch.arange(3), num_buckets)


def test_the_next_prime_is_a_prime_and_the_next_one() -> None:
    def is_prime(number: int) -> bool:
        return number > 1 and all(number % divisor for divisor in range(2, number))

    for number in range(300):
        expected = next(x for x in range(number, 2 * number + 3) if is_prime(x))
        assert next_prime(number) == expected


@given(size=st.integers(1, 70), seed=st.integers(0, 999))
def test_a_permutation_has_every_place_once(size: int, seed: int) -> None:
    found = pairwise_permutations((2, 3), size, device=CPU, generator=generator(seed))
    assert found.shape == (2, 3, next_prime(size))
    assert torch.equal(found.sort(dim=-1).values, torch.arange(next_prime(size)).expand_as(found))


@pytest.mark.statistical
def test_permutations_treat_all_pairs_of_places_alike() -> None:
    # 42,000 permutations of 7: of the 42 places of a pair each has 1,000, standard deviation 31
    found = pairwise_permutations((42_000,), 7, device=CPU, generator=generator(1))
    pairs = found[:, [0, 5]] @ torch.tensor([7, 1])
    counts = pairs.bincount(minlength=49).view(7, 7)
    assert counts.diagonal().sum() == 0
    assert (counts[~torch.eye(7, dtype=torch.bool)] - 1000).abs().max() < 6 * 31


@pytest.mark.parametrize("size", [0, PRIME])
def test_a_permutation_of_a_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(ArgumentError, match=f"size={size}"):
        pairwise_permutations((1,), size, device=CPU)


@pytest.mark.statistical
def test_signs_are_independent_of_each_other() -> None:
    count, length = 100, 400
    words = random_signs((2,), count, length, device=CPU, generator=generator())
    assert words.shape == (2, 3, length)
    signs = torch.stack([1 - 2 * (words[:, s // 48] >> s % 48 & 1) for s in range(count)], dim=1)
    signs = signs.flatten(0, 1).double()  # [heads * count, length]
    # 20,000 products of a pair, each sum of 400 signs: 8 standard deviations of 20, in 2e4 pairs
    # of rows a false alarm once in 10^10 (2 * Q(8) = 1.2e-15 each)
    products = signs @ signs.T - length * torch.eye(len(signs), dtype=torch.float64)
    assert products.abs().max() < 8 * math.sqrt(length)


def test_a_stream_draws_other_numbers_each_time_and_the_same_ones_again() -> None:
    first, again = Stream(3), Stream(3)
    hashes = [PolynomialHash.draw((2,), independence=4, device=CPU, generator=first)
              for _ in range(2)]  # fmt: skip
    assert not torch.equal(hashes[0].coefficients, hashes[1].coefficients)
    same = PolynomialHash.draw((2,), independence=4, device=CPU, generator=again)
    assert torch.equal(hashes[0].coefficients, same.coefficients)
