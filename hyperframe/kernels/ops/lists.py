"""Schema and shapes of `hyperframe::best_distinct`; `kernels/lists.py` implements it."""

from __future__ import annotations

import torch

__all__ = ["SCHEMA"]

SCHEMA = (
    "(Tensor index, Tensor? weight, Tensor? count, Tensor? stop, SymInt start, SymInt limit,"
    " SymInt k, bool is_sorted) -> (Tensor, Tensor)"
)
"""The best distinct keys of lists; see `kernels.lists.best_distinct`."""

torch.library.define("hyperframe::best_distinct", SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("hyperframe::best_distinct")
def _shapes(
    index: torch.Tensor, weight: torch.Tensor | None, count: torch.Tensor | None,
    stop: torch.Tensor | None, start: int, limit: int, k: int, is_sorted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    kept = index.new_empty((*index.shape[:-1], k), dtype=torch.int32)
    return kept, index.new_empty(index.shape[:-1], dtype=torch.int32)
