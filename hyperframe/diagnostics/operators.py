"""Operator norms without the matrix: of the softmax matrix by Lanczos, of narrow ones exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..component import check_positive_int, check_positive_number
from ..precision import without_autocast
from .scores import Scores, exponentials

__all__ = ["NormBounds", "narrow_norms", "softmax_norm", "weighted_norms"]

_RAISES = (1e-1, 1e-2, 1e-3, 1e-4)  # of the vectors that certify the upper bound
_GRAM_ROWS = 1 << 16  # rows held at once in float64


class NormBounds(NamedTuple):
    """An enclosure of operator norms; float64, one entry a head.

    Attributes:
        lower: the largest Ritz value, never above the norm (up to rounding), and the estimate.
        upper: never below the norm (up to rounding), by Collatz and Wielandt.
        residual: `||M y - lower^2 y|| / lower^2` of the last Ritz vector `y`, `M` the Gram matrix:
            a singular value lies within half of it, relative, of `lower`.
        num_steps: products with `M` that were made, an int.
    """

    lower: torch.Tensor
    upper: torch.Tensor
    residual: torch.Tensor
    num_steps: int


def softmax_norm(
    query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
    is_causal: bool = False, tolerance: float = 1e-4, max_steps: int = 64,
    dtype: torch.dtype | None = None,
) -> NormBounds:  # fmt: skip
    """Return `||D^-1 A||_op` of every head, with an upper bound beside it.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        scale: factor of the logits; None is `1 / sqrt(d)`.
        is_causal: bottom-right aligned causality.
        tolerance: relative residual at which the iteration stops.
        max_steps: the most products with the matrix and its transpose; on heads of language and
            vision models 4 to 9 are enough.
        dtype: arithmetic; None is float32, or float64 for float64 tensors.

    Returns:
        Bounds `[batch, query_heads]`.

    Raises:
        ArgumentError: inputs that do not fit or are not finite.

    Cost: one pass over the logits a step, O(n_q n_k d) time each; memory linear in n, times the
    number of steps. Deterministic. No gradient.

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 2)
        >>> bounds = softmax_norm(q, k)
        >>> round(bounds.lower.item(), 6), round(bounds.upper.item(), 6)
        (1.0, 1.0)
    """
    scores = Scores.of(query, key, scale=scale, is_causal=is_causal, dtype=dtype)
    weight = torch.ones((*query.shape[:3], 1), dtype=scores.query.dtype, device=scores.query.device)
    bounds = weighted_norms(scores, weight, tolerance=tolerance, max_steps=max_steps)
    return NormBounds(
        lower=bounds.lower.squeeze(-1), upper=bounds.upper.squeeze(-1),
        residual=bounds.residual.squeeze(-1), num_steps=bounds.num_steps,
    )  # fmt: skip


def weighted_norms(
    scores: Scores, weight: torch.Tensor, *, tolerance: float, max_steps: int
) -> NormBounds:
    """Return `||diag(w) D^-1 A||_op` for several `w` at once.

    Lanczos iterations on the Gram matrix `M`, with full orthogonalisation. All entries of `M` are
    non-negative, so its leading vector is too: the constant vector, where we begin, is never
    orthogonal to it, and nothing random is needed. For the same reason every positive vector `x`
    bounds the norm from above by `max_i (M x)_i / x_i`; we take Ritz vectors raised a little.

    Args:
        scores: the problem.
        weight: `[batch, query_heads, n_q, c]`, finite, of any sign.
        tolerance: relative residual at which the iteration stops.
        max_steps: the most steps.

    Returns:
        Bounds `[batch, query_heads, c]`.
    """
    check_positive_number("softmax_norm", "tolerance", tolerance)
    check_positive_int("softmax_norm", "max_steps", max_steps)
    size = weight.abs().amax(dim=2)  # [B, H, c]
    squares = (weight / torch.where(size > 0, size, 1.0).unsqueeze(2)).square()
    shape = (*scores.query.shape[:2], scores.num_keys, weight.shape[-1])
    level = scores.num_keys**-0.5
    start = torch.full(shape, level, dtype=torch.float64, device=weight.device)
    basis = start.unsqueeze(0)  # [steps, B, H, n_k, c]
    # of the tridiagonal matrix that M is on the basis, [B, H, c] each
    diagonal: list[torch.Tensor] = []
    coupling: list[torch.Tensor] = []
    while True:
        product = _gram_times(scores, squares, basis[-1])
        if len(basis) == 1:
            of_start = product
        diagonal.append((basis[-1] * product).sum(dim=2))
        # twice: what is left may be 1e-8 of the product, and the rounding of the first time with it
        for _ in range(2):
            shares = torch.einsum("sbhnc,bhnc->sbhc", basis, product)
            product = product - torch.einsum("sbhnc,sbhc->bhnc", basis, shares)
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, coupling))
        value, vector = values[..., -1].clamp(min=0), vectors[..., -1]
        rest = product.norm(dim=2)
        # a space that M maps to itself is complete: what is left is rounding
        rest = torch.where(rest > 1e-12 * value, rest, 0.0)
        following = product / torch.where(rest > 0, rest, torch.inf).unsqueeze(2)
        residual = (rest * vector[..., -1]).abs()
        if len(basis) == max_steps or bool((residual <= tolerance * value).all()):
            break
        coupling.append(rest)
        basis = torch.cat([basis, following.unsqueeze(0)])
    ritz = torch.einsum("sbhnc,bhcs->bhnc", basis, vector)
    of_ritz = value.unsqueeze(2) * ritz + (rest * vector[..., -1]).unsqueeze(2) * following
    upper = _certified(ritz, of_ritz, start, of_start)
    return NormBounds(
        lower=value.sqrt() * size,
        upper=upper.clamp(min=0).sqrt() * size,
        residual=residual / torch.where(value > 0, value, 1.0),
        num_steps=len(basis),
    )


def _gram_times(scores: Scores, squares: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return `P^T diag(w)^2 P x`, `P` the softmax matrix; `x` float64 `[B, H, n_k, c]`."""
    out = torch.zeros_like(x)
    for chunk in scores.chunks():
        terms, total, _ = exponentials(chunk.logits)
        seen = terms.shape[-1]
        per_row = torch.where(total > 0, total.reciprocal(), 0.0)
        per_row = per_row.square() * squares[:, :, chunk.rows.to(terms.device)]
        with without_autocast(terms):
            y = (terms @ x[:, :, :seen].to(terms.dtype)) * per_row
            out[:, :, :seen] += terms.mT @ y.to(terms.dtype)
    return out


def _tridiagonal(diagonal: list[torch.Tensor], coupling: list[torch.Tensor]) -> torch.Tensor:
    """Return the symmetric matrices `[B, H, c, steps, steps]`."""
    matrix = torch.diag_embed(torch.stack(diagonal, dim=-1))
    if coupling:
        beside = torch.stack(coupling, dim=-1)
        matrix = matrix + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    return matrix


def _certified(
    ritz: torch.Tensor, of_ritz: torch.Tensor, start: torch.Tensor, of_start: torch.Tensor
) -> torch.Tensor:
    """Return an upper bound of the largest eigenvalue: the best of a few positive vectors."""
    sign = torch.where(ritz.sum(dim=2, keepdim=True) < 0, -1.0, 1.0)
    ritz, of_ritz = sign * ritz, sign * of_ritz
    best = (of_start / start).amax(dim=2)
    for share in _RAISES:
        x, of_x = ritz + share * start, of_ritz + share * of_start
        bound = torch.where(x > 0, of_x / x, torch.inf).amax(dim=2)
        best = torch.minimum(best, bound)
    return best


def narrow_norms(matrix: torch.Tensor) -> torch.Tensor:
    """Return the operator norms of matrices `[..., n, d]` with few columns, through `X^T X`.

    Returns:
        float64 `[...]`; NaN for a matrix that is not finite.

    Cost: O(n d^2) time; memory for 65,536 rows in float64.
    """
    size = matrix.abs().amax(dim=(-2, -1)).double()
    is_finite = torch.isfinite(size)
    unit = torch.where(is_finite & (size > 0), size, 1.0)[..., None, None]
    gram = torch.zeros(
        (*matrix.shape[:-2], matrix.shape[-1], matrix.shape[-1]),
        dtype=torch.float64, device=matrix.device,
    )  # fmt: skip
    for rows in matrix.split(_GRAM_ROWS, dim=-2):
        scaled = rows.double() / unit
        gram += scaled.mT @ scaled
    # what is not finite must not reach the eigenvalue routine, which refuses it
    gram = torch.where(is_finite[..., None, None], gram, 0.0)
    norms = torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0).sqrt() * unit[..., 0, 0]
    return torch.where(is_finite, norms, torch.nan)
