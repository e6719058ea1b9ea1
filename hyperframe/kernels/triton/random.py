"""Random numbers in one launch; the same bits as `hyperframe.kernels.ops.random` in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

__all__ = ["random_normal", "random_uniform"]

_BLOCK = 1024


@triton.jit
def _mix(x):
    """Mix the bits of a uint64: the finaliser of splitmix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _uniform(seed, stream, element):
    """Return the uniform numbers of some elements (int64) of a stream."""
    key = _mix(seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15)
    key = _mix(key + stream.to(tl.uint64, bitcast=True) * 0xD1342543DE82EF95)
    bits = _mix(element.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15 + key)
    return (bits >> 11).to(tl.int64, bitcast=True).to(tl.float64) * 1.1102230246251565e-16


@triton.jit(do_not_specialize=["stream", "count"])
def _uniform_kernel(out_ptr, seed_ptr, stream, count, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    drawn = _uniform(tl.load(seed_ptr), tl.cast(stream, tl.int64), element)
    tl.store(out_ptr + element, drawn, mask=element < count)


@triton.jit(do_not_specialize=["stream", "count"])
def _normal_kernel(out_ptr, seed_ptr, stream, count, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed, stream = tl.load(seed_ptr), tl.cast(stream, tl.int64)
    first = _uniform(seed, stream, 2 * element)
    second = _uniform(seed, stream, 2 * element + 1)
    radius = tl.sqrt(-2.0 * tl.log(1.0 - first))
    drawn = radius * tl.cos(6.283185307179586 * second)
    tl.store(out_ptr + element, drawn.to(tl.float32), mask=element < count)


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
