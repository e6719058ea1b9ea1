"""Schemas and shapes of the operators of an ExpanderSketch; `sketching` implements them."""

from __future__ import annotations

import torch

__all__ = ["CELLS", "DEGREE", "LAYERS", "NUM_OUTPUTS", "ROWS", "SUMS", "VERTICES"]

LAYERS = 8
CELLS = 8
VERTICES = LAYERS * CELLS  # of a bucket's graph: a set of them is a word
DEGREE = 4
NUM_OUTPUTS = 1 + 3 * DEGREE  # of a cell: the plain sum, and one for every bit of a name

SUMS = "(Tensor x, Tensor sign_words, Tensor bucket_order, int num_buckets, int message) -> Tensor"
"""The sketch of rows; see `sketching.expander_sketch.ExpanderSketch.apply`."""

ROWS = (
    "(Tensor key, Tensor sketch, Tensor bucket_order, int message, float factor, int capacity,"
    " SymInt num_rows, bool spectral, str decoder) -> Tensor"
)
"""Candidates for heavy rows of columns; see `sketching.expander_decoding.expander_rows`."""

for _name, _schema in (("name_sums", SUMS), ("expander_rows", ROWS)):
    torch.library.define(f"hyperframe::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("hyperframe::name_sums")
def _sums(
    x: torch.Tensor, sign_words: torch.Tensor, bucket_order: torch.Tensor, num_buckets: int,
    message: int,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], num_buckets, NUM_OUTPUTS, VERTICES, x.shape[-1]))


@torch.library.register_fake("hyperframe::expander_rows")
def _rows(
    key: torch.Tensor, sketch: torch.Tensor, bucket_order: torch.Tensor, message: int,
    factor: float, capacity: int, num_rows: int, spectral: bool, decoder: str,
) -> torch.Tensor:  # fmt: skip
    return key.new_empty((*key.shape[:2], capacity), dtype=torch.int64)
