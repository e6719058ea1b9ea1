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
