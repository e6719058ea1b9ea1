"""Schemas and shapes of the operators on hash buckets; `kernels/buckets.py` implements them."""

from __future__ import annotations

import torch

__all__ = ["SCHEMAS"]

SCHEMAS = {
    "bucket_codes": (
        "(Tensor x, Tensor rotation, Tensor shift, SymInt run, SymInt second) -> Tensor"
    ),
    "bucket_order": "(Tensor code, SymInt buckets, int chunk) -> (Tensor, Tensor, Tensor)",
    "bucket_ranges": (
        "(Tensor code, Tensor edge, Tensor bounds, Tensor counts, Tensor key_order, int chunk,"
        " SymInt reach, bool is_causal) -> Tensor"
    ),
    "bucket_topk": (
        "(Tensor query, Tensor query_order, Tensor key, Tensor key_order, Tensor ranges,"
        " SymInt reach, SymInt keep, float scale) -> (Tensor, Tensor)"
    ),
}
"""Buckets of vectors, orders by bucket, ranges of these, and the best keys there."""

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"hyperframe::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("hyperframe::bucket_codes")
def _codes_shape(
    x: torch.Tensor, rotation: torch.Tensor, shift: torch.Tensor, run: int, second: int
) -> torch.Tensor:
    return x.new_empty((rotation.shape[0], *x.shape[:3]), dtype=torch.int32)


@torch.library.register_fake("hyperframe::bucket_order")
def _order_shapes(
    code: torch.Tensor, buckets: int, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    leading, chunks = code.shape[:-1], (code.shape[-1] + chunk - 1) // chunk
    shapes = (code.shape, (*leading, buckets + 1), (*leading, chunks, buckets))
    order, bounds, counts = (code.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return order, bounds, counts


@torch.library.register_fake("hyperframe::bucket_ranges")
def _range_shape(
    code: torch.Tensor, edge: torch.Tensor, bounds: torch.Tensor, counts: torch.Tensor,
    key_order: torch.Tensor, chunk: int, reach: int, is_causal: bool,
) -> torch.Tensor:  # fmt: skip
    return code.new_empty((*code.shape, 2), dtype=torch.int32)


@torch.library.register_fake("hyperframe::bucket_topk")
def _topk_shapes(
    query: torch.Tensor, query_order: torch.Tensor, key: torch.Tensor, key_order: torch.Tensor,
    ranges: torch.Tensor, reach: int, keep: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    shape = (*query.shape[:3], ranges.shape[0] * keep)
    dtype = torch.promote_types(key.dtype, torch.float32)
    return query.new_empty(shape, dtype=torch.int32), query.new_empty(shape, dtype=dtype)
