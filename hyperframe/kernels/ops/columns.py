"""Schema and shapes of the operator that scales keys; `sketching.columns` implements it."""

from __future__ import annotations

import torch

__all__ = ["SCHEMA"]

SCHEMA = "(Tensor key, Tensor gram, float floor) -> (Tensor, Tensor)"
"""Keys whose columns have energy 1, and what they were divided by; see `sketching.columns`."""

torch.library.define("hyperframe::scaled_keys", SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("hyperframe::scaled_keys")
def _scaled(
    key: torch.Tensor, gram: torch.Tensor, floor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*gram.shape[:2], *key.shape[2:])
    scaled = key.new_empty(shape, dtype=torch.promote_types(key.dtype, torch.float32))
    return scaled, scaled.new_empty(shape[:-1])
