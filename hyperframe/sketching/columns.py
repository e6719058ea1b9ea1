"""Columns of `Q K^T`, scaled so that their energies are 1.

Entry `(i, j)` is heavy if `(q_i . k_j)^2 >= ||Q k_j||^2 / tau`: a column has at most `tau` of them.
The energy `||Q k_j||^2 = k_j^T (Q^T Q) k_j` needs a matrix of `d x d` alone, so keys are scaled
first, and all that follows compares squares with `1 / tau`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..precision import without_autocast

__all__ = ["ColumnProblem", "exact_rows"]

_CHUNK_BYTES = 64 << 20  # of temporaries held at once
# below this part of ||Q||^2 ||k||^2 a column's energy is rounding
_NO_ENERGY = 1e-14


class ColumnProblem(NamedTuple):
    """Queries and keys, scaled so that every column of `Q K^T` has energy 1, or is zero.

    Rows of queries or keys that are not finite are zero: they hold no entries, and change those of
    no other key. A column whose energy is rounding is zero as well.

    Attributes:
        query: `[heads, n_q, d]`, batch items and query heads in one; float32 or float64.
        key: `[heads, n_k, d]`.
        norm: `[heads, n_k]`, what the columns were divided by, up to a factor for each head.
    """

    query: torch.Tensor
    key: torch.Tensor
    norm: torch.Tensor

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor) -> ColumnProblem:
        """Scale queries and keys.

        Args:
            query: `[batch, query_heads, n_q, d]`.
            key: `[batch, key_heads, n_k, d]`.

        Cost: O((n_q + n_k) d^2); energies in float64. Deterministic.
        """
        group = query.shape[1] // key.shape[1]
        q, k = _finite(query).flatten(0, 1), _finite(key)
        # no square overflows: entries are compared within a column, queries share a factor
        q = q / _size(q.flatten(1)).unsqueeze(-1)
        size = _size(k)
        k = k / size
        with without_autocast(q):
            gram = _gram(q).view(*query.shape[:2], *k.shape[-1:], -1)
            k, size = (x.repeat_interleave(group, dim=1) for x in (k, size))
            energy = torch.empty(k.shape[:-1], dtype=torch.float64, device=k.device)
            step = max(1, _CHUNK_BYTES // (24 * k.shape[0] * k.shape[1] * k.shape[-1]))
            floor = _NO_ENERGY * gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1).unsqueeze(-1)
            for start in range(0, k.shape[2], step):
                part = k[:, :, start : start + step].double()
                found = ((part @ gram) * part).sum(dim=-1)
                is_zero = found <= floor * part.square().sum(dim=-1)
                energy[:, :, start : start + step] = found.masked_fill(is_zero, 0)
        norm = energy.sqrt()
        inverse = torch.where(norm > 0, 1 / norm, 0).to(k.dtype)
        scaled = k * inverse.unsqueeze(-1)
        norm = norm.to(k.dtype) * size.squeeze(-1)
        return cls(query=q, key=scaled.flatten(0, 1), norm=norm.flatten(0, 1))


def exact_rows(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and factors whose products are the queries of a `ColumnProblem`.

    Where queries have 16 bits the rows have, too, and lose nothing.

    Args:
        query: `[batch, query_heads, n_q, d]`.

    Returns:
        `[heads, n_q, d]`, and of each head the factor, `[heads, 1, 1]`, in float32 at least.
    """
    rows = torch.where(query.isfinite().all(dim=-1, keepdim=True), query, 0).flatten(0, 1)
    size = _size(rows.flatten(1)).unsqueeze(-1)
    size = size.to(torch.promote_types(size.dtype, torch.float32))
    if rows.dtype == torch.float16:
        return rows, 1 / size  # neither is beyond the range of float32
    # by a power of two: no product overflows, and none is rounded
    power = torch.exp2(-torch.frexp(size).exponent.clamp(-126, 126).to(size.dtype))
    return (rows * power).to(rows.dtype), 1 / (size * power)


def _finite(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float32 at least, with zeros for rows that hold NaN or infinity."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(x.isfinite().all(dim=-1, keepdim=True), x, 0)


def _size(x: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value of each row, 1 for zero rows: `[..., 1]`."""
    size = x.abs().amax(dim=-1, keepdim=True)
    return torch.where(size > 0, size, 1)


def _gram(q: torch.Tensor) -> torch.Tensor:
    """Return `Q^T Q` of `[heads, n, d]`: float64 `[heads, d, d]`."""
    gram = q.new_zeros((q.shape[0], q.shape[-1], q.shape[-1]), dtype=torch.float64)
    step = max(1, _CHUNK_BYTES // (8 * q.shape[0] * q.shape[-1]))
    for start in range(0, q.shape[1], step):
        part = q[:, start : start + step].double()
        gram += part.transpose(-1, -2) @ part
    return gram
