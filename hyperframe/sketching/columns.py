"""Columns of `Q K^T`, scaled so that their energies are 1.

Entry `(i, j)` is heavy if `(q_i . k_j)^2 >= ||Q k_j||^2 / tau`: a column has at most `tau` of them.
The energy `||Q k_j||^2 = k_j^T (Q^T Q) k_j` needs a matrix of `d x d` alone, so keys are scaled
first, and all that follows compares squares with `1 / tau`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.ops import columns as _schema  # noqa: F401  (defines what is implemented here)
from ..kernels.ops import has_triton
from ..precision import without_autocast

__all__ = ["ColumnProblem", "exact_rows", "torch_scaled_keys"]

_CHUNK_BYTES = 64 << 20  # of temporaries held at once
_PIECES = 16  # of a sum over rows: a product for each keeps a GPU busy
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

        Cost: O((n_q + n_k) d^2); energies in float64. Deterministic. On CUDA with Triton one pass
            over the keys; their energies are then of another rounding.
        """
        rows, size = _finite(query.flatten(0, 1), widen=False)
        # no square overflows: entries are compared within a column, queries share a factor; the
        # quotient is widened in the same pass
        q = rows / _or_one(size.amax(dim=1, keepdim=True))
        with without_autocast(q):
            gram = _gram(q).unflatten(0, query.shape[:2])
            scaled, norm = torch.ops.hyperframe.scaled_keys(key.detach(), gram, _NO_ENERGY)
        return cls(query=q, key=scaled.flatten(0, 1), norm=norm.flatten(0, 1))


@torch.library.impl("hyperframe::scaled_keys", "default")
def _run(key: torch.Tensor, gram: torch.Tensor, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    is_single = key.dtype in (torch.float32, torch.float16, torch.bfloat16)
    is_taken = key.is_cuda and is_single and key.shape[-1] <= 256
    is_taken = is_taken and gram.shape[0] * gram.shape[1] < 65536  # programs of a grid
    if is_taken and torch.version.hip is None and has_triton():
        from ..kernels.triton import columns as kernels

        with torch.cuda.device(key.device):
            return kernels.triton_scaled_keys(key, gram, floor)
    return torch_scaled_keys(key, gram, floor)


def torch_scaled_keys(
    key: torch.Tensor, gram: torch.Tensor, floor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys whose columns have energy 1, or zeros, and what they were divided by.

    Args:
        key: floating point `[batch, key_heads, n_k, d]`.
        gram: float64 `[batch, query_heads, d, d]`, `Q^T Q`.
        floor: the part of `||Q||^2 ||k||^2` below which an energy is none.

    Returns:
        `[batch, query_heads, n_k, d]` and `[batch, query_heads, n_k]`, in float32 at least.
    """
    k, size = _finite(key)
    size = _or_one(size)
    group = gram.shape[1] // key.shape[1]
    k, size = (x.repeat_interleave(group, dim=1) for x in (k / size, size))
    energy = torch.empty(k.shape[:-1], dtype=torch.float64, device=k.device)
    step = max(1, _CHUNK_BYTES // (24 * k.shape[0] * k.shape[1] * k.shape[-1]))
    least = floor * gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1).unsqueeze(-1)
    for start in range(0, k.shape[2], step):
        part = k[:, :, start : start + step].double()
        found = ((part @ gram) * part).sum(dim=-1)
        is_zero = found <= least * part.square().sum(dim=-1)
        energy[:, :, start : start + step] = found.masked_fill(is_zero, 0)
    norm = energy.sqrt()
    inverse = torch.where(norm > 0, 1 / norm, 0).to(k.dtype)
    return k * inverse.unsqueeze(-1), norm.to(k.dtype) * size.squeeze(-1)


def exact_rows(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and factors whose products are the queries of a `ColumnProblem`.

    Where queries have 16 bits the rows have, too, and lose nothing.

    Args:
        query: `[batch, query_heads, n_q, d]`.

    Returns:
        `[heads, n_q, d]`, and of each head the factor, `[heads, 1, 1]`, in float32 at least.
    """
    rows, size = _finite(query.flatten(0, 1), widen=False)
    size = _or_one(size.amax(dim=1, keepdim=True))
    if rows.dtype == torch.float16:
        return rows, 1 / size  # neither is beyond the range of float32
    # by a power of two: no product overflows, and none is rounded
    power = torch.exp2(-torch.frexp(size).exponent.clamp(-126, 126).to(size.dtype))
    return rows * power.to(rows.dtype), 1 / (size * power)


def _finite(x: torch.Tensor, *, widen: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x` with zeros for rows that hold NaN or infinity, and the largest size of each row.

    Both in float32 at least, the rows only if they are to be widened; sizes are `[..., 1]`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    size = x.abs().amax(dim=-1, keepdim=True).to(wide)
    is_finite = size.isfinite()
    rows = torch.where(is_finite, x, 0)
    return rows.to(wide) if widen else rows, torch.where(is_finite, size, 0)


def _or_one(size: torch.Tensor) -> torch.Tensor:
    """Return sizes to divide by: 1 for those of zeros."""
    return torch.where(size > 0, size, 1)


def _gram(q: torch.Tensor) -> torch.Tensor:
    """Return `Q^T Q` of `[heads, n, d]`: float64 `[heads, d, d]`."""
    heads, num_rows, dim = q.shape
    gram = q.new_zeros((heads, dim, dim), dtype=torch.float64)
    step = max(1, _CHUNK_BYTES // (8 * heads * dim * _PIECES)) * _PIECES
    for start in range(0, num_rows, step):
        part = q[:, start : start + step].double()
        if part.shape[1] % _PIECES == 0:
            part = part.unflatten(1, (_PIECES, -1))
            gram += (part.transpose(-1, -2) @ part).sum(dim=1)
        else:
            gram += part.transpose(-1, -2) @ part
    return gram
