"""Schema and shapes of `hyperframe::hash_orders`; `kernels/hashing.py` implements it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["SCHEMA"]

SCHEMA = (
    "(Tensor query, Tensor key, Tensor projection, Tensor? key_threshold, SymInt[] runs,"
    " bool alternate) -> (Tensor, Tensor, Tensor)"
)
"""Query order, key order and key rank; see `kernels.hashing.hash_orders`."""

torch.library.define("hyperframe::hash_orders", SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("hyperframe::hash_orders")
def _shapes(
    query: torch.Tensor, key: torch.Tensor, projection: torch.Tensor,
    key_threshold: torch.Tensor | None, runs: Sequence[int], alternate: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    query_shape = (len(runs), *query.shape[:3])
    key_shape = (len(runs), *key.shape[:3])
    return (
        query.new_empty(query_shape, dtype=torch.int32),
        key.new_empty(key_shape, dtype=torch.int32),
        key.new_empty(key_shape, dtype=torch.int32),
    )
