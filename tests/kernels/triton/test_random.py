"""Random kernels: the bits of the torch version; on a CPU through the interpreter."""

from __future__ import annotations

import pytest
import torch

from hyperframe.kernels.ops import random as in_torch

pytest.importorskip("triton")
from hyperframe.kernels.triton import random as in_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 123456789)
STREAMS = (0, 1, 16, 2**40 + 3, -5)
SHAPES: tuple[tuple[int, ...], ...] = ((1,), (3, 700), (1024,), (2, 1, 1025))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_uniform_numbers_have_the_bits_of_the_torch_version(
    seed: int, shape: tuple[int, ...]
) -> None:
    for stream in STREAMS:
        expected = in_torch._uniform_torch(torch.tensor(seed), stream, shape)
        found = in_triton.random_uniform(torch.tensor([seed], device=DEVICE), stream, shape)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_normal_numbers_are_those_of_the_torch_version(seed: int) -> None:
    for stream in STREAMS:
        expected = in_torch._normal_torch(torch.tensor(seed), stream, (3, 700))
        found = in_triton.random_normal(torch.tensor(seed, device=DEVICE), stream, (3, 700))
        assert found.dtype == torch.float32
        # the last bit of a float64 may differ, and so may its rounding: about once in 1e8 numbers
        torch.testing.assert_close(found.cpu(), expected, rtol=2e-7, atol=1e-12)
        assert (found.cpu() != expected).sum() <= 1


def test_nothing_is_drawn_for_an_empty_shape() -> None:
    seed = torch.tensor(0, device=DEVICE)
    assert in_triton.random_uniform(seed, 0, (2, 0)).shape == (2, 0)
    assert in_triton.random_normal(seed, 0, (0,)).shape == (0,)


def test_numbers_beyond_the_result_are_not_written() -> None:
    # a longer draw of the same stream begins with the shorter one: no block is shifted
    seed = torch.tensor(5, device=DEVICE)
    whole = in_triton.random_uniform(seed, 3, (3000,))
    assert torch.equal(in_triton.random_uniform(seed, 3, (1500,)), whole[:1500])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 4, 300)])
def test_draws_from_prefixes_are_those_of_the_torch_version(
    seed: int, shape: tuple[int, int, int, int]
) -> None:
    num_keys = 9999
    prefixes = torch.tensor([0, 5, 7, 8, 9999])[: shape[2]] * (1 + (shape[3] == 300))
    for stream in STREAMS:
        draws = in_torch._uniform_torch(torch.tensor(seed), stream, shape)
        expected = in_torch.weigh_prefix_draws(draws, prefixes, num_keys)
        place = torch.tensor(seed, device=DEVICE)
        found = in_triton.prefix_draws(place, stream, prefixes.to(DEVICE), shape, num_keys)
        assert found[0].dtype == torch.int64
        assert torch.equal(found[0].cpu(), expected[0])
        assert found[1].dtype == torch.float32
        torch.testing.assert_close(found[1].cpu(), expected[1], rtol=1e-6, atol=1e-6)


def test_a_short_prefix_is_taken_whole_and_others_weigh_by_their_length() -> None:
    draws = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64).expand(1, 1, 3, 3)
    index, weight = in_torch.weigh_prefix_draws(draws, torch.tensor([0, 2, 12]), 20)
    assert index[0, 0].tolist() == [[0, 1, 2], [0, 1, 2], [0, 6, 11]]
    inf = float("inf")
    assert weight.exp().tolist() == [[0, 0, 0], [1, 1, 0], pytest.approx([4, 4, 4])]
    assert weight[0].tolist() == [-inf] * 3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_samples", [1, 7, 300])
def test_draws_from_ranges_are_those_of_the_torch_version(seed: int, num_samples: int) -> None:
    start = torch.tensor([[0], [40], [1000]])
    length = torch.tensor([[5.0], [960.0], [9999.0]], dtype=torch.float64)
    shape = (2, 3, 3, num_samples)
    for stream in STREAMS:
        draws = in_torch._uniform_torch(torch.tensor(seed), stream, shape)
        expected = in_torch.spread_range_draws(draws, start, length)
        place = torch.tensor(seed, device=DEVICE)
        given = (start.to(DEVICE), length.to(DEVICE))
        found = in_triton.range_draws(place, stream, *given, shape)
        assert found.dtype == torch.int64
        assert torch.equal(found.cpu(), expected)


def test_a_short_range_is_taken_whole_and_a_draw_stays_inside() -> None:
    draws = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64).expand(1, 1, 3, 3)
    length = torch.tensor([[2.0], [3.0], [12.0]], dtype=torch.float64)
    index = in_torch.spread_range_draws(draws, torch.tensor([[0], [5], [20]]), length)
    assert index[0, 0].tolist() == [[0, 1, 1], [5, 6, 7], [20, 26, 31]]
