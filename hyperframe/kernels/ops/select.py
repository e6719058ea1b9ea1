"""Schema and shapes of `hyperframe::select_top`; `kernels/select.py` implements it."""

from __future__ import annotations

import torch

__all__ = ["SCHEMA"]

SCHEMA = "(Tensor scores, Tensor stop, SymInt count) -> (Tensor, Tensor, Tensor)"
"""Best columns of rows; see `kernels.select.select_top`."""

torch.library.define("hyperframe::select_top", SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("hyperframe::select_top")
def _shapes(
    scores: torch.Tensor, stop: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = scores.shape[:-1]
    index = torch.empty((*rows, count), dtype=torch.int32, device=scores.device)
    taken = torch.empty(rows, dtype=torch.int32, device=scores.device)
    return index, torch.empty(index.shape, dtype=scores.dtype, device=scores.device), taken
