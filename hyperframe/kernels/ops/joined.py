"""Schema and shapes of `hyperframe::side_by_side`; `kernels/joined.py` implements it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["SCHEMA"]

SCHEMA = "(Tensor[] index, Tensor[] count, SymInt[] shape, SymInt fill) -> Tensor"
"""Lists beside one another; see `kernels.joined.side_by_side`."""

torch.library.define("hyperframe::side_by_side", SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("hyperframe::side_by_side")
def _shapes(
    index: Sequence[torch.Tensor], count: Sequence[torch.Tensor], shape: Sequence[int], fill: int
) -> torch.Tensor:
    slots = sum(piece.shape[-1] for piece in index)
    return index[0].new_empty((*shape, slots), dtype=torch.int32)
