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

__all__ = [
    "prefix_draws",
    "random_normal",
    "random_uniform",
    "range_draws",
    "spread_range_draws",
    "weigh_prefix_draws",
]


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


def prefix_draws(
    seed: torch.Tensor, stream: int, prefixes: torch.Tensor, shape: Sequence[int], num_keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return uniform draws from prefixes of the keys, by the numbers of `random_uniform`.

    Args:
        seed: as in `random_uniform`.
        stream: as in `random_uniform`.
        prefixes: int64 `[tiles]`, on the device of the seed.
        shape: `(batch, heads, tiles, m)`.
        num_keys: keys of the call; longer prefixes count as that long.

    Returns:
        int64 of that shape, and log weights, float32 `[tiles, m]`; see `weigh_prefix_draws`. One
        launch on a GPU with Triton, and no number is stored in between. No gradient.
    """
    index, weight = torch.ops.hyperframe.prefix_draws(seed, stream, prefixes, shape, num_keys)
    return index, weight


def weigh_prefix_draws(
    draws: torch.Tensor, prefixes: torch.Tensor, num_keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys that draws from [0, 1) name in prefixes, and their log weights.

    Args:
        draws: float64 `[batch, heads, tiles, m]`.
        prefixes: int64 `[tiles]`.
        num_keys: keys of the call.

    Returns:
        int64, and float32 `[tiles, m]`: `log(length / m)`. A prefix of at most `m` keys is taken
        whole, every key once with weight 1, and `-inf` in the slots behind.
    """
    num_samples = draws.shape[-1]
    length = prefixes.clamp(min=1, max=num_keys).unsqueeze(-1)  # [T, 1]
    slot = torch.arange(num_samples, device=draws.device)
    is_whole = prefixes.unsqueeze(-1) <= num_samples
    whole = torch.zeros_like(slot, dtype=torch.float32)
    whole = whole.masked_fill(slot >= prefixes.unsqueeze(-1), float("-inf"))
    weight = torch.where(is_whole, whole, torch.log(length / max(1, num_samples)))
    # below the length: rounding never takes the product of 53 bits up to it
    index = torch.where(is_whole, slot.clamp(max=num_keys - 1), (draws * length).long())
    return index, weight


def range_draws(
    seed: torch.Tensor, stream: int, start: torch.Tensor, length: torch.Tensor, shape: Sequence[int]
) -> torch.Tensor:
    """Return uniform draws from ranges of the keys, by the numbers of `random_uniform`.

    Args:
        seed: as in `random_uniform`.
        stream: as in `random_uniform`.
        start: int64 `[ranges, 1]`, on the device of the seed: the first key of each.
        length: float64 `[ranges, 1]`: how many keys each has, at least one.
        shape: `(batch, heads, ranges, m)`.

    Returns:
        int64 of that shape; see `spread_range_draws`. One launch on a GPU with Triton, and no
        number is stored in between. No gradient.
    """
    index: torch.Tensor = torch.ops.hyperframe.range_draws(seed, stream, start, length, shape)
    return index


def spread_range_draws(
    draws: torch.Tensor, start: torch.Tensor, length: torch.Tensor
) -> torch.Tensor:
    """Return the keys that draws from [0, 1) name in ranges.

    Args:
        draws: float64 `[batch, heads, ranges, m]`.
        start: int64 `[ranges, 1]`.
        length: float64 `[ranges, 1]`.

    Returns:
        int64. A range of at most `m` keys is taken whole, the last key in all slots behind.
    """
    slot = torch.arange(draws.shape[-1], device=draws.device)
    whole = torch.minimum(slot, length.long() - 1)
    # below the length: rounding never takes the product of 53 bits up to it
    place = torch.where(length <= draws.shape[-1], whole, (draws * length).long())
    return place + start


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
torch.library.define(
    "hyperframe::prefix_draws",
    "(Tensor seed, int stream, Tensor prefixes, SymInt[] shape, SymInt num_keys)"
    " -> (Tensor, Tensor)",
    tags=_TAGS,
)
torch.library.define(
    "hyperframe::range_draws",
    "(Tensor seed, int stream, Tensor start, Tensor length, SymInt[] shape) -> Tensor",
    tags=_TAGS,
)


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


@torch.library.impl("hyperframe::prefix_draws", "default")
def _run_prefixes(
    seed: torch.Tensor, stream: int, prefixes: torch.Tensor, shape: Sequence[int], num_keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if not (seed.is_cuda and has_triton()):
        return weigh_prefix_draws(_uniform_torch(seed, stream, shape), prefixes, num_keys)
    from ..triton import random as kernels

    with torch.cuda.device(seed.device):
        return kernels.prefix_draws(seed, stream, prefixes, shape, num_keys)


@torch.library.impl("hyperframe::range_draws", "default")
def _run_ranges(
    seed: torch.Tensor, stream: int, start: torch.Tensor, length: torch.Tensor, shape: Sequence[int]
) -> torch.Tensor:
    if not (seed.is_cuda and has_triton()):
        return spread_range_draws(_uniform_torch(seed, stream, shape), start, length)
    from ..triton import random as kernels

    with torch.cuda.device(seed.device):
        return kernels.range_draws(seed, stream, start, length, shape)


@torch.library.register_fake("hyperframe::range_draws")
def _shape_of_ranges(
    seed: torch.Tensor, stream: int, start: torch.Tensor, length: torch.Tensor, shape: Sequence[int]
) -> torch.Tensor:
    return seed.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("hyperframe::prefix_draws")
def _shapes_of_prefixes(
    seed: torch.Tensor, stream: int, prefixes: torch.Tensor, shape: Sequence[int], num_keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    index = seed.new_empty(shape, dtype=torch.int64)
    return index, seed.new_empty(shape[2:], dtype=torch.float32)


@torch.library.register_fake("hyperframe::random_uniform")
def _shape_of_uniform(seed: torch.Tensor, stream: int, shape: Sequence[int]) -> torch.Tensor:
    return seed.new_empty(shape, dtype=torch.float64)


@torch.library.register_fake("hyperframe::random_normal")
def _shape_of_normal(seed: torch.Tensor, stream: int, shape: Sequence[int]) -> torch.Tensor:
    return seed.new_empty(shape, dtype=torch.float32)
