"""Schema and shapes of `hyperframe::tile_mass`; `kernels/mass.py` implements it."""

from __future__ import annotations

import torch

__all__ = ["SCHEMA"]

SCHEMA = (
    "(Tensor voters, Tensor rows, Tensor position, Tensor key, Tensor index, Tensor begin,"
    " SymInt[] window, float scale, bool is_causal, bool is_delayed,"
    " int stride, int step=1) -> Tensor"
)
"""Softmax mass of candidates; see `kernels.mass.tile_mass`."""

torch.library.define("hyperframe::tile_mass", SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("hyperframe::tile_mass")
def _shapes(
    voters: torch.Tensor, rows: torch.Tensor, position: torch.Tensor, key: torch.Tensor,
    index: torch.Tensor, begin: torch.Tensor, window: list[int], scale: float, is_causal: bool,
    is_delayed: bool, stride: int, step: int = 1,
) -> torch.Tensor:  # fmt: skip
    dtype = torch.promote_types(key.dtype, torch.float32)
    return torch.empty(index.shape, dtype=dtype, device=index.device)
