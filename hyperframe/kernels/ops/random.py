"""Random numbers as a function of (seed, stream, element): the same bits on every device.

Element `i` of stream `s` under seed `x` is `mix(key + i g)` with `key = mix(mix(x + g) + s h)`,
where `mix` is the finaliser of splitmix64 and all arithmetic is modulo 2^64: within a stream this
is the sequence of splitmix64, started at a place that depends on seed and stream. Nothing is
carried from draw to draw, so that a draw can be traced, captured in a CUDA graph and recomputed.

The seed is read on its device when the operator runs. Source: Steele, Lea and Flood, "Fast
splittable pseudorandom number generators" (2014); counter-based use after Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from . import has_triton

__all__ = ["random_normal", "random_uniform"]


def _signed(value: int) -> int:
    """Return the int64 with the lowest 64 bits of `value`."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


_STEP = _signed(0x9E3779B97F4A7C15)  # g: 2^64 over the golden ratio
_STREAM_STEP = 0xD1342543DE82EF95  # h: any odd number with no pattern
_FACTORS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def random_uniform(seed: torch.Tensor, stream: int, shape: Sequence[int]) -> torch.Tensor:
    """Return draws from [0, 1): multiples of 2^-53.

    Args:
        seed: int64, one element; any value.
        stream: which of the independent streams of the seed; any int64.
        shape: shape of the result.

    Returns:
        float64, on the device of the seed. One launch on a GPU with Triton. No gradient.
    """
    drawn: torch.Tensor = torch.ops.hyperframe.random_uniform(seed, stream, shape)
    return drawn


def random_normal(seed: torch.Tensor, stream: int, shape: Sequence[int]) -> torch.Tensor:
    """Return draws from the standard normal distribution, by the method of Box and Muller.

    Computed in float64, each from two uniform numbers of the stream, and rounded to float32.
    Logarithm and cosine may differ in the last bit of a float64 between devices; their float32
    differs about once in 1e8 draws.

    Args: as `random_uniform`.

    Returns:
        float32, on the device of the seed. One launch on a GPU with Triton. No gradient.
    """
    drawn: torch.Tensor = torch.ops.hyperframe.random_normal(seed, stream, shape)
    return drawn


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shifted(x, 30)) * _FACTORS[0]
    x = (x ^ _shifted(x, 27)) * _FACTORS[1]
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Shift right and fill with zeros: `>>` of an int64 repeats the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _uniform(seed: torch.Tensor, stream: int, count: int) -> torch.Tensor:
    """Return the first `count` numbers of a stream."""
    key = _mix(_mix(seed.reshape(()) + _STEP) + _signed(stream * _STREAM_STEP))
    bits = _mix(torch.arange(count, device=seed.device) * _STEP + key)
    return _shifted(bits, 11).double() * 2.0**-53


def _uniform_torch(seed: torch.Tensor, stream: int, shape: Sequence[int]) -> torch.Tensor:
    return _uniform(seed, stream, math.prod(shape)).reshape(shape)


def _normal_torch(seed: torch.Tensor, stream: int, shape: Sequence[int]) -> torch.Tensor:
    first, second = _uniform(seed, stream, 2 * math.prod(shape)).view(-1, 2).unbind(1)
    # 1 - u lies in (0, 1]: its logarithm is finite
    radius = torch.sqrt(-2 * torch.log(1 - first))
    return (radius * torch.cos(2 * math.pi * second)).float().reshape(shape)


_SCHEMA = "(Tensor seed, int stream, SymInt[] shape) -> Tensor"
_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define("hyperframe::random_uniform", _SCHEMA, tags=_TAGS)
torch.library.define("hyperframe::random_normal", _SCHEMA, tags=_TAGS)


@torch.library.impl("hyperframe::random_uniform", "default")
def _run_uniform(seed: torch.Tensor, stream: int, shape: Sequence[int]) -> torch.Tensor:
    if not (seed.is_cuda and has_triton()):
        return _uniform_torch(seed, stream, shape)
    from ..triton import random as kernels

    with torch.cuda.device(seed.device):
        return kernels.random_uniform(seed, stream, shape)


@torch.library.impl("hyperframe::random_normal", "default")
def _run_normal(seed: torch.Tensor, stream: int, shape: Sequence[int]) -> torch.Tensor:
    if not (seed.is_cuda and has_triton()):
        return _normal_torch(seed, stream, shape)
    from ..triton import random as kernels

    with torch.cuda.device(seed.device):
        return kernels.random_normal(seed, stream, shape)


@torch.library.register_fake("hyperframe::random_uniform")
def _shape_of_uniform(seed: torch.Tensor, stream: int, shape: Sequence[int]) -> torch.Tensor:
    return seed.new_empty(shape, dtype=torch.float64)


@torch.library.register_fake("hyperframe::random_normal")
def _shape_of_normal(seed: torch.Tensor, stream: int, shape: Sequence[int]) -> torch.Tensor:
    return seed.new_empty(shape, dtype=torch.float32)
