"""A kernel that scales keys to columns of energy 1: one pass over the keys, energies in float64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import is_interpreted, padded

__all__ = ["triton_scaled_keys"]

_BLOCK, _WARPS = 4096, 4  # numbers of a block of keys: 32 KiB of float64


@triton.jit(do_not_specialize=["num_keys", "query_heads", "group"])
def scaled_keys_kernel(
    key_ptr, key_batch, key_head, key_row, gram_ptr, trace_ptr, out_ptr, norm_ptr, num_keys,
    query_heads, group, floor, D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write some keys of one query head, and what they were divided by."""
    program = tl.program_id(1).to(tl.int64)
    key_ptr += program // query_heads * key_batch + program % query_heads // group * key_head
    gram_ptr += program * D * D
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < num_keys
    dim = tl.arange(0, BLOCK_D)
    is_there = is_column[:, None] & (dim < D)[None, :]
    source = key_ptr + column[:, None] * key_row
    raw = tl.load(source + dim[None, :], mask=is_there, other=0.0).to(tl.float32)
    # not so for NaN
    is_finite = tl.min((tl.abs(raw) < float("inf")).to(tl.int32), 1) > 0
    raw = tl.where(is_finite[:, None], raw, 0.0)
    size = tl.max(tl.abs(raw), 1)
    size = tl.where(size > 0.0, size, 1.0)
    wide = raw.to(tl.float64)
    # zeros that lie as the keys do: a thread has eight numbers of some keys, and reads those of a
    # row of the matrix once for all of them
    total = wide * 0.0
    # squares of float32 are far within the range of float64: nothing is scaled in the loop
    for place in range(D):
        here = tl.load(source + place, mask=is_column[:, None], other=0.0).to(tl.float64)
        row = tl.load(gram_ptr + place * D + dim, mask=dim < D, other=0.0)
        total += here * row[None, :]
    energy = tl.sum(total * wide, 1)
    least = tl.load(trace_ptr + program) * floor * tl.sum(wide * wide, 1)
    # not so for NaN: of keys that are not finite
    has_energy = energy > least
    norm = tl.sqrt(tl.where(has_energy, energy, 1.0))
    inverse = tl.where(has_energy, size.to(tl.float64) / norm, 0.0).to(tl.float32)
    norm = tl.where(has_energy, norm, 0.0).to(tl.float32)
    target = program * num_keys + column
    scaled = raw / size[:, None] * inverse[:, None]
    tl.store(out_ptr + target[:, None] * D + dim[None, :], scaled, mask=is_there)
    tl.store(norm_ptr + target, norm, mask=is_column)


def triton_scaled_keys(
    key: torch.Tensor, gram: torch.Tensor, floor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `hyperframe.sketching.columns.torch_scaled_keys` says; no sync.

    Args:
        key: up to 256 columns, not float64.
        gram: float64 `[batch, query_heads, d, d]`.
        floor: see there.
    """
    batch, heads = gram.shape[:2]
    num_keys, dim = key.shape[2:]
    shape = (batch, heads, num_keys, dim)
    out = torch.empty(shape, dtype=torch.float32, device=key.device)
    norm = torch.empty(shape[:-1], dtype=torch.float32, device=key.device)
    if out.numel() == 0:
        return out, norm
    key = key if key.stride(-1) == 1 else key.contiguous()
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    block = 16 if is_interpreted() else max(16, _BLOCK // max(32, padded(dim)))
    scaled_keys_kernel[(-(-num_keys // block), batch * heads)](
        key, *key.stride()[:3], gram.contiguous(), trace, out, norm, num_keys, heads,
        heads // key.shape[1], floor, D=dim, BLOCK_D=padded(dim), COLUMNS=block, num_warps=_WARPS,
    )  # fmt: skip
    return out, norm
