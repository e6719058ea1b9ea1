"""Schemas and shapes of the operators on hash buckets; `kernels/buckets.py` implements them."""

from __future__ import annotations

import torch

__all__ = ["SCHEMAS"]

SCHEMAS = {
    "bucket_codes": "(Tensor x, Tensor rotation, Tensor shift, SymInt run) -> Tensor",
    "bucket_order": "(Tensor code, SymInt buckets) -> (Tensor, Tensor)",
    "bucket_ranges": (
        "(Tensor code, Tensor edge, Tensor bounds, Tensor key_order, SymInt reach, bool is_causal)"
        " -> (Tensor, Tensor)"
    ),
    "bucket_topk": (
        "(Tensor query, Tensor query_order, Tensor key, Tensor key_order, Tensor low, Tensor high,"
        " SymInt reach, SymInt keep, float scale) -> (Tensor, Tensor)"
    ),
}
"""Buckets of vectors, orders by bucket, ranges of these, and the best keys there."""

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"hyperframe::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("hyperframe::bucket_codes")
def _codes_shape(
    x: torch.Tensor, rotation: torch.Tensor, shift: torch.Tensor, run: int
) -> torch.Tensor:
    return x.new_empty((rotation.shape[0], *x.shape[:3]), dtype=torch.int32)


@torch.library.register_fake("hyperframe::bucket_order")
def _order_shapes(code: torch.Tensor, buckets: int) -> tuple[torch.Tensor, torch.Tensor]:
    bounds = (*code.shape[:-1], buckets + 1)
    return code.new_empty(code.shape, dtype=torch.int32), code.new_empty(bounds, dtype=torch.int32)


@torch.library.register_fake("hyperframe::bucket_ranges")
def _range_shapes(
    code: torch.Tensor, edge: torch.Tensor, bounds: torch.Tensor, key_order: torch.Tensor,
    reach: int, is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    low, high = (code.new_empty(code.shape, dtype=torch.int32) for _ in range(2))
    return low, high


@torch.library.register_fake("hyperframe::bucket_topk")
def _topk_shapes(
    query: torch.Tensor, query_order: torch.Tensor, key: torch.Tensor, key_order: torch.Tensor,
    low: torch.Tensor, high: torch.Tensor, reach: int, keep: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    shape = (*query.shape[:3], low.shape[0] * keep)
    dtype = torch.promote_types(key.dtype, torch.float32)
    return query.new_empty(shape, dtype=torch.int32), query.new_empty(shape, dtype=dtype)
