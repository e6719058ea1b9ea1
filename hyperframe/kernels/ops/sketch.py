"""Schemas and shapes of the operators on sketches; `kernels/sketch.py` implements them."""

from __future__ import annotations

import torch

__all__ = ["CANDIDATES", "LISTS", "PRODUCTS", "SUMS"]

BRANCHING = 8  # children of a node: their scores, a byte each, are a word

CANDIDATES = (
    "(Tensor key, Tensor top, Tensor hashed, Tensor places, float factor, int unit, int least,"
    " int capacity, int num_rows) -> Tensor"
)
"""Candidates for heavy rows of columns; see `kernels.sketch.sketch_candidates`."""

PRODUCTS = (
    "(Tensor query, Tensor key, Tensor row, float least, SymInt limit, float? sign)"
    " -> (Tensor, Tensor)"
)
"""The exact test of candidates; see `kernels.sketch.heavy_products`."""

LISTS = (
    "(Tensor row, Tensor strength, SymInt num_queries, int tile_size, SymInt longest,"
    " bool is_causal) -> (Tensor, Tensor, Tensor)"
)
"""Entries of columns as key lists of tiles; see `kernels.entry_lists.entry_lists`."""

SUMS = (
    "(Tensor x, Tensor? sign_words, Tensor order, SymInt nodes, SymInt blocks, int first,"
    " int word_bits) -> (Tensor, Tensor)"
)
"""Sums of rows by the children and the blocks of their nodes; see `kernels.bucket_sums`."""

for _name, _schema in (
    ("sketch_candidates", CANDIDATES), ("heavy_products", PRODUCTS), ("entry_lists", LISTS),
    ("bucket_sums", SUMS),
):  # fmt: skip
    torch.library.define(f"hyperframe::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("hyperframe::sketch_candidates")
def _candidates(
    key: torch.Tensor, top: torch.Tensor, hashed: torch.Tensor, places: torch.Tensor,
    factor: float, unit: int, least: int, capacity: int, num_rows: int,
) -> torch.Tensor:  # fmt: skip
    slots = num_slots(top.shape[2], hashed.shape[1], capacity)
    return key.new_empty((*key.shape[:2], slots), dtype=torch.int64)


@torch.library.register_fake("hyperframe::heavy_products")
def _products(
    query: torch.Tensor, key: torch.Tensor, row: torch.Tensor, least: float, limit: int,
    sign: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    kept = row.new_empty((*row.shape[:2], min(limit, row.shape[2])))
    return kept, key.new_empty(kept.shape)


@torch.library.register_fake("hyperframe::entry_lists")
def _lists(
    row: torch.Tensor, strength: torch.Tensor, num_queries: int, tile_size: int, longest: int,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    index = row.new_empty((row.shape[0], -(-num_queries // tile_size), longest), dtype=torch.int32)
    return index, index.new_empty(index.shape, dtype=torch.int64), index.new_empty(index.shape[:2])


def num_slots(top: int, num_levels: int, capacity: int) -> int:
    """Return how many nodes of the lowest level are kept at most."""
    slots = min(capacity, top)
    for _ in range(num_levels):
        slots = min(capacity, BRANCHING * slots)
    return slots


@torch.library.register_fake("hyperframe::bucket_sums")
def _sums(
    x: torch.Tensor, sign_words: torch.Tensor | None, order: torch.Tensor, nodes: int,
    blocks: int, first: int, word_bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    shape = order.shape[:2]
    sums = x.new_empty((*shape, BRANCHING * blocks, x.shape[-1]))
    return sums, x.new_empty((*shape, nodes, x.shape[-1]))
