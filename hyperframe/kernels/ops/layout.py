"""Schema and shapes of `hyperframe::tile_lists`; `kernels/layout.py` implements it."""

from __future__ import annotations

import torch

__all__ = ["SCHEMA", "WHOLE_BLOCK", "num_slots"]

WHOLE_BLOCK = 128
"""Lists end with a whole block of so many slots: the largest that an attention kernel takes."""

SCHEMA = (
    "(Tensor index, Tensor count, Tensor? sample_index, Tensor? sample_weight, SymInt[] band,"
    " SymInt tile_size, SymInt num_queries, SymInt num_keys, SymInt offset, bool is_causal,"
    " SymInt heads) -> (Tensor, Tensor, Tensor)"
)
"""Lists of a plan laid out by position, and their three counts; see `kernels.layout.tile_lists`."""

torch.library.define("hyperframe::tile_lists", SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def num_slots(
    index: torch.Tensor, sample_index: torch.Tensor | None, band: list[int], tile_size: int,
    num_keys: int, is_causal: bool,
) -> int:  # fmt: skip
    """Return how many slots the laid-out lists have."""
    left, right, num_sinks = band
    banded = 0
    if left >= 0:
        banded = min(num_keys, tile_size + left + (0 if is_causal else right))
        banded += min(num_sinks, num_keys)
    slots = banded + index.shape[3] + (0 if sample_index is None else sample_index.shape[3])
    return -(-slots // WHOLE_BLOCK) * WHOLE_BLOCK


@torch.library.register_fake("hyperframe::tile_lists")
def _shapes(
    index: torch.Tensor, count: torch.Tensor, sample_index: torch.Tensor | None,
    sample_weight: torch.Tensor | None, band: list[int], tile_size: int, num_queries: int,
    num_keys: int, offset: int, is_causal: bool, heads: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    lists = (index.shape[0], heads, index.shape[2])
    slots = num_slots(index, sample_index, band, tile_size, num_keys, is_causal)
    counts = torch.empty((3, *lists), dtype=torch.int32, device=index.device)
    keys = torch.empty((*lists, slots), dtype=torch.int32, device=index.device)
    return keys, torch.empty_like(keys, dtype=torch.float32), counts
