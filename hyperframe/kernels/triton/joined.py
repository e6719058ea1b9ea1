"""Lists side by side: one program copies the lists of one tile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ...ragged import spread_heads

__all__ = ["triton_side_by_side"]

_PIECES = 4  # of a launch
_BLOCK = 128


@triton.jit
def copy_list(
    list_ptr, list_batch, list_head, list_tile, count_ptr, count_batch, count_head, count_tile,
    group, length, joined_ptr, batch, head, tile, fill, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy one list; what it does not use becomes `fill`."""
    mine = head // group
    list_ptr += batch * list_batch + mine * list_head + tile * list_tile
    used = tl.load(count_ptr + batch * count_batch + mine * count_head + tile * count_tile)
    used = tl.minimum(used.to(tl.int32), length)
    for start in range(0, length, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        key = tl.load(list_ptr + slot, mask=slot < used, other=fill).to(tl.int32)
        tl.store(joined_ptr + slot, key, mask=slot < length)


@triton.jit(
    do_not_specialize=[
        "group_a", "group_b", "group_c", "group_d", "slots_a", "slots_b", "slots_c", "slots_d",
        "slots", "first", "heads", "tiles", "fill",
    ]
)  # fmt: skip
def side_by_side_kernel(
    list_a, batch_a, head_a, tile_a, count_a, count_batch_a, count_head_a, count_tile_a,
    group_a, slots_a,
    list_b, batch_b, head_b, tile_b, count_b, count_batch_b, count_head_b, count_tile_b,
    group_b, slots_b,
    list_c, batch_c, head_c, tile_c, count_c, count_batch_c, count_head_c, count_tile_c,
    group_c, slots_c,
    list_d, batch_d, head_d, tile_d, count_d, count_batch_d, count_head_d, count_tile_d,
    group_d, slots_d,
    joined_ptr, slots, first, heads, tiles, fill, PIECES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the slots from `first` on of `joined`, `[batch, heads, tiles, slots]`."""
    program = tl.program_id(0)
    tile = (program % tiles).to(tl.int64)
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    joined_ptr += program.to(tl.int64) * slots + first
    copy_list(
        list_a, batch_a, head_a, tile_a, count_a, count_batch_a, count_head_a, count_tile_a,
        group_a, slots_a, joined_ptr, batch, head, tile, fill, BLOCK,
    )  # fmt: skip
    if PIECES > 1:
        joined_ptr += slots_a
        copy_list(
            list_b, batch_b, head_b, tile_b, count_b, count_batch_b, count_head_b, count_tile_b,
            group_b, slots_b, joined_ptr, batch, head, tile, fill, BLOCK,
        )  # fmt: skip
    if PIECES > 2:
        joined_ptr += slots_b
        copy_list(
            list_c, batch_c, head_c, tile_c, count_c, count_batch_c, count_head_c, count_tile_c,
            group_c, slots_c, joined_ptr, batch, head, tile, fill, BLOCK,
        )  # fmt: skip
    if PIECES > 3:
        joined_ptr += slots_c
        copy_list(
            list_d, batch_d, head_d, tile_d, count_d, count_batch_d, count_head_d, count_tile_d,
            group_d, slots_d, joined_ptr, batch, head, tile, fill, BLOCK,
        )  # fmt: skip


def triton_side_by_side(
    index: Sequence[torch.Tensor], count: Sequence[torch.Tensor], shape: Sequence[int], fill: int
) -> torch.Tensor:
    """Do what `hyperframe.kernels.joined.side_by_side` says; no host sync."""
    batch, heads, tiles = shape
    slots = sum(piece.shape[-1] for piece in index)
    joined = torch.empty((batch, heads, tiles, slots), dtype=torch.int32, device=index[0].device)
    if joined.numel() == 0:
        return joined
    pieces = [
        (piece.shape[-1], _arguments(piece, used, heads))
        for piece, used in zip(index, count, strict=True)
        if piece.shape[-1]
    ]
    first = 0
    for start in range(0, len(pieces), _PIECES):
        some = pieces[start : start + _PIECES]
        filled = [given for _, given in some]
        filled += [filled[0]] * (_PIECES - len(some))
        side_by_side_kernel[(batch * heads * tiles,)](
            *(argument for piece in filled for argument in piece), joined, slots, first, heads,
            tiles, fill, PIECES=len(some), BLOCK=_BLOCK, num_warps=2,
        )  # fmt: skip
        first += sum(length for length, _ in some)
    return joined


def _arguments(
    piece: torch.Tensor, used: torch.Tensor, heads: int
) -> tuple[torch.Tensor | int, ...]:
    """Return a list and its counts, with strides of 0 where there is one for all, as arguments."""
    if piece.stride(-1) != 1 and piece.shape[-1] > 1:
        piece = piece.contiguous()
    here = max(piece.shape[1], used.shape[1])
    piece, used = _of_heads(piece, here), _of_heads(used, here)
    strides = [0 if size == 1 else x.stride(i) for x in (piece, used)
               for i, size in enumerate(x.shape[:3])]  # fmt: skip
    return (piece, *strides[:3], used, *strides[3:], heads // here, piece.shape[-1])


def _of_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    if tensor.shape[1] == 1:
        return tensor.expand(-1, heads, *[-1] * (tensor.dim() - 2))
    return spread_heads(tensor, heads)
