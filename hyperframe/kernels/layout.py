"""The lists of a plan laid out by position, from its parts: one launch on a GPU.

The builder does the same with sorts and scatters of whole lists, on any device
(`hyperframe.positional`); at n = 131,072 that takes longer than attending does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .ops import has_triton
from .ops.layout import WHOLE_BLOCK, num_slots  # defines the operator implemented here

__all__ = ["TileLists", "can_lay_out", "tile_lists"]


class TileLists(NamedTuple):
    """Lists `[banded | sinks | exact | sampled | unused]`, as in `TilePlan`.

    Of the unused slots, those up to a whole block of `WHOLE_BLOCK` are counted, with weight 0.

    Attributes:
        key_index: int32 `[batch, heads, tiles, slots]`.
        log_weight: float32, the same shape; `-inf` for copies of a key that is held elsewhere.
        key_count: int32 `[batch, heads, tiles]`.
        heavy_count: int32 `[batch, heads, tiles]`.
        band_count: int32 `[batch, heads, tiles]`.
    """

    key_index: torch.Tensor
    log_weight: torch.Tensor
    key_count: torch.Tensor
    heavy_count: torch.Tensor
    band_count: torch.Tensor


def can_lay_out(device: torch.device) -> bool:
    """Whether `tile_lists` runs on a device."""
    return device.type == "cuda" and torch.version.hip is None and has_triton()


def tile_lists(
    index: torch.Tensor, count: torch.Tensor, sample_index: torch.Tensor | None,
    sample_weight: torch.Tensor | None, *, band: tuple[int, int, int] | None, tile_size: int,
    num_queries: int, num_keys: int, offset: int, is_causal: bool, heads: int,
) -> TileLists:  # fmt: skip
    """Lay out band, sinks, listed keys and samples of every tile, no key counted twice.

    A banded copy of a listed key, a listed copy of a sink, and sampled copies of both get weight 0.
    Sampled copies of banded keys are left to the test of the band.

    Args:
        index: integer `[batch, 1 or heads, tiles, L]`, ascending distinct keys.
        count: integer `[batch, 1 or heads, tiles]`, how many are used.
        sample_index: integer `[batch, key_heads, tiles, m]`, or None.
        sample_weight: float32, the same shape, natural logarithm.
        band: keys before and after a row's position, and sinks; None for no band.
        tile_size: rows of a tile.
        num_queries: rows.
        num_keys: keys.
        offset: key position of row 0.
        is_causal: whether the band ends at the row's own position.
        heads: heads of the plan, a multiple of the heads of the samples.

    Returns:
        The lists. One launch, O(slots log L) a tile; CUDA only, see `can_lay_out`.
    """
    bounds = [-1, -1, 0] if band is None else list(band)
    keys, weights, counts = torch.ops.hyperframe.tile_lists(
        index, count, sample_index, sample_weight, bounds, tile_size, num_queries, num_keys, offset,
        is_causal, heads,
    )  # fmt: skip
    return TileLists(keys, weights, *counts.unbind())


@torch.library.impl("hyperframe::tile_lists", "CUDA")
def _run(
    index: torch.Tensor, count: torch.Tensor, sample_index: torch.Tensor | None,
    sample_weight: torch.Tensor | None, band: list[int], tile_size: int, num_queries: int,
    num_keys: int, offset: int, is_causal: bool, heads: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    from .triton.layout import triton_tile_lists

    with torch.cuda.device(index.device):
        return triton_tile_lists(
            index, count, sample_index, sample_weight, band, tile_size=tile_size,
            num_queries=num_queries, num_keys=num_keys, offset=offset, is_causal=is_causal,
            heads=heads,
            slots=num_slots(index, sample_index, band, tile_size, num_keys, is_causal),
            whole=WHOLE_BLOCK,
        )  # fmt: skip
