"""Random numbers in one launch; the same bits as `hyperframe.kernels.ops.random` in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .configs import power_of_two

__all__ = ["prefix_draws", "random_normal", "random_uniform", "range_draws", "uniform_draws"]

_BLOCK = 1024


@triton.jit
def _mix(x):
    """Mix the bits of a uint64: the finaliser of splitmix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def uniform_draws(seed, stream, element):
    """Return the uniform numbers of some elements (int64) of a stream."""
    key = _mix(seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15)
    key = _mix(key + stream.to(tl.uint64, bitcast=True) * 0xD1342543DE82EF95)
    bits = _mix(element.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15 + key)
    return (bits >> 11).to(tl.int64, bitcast=True).to(tl.float64) * 1.1102230246251565e-16


@triton.jit(do_not_specialize=["stream", "count"])
def _uniform_kernel(out_ptr, seed_ptr, stream, count, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    drawn = uniform_draws(tl.load(seed_ptr), tl.cast(stream, tl.int64), element)
    tl.store(out_ptr + element, drawn, mask=element < count)


@triton.jit(do_not_specialize=["stream", "count"])
def _normal_kernel(out_ptr, seed_ptr, stream, count, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed, stream = tl.load(seed_ptr), tl.cast(stream, tl.int64)
    first = uniform_draws(seed, stream, 2 * element)
    second = uniform_draws(seed, stream, 2 * element + 1)
    radius = tl.sqrt(-2.0 * tl.log(1.0 - first))
    drawn = radius * tl.cos(6.283185307179586 * second)
    tl.store(out_ptr + element, drawn.to(tl.float32), mask=element < count)


@triton.jit(do_not_specialize=["stream", "tiles", "num_samples", "num_keys"])
def _prefix_kernel(
    index_ptr, weight_ptr, seed_ptr, prefix_ptr, stream, tiles, num_samples, num_keys,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = program % tiles
    prefix = tl.load(prefix_ptr + tile)
    length = tl.maximum(tl.minimum(prefix, num_keys), 1)
    seed, number = tl.load(seed_ptr), tl.cast(stream, tl.int64)
    log_weight = tl.log(length.to(tl.float32) / num_samples.to(tl.float32))
    first = program.to(tl.int64) * num_samples
    for start in range(0, num_samples, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        drawn = uniform_draws(seed, number, first + slot) * length.to(tl.float64)
        is_whole = prefix <= num_samples
        key = tl.where(is_whole, tl.minimum(slot, num_keys - 1), drawn.to(tl.int64))
        tl.store(index_ptr + first + slot, key, mask=slot < num_samples)
        if program < tiles:  # of the first head
            whole = tl.where(slot < prefix, 0.0, float("-inf"))
            weight = tl.where(is_whole, whole, log_weight)
            tl.store(weight_ptr + tile * num_samples + slot, weight, mask=slot < num_samples)


@triton.jit(do_not_specialize=["stream", "ranges", "num_samples"])
def _range_kernel(
    index_ptr, seed_ptr, start_ptr, length_ptr, stream, ranges, num_samples, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    number = program % ranges
    start, length = tl.load(start_ptr + number), tl.load(length_ptr + number)
    seed, stream64 = tl.load(seed_ptr), tl.cast(stream, tl.int64)
    first = program.to(tl.int64) * num_samples
    for begin in range(0, num_samples, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        place = (uniform_draws(seed, stream64, first + slot) * length).to(tl.int64)
        whole = tl.minimum(slot.to(tl.int64), length.to(tl.int64) - 1)
        place = tl.where(length <= num_samples.to(tl.float64), whole, place)
        tl.store(index_ptr + first + slot, start + place, mask=slot < num_samples)


def prefix_draws(
    seed: torch.Tensor, stream: int, prefixes: torch.Tensor, shape: Sequence[int], num_keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return draws from prefixes; see `hyperframe.kernels.ops.random.prefix_draws`."""
    batch, heads, tiles, num_samples = shape
    index = torch.empty(tuple(shape), dtype=torch.int64, device=seed.device)
    weight = torch.empty((tiles, num_samples), dtype=torch.float32, device=seed.device)
    if index.numel():
        block = min(256, power_of_two(num_samples))
        _prefix_kernel[(batch * heads * tiles,)](
            index, weight, seed, prefixes.contiguous(), stream, tiles, num_samples, num_keys,
            BLOCK=block, num_warps=max(1, block // 64),
        )  # fmt: skip
    return index, weight


def range_draws(
    seed: torch.Tensor, stream: int, start: torch.Tensor, length: torch.Tensor, shape: Sequence[int]
) -> torch.Tensor:
    """Return draws from ranges; see `hyperframe.kernels.ops.random.range_draws`."""
    batch, heads, ranges, num_samples = shape
    index = torch.empty(tuple(shape), dtype=torch.int64, device=seed.device)
    if index.numel():
        block = min(256, power_of_two(num_samples))
        _range_kernel[(batch * heads * ranges,)](
            index, seed, start.contiguous(), length.contiguous(), stream, ranges, num_samples,
            BLOCK=block, num_warps=max(1, block // 64),
        )  # fmt: skip
    return index


def random_uniform(seed: torch.Tensor, stream: int, shape: Sequence[int]) -> torch.Tensor:
    """Return draws from [0, 1); see `hyperframe.kernels.ops.random.random_uniform`."""
    return _launch(_uniform_kernel, seed, stream, shape, torch.float64)


def random_normal(seed: torch.Tensor, stream: int, shape: Sequence[int]) -> torch.Tensor:
    """Return normal draws; see `hyperframe.kernels.ops.random.random_normal`."""
    return _launch(_normal_kernel, seed, stream, shape, torch.float32)


def _launch(
    kernel: triton.JITFunction, seed: torch.Tensor, stream: int, shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    out = torch.empty(shape, dtype=dtype, device=seed.device)
    count = math.prod(shape)
    if count:
        kernel[(triton.cdiv(count, _BLOCK),)](out, seed, stream, count, BLOCK=_BLOCK)
    return out
