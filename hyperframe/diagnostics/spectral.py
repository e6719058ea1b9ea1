"""Spectral errors of an approximation, Equations (1) and (2), and stable ranks."""

from __future__ import annotations

import torch

from ..errors import ArgumentError
from ..ragged import spread_heads
from ..validation import check_inputs
from .columns import column_squares
from .errors import exact_for
from .operators import narrow_norms, weighted_norms
from .scores import Scores, log_sums

__all__ = ["normaliser_error", "softmax_stable_rank", "spectral_error", "stable_rank"]


def spectral_error(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, *,
    scale: float | None = None, is_causal: bool = False, tolerance: float = 1e-4,
    max_steps: int = 64, dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return `||Att - out||_op / (||D^-1 A||_op ||V||_op)` of every head.

    This is the epsilon of Equation (1). The error and V are narrow, so that their norms are exact;
    that of the softmax matrix comes from `softmax_norm`, which bounds it from below: the error is
    not understated.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        value: `[batch, key_heads, n_k, d_v]`.
        out: `[batch, query_heads, n_q, d_v]`, the output to judge.
        scale: factor of the logits; None is `1 / sqrt(d)`.
        is_causal: bottom-right aligned causality.
        tolerance: relative residual at which the norm of the softmax matrix is taken as found.
        max_steps: the most steps to get there.
        dtype: arithmetic; None is float32, or float64 for float64 tensors.

    Returns:
        float64 `[batch, query_heads]`. NaN where `out` is not finite; 0 where nothing is wrong,
        and `inf` where something is though all values are 0.

    Raises:
        ArgumentError: tensors that do not fit; query, key or value that are not finite.

    Source: HyperAttention, Equation (1).

    Cost: one exact attention and one pass over the logits a step (4 to 9 steps on real heads),
    O(n_q n_k d) time each; no `n_q x n_k` matrix. Deterministic. No gradient.

    Example:
        >>> q = k = v = torch.ones(1, 1, 4, 2)
        >>> spectral_error(q, k, v, 1.5 * v).item()
        0.5
    """
    check_inputs(query, key, value, check_finite=True)
    scores = Scores.of(query, key, scale=scale, is_causal=is_causal, dtype=dtype)
    work = scores.query.dtype
    with torch.no_grad():
        exact = exact_for(query, key, value, out, scale=scale, is_causal=is_causal, dtype=work)
        wrong = narrow_norms(out.to(work) - exact)
        values = spread_heads(narrow_norms(value), query.shape[1])
    weight = torch.ones_like(wrong)[:, :, None, None].expand(-1, -1, scores.num_queries, 1)
    found = weighted_norms(scores, weight, tolerance=tolerance, max_steps=max_steps)
    return _ratio(wrong, found.lower.squeeze(-1) * values)


def normaliser_error(
    query: torch.Tensor, key: torch.Tensor, log_sum: torch.Tensor, *,
    scale: float | None = None, is_causal: bool = False, tolerance: float = 1e-4,
    max_steps: int = 64, dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return `||(D~^-1 - D^-1) A||_op / ||D^-1 A||_op` of every head.

    Lemma 1 promises at most `epsilon / 2` of the row sums of ApproxD. At most the largest
    relative error of `1 / D~_i` over the rows, and smaller where the wrong rows have little in
    common.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        log_sum: `[batch, query_heads, n_q]`, natural logarithm of `D~_ii`: `RowSums.log_sum`, or
            the log-sum-exp that an attention call returns.
        scale: factor of the logits; None is `1 / sqrt(d)`.
        is_causal: bottom-right aligned causality.
        tolerance: relative residual at which the two norms are taken as found.
        max_steps: the most steps to get there.
        dtype: arithmetic; None is float32, or float64 for float64 tensors.

    Returns:
        float64 `[batch, query_heads]`; `inf` where a row that has keys has the sum 0, NaN where
        a sum is NaN. Rows without keys do not count.

    Raises:
        ArgumentError: tensors that do not fit; query or key that are not finite.

    Source: HyperAttention, Equation (2) and Lemma 1.

    Cost: as `spectral_error`, without the attention.

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 2)
        >>> twice = torch.full((1, 1, 4), 8.0).log()
        >>> round(normaliser_error(q, k, twice).item(), 6)
        0.5
    """
    scores = Scores.of(query, key, scale=scale, is_causal=is_causal, dtype=dtype)
    if log_sum.shape != query.shape[:3]:
        raise ArgumentError(
            f"log_sum: shape {tuple(log_sum.shape)} is not [batch, query_heads, n_q] = "
            f"{tuple(query.shape[:3])}; pass one logarithm for every row"
        )
    sums = [log_sums(chunk.logits) + scores.shift(chunk.rows) for chunk in scores.chunks()]
    exact = torch.cat(sums, dim=-1)
    wrong = torch.expm1(exact - log_sum.detach().double())
    wrong = torch.where(exact == float("-inf"), 0.0, wrong)
    is_finite = torch.isfinite(wrong)
    # both norms in the same passes
    weight = torch.stack([torch.where(is_finite, wrong, 0.0), torch.ones_like(wrong)], dim=-1)
    found = weighted_norms(scores, weight, tolerance=tolerance, max_steps=max_steps)
    error = _ratio(found.lower[..., 0], found.lower[..., 1])
    return error + torch.where(is_finite, 0.0, wrong).sum(dim=-1)


def stable_rank(matrix: torch.Tensor) -> torch.Tensor:
    """Return `||X||_F^2 / ||X||_op^2` of matrices `[..., n, d]` with few columns.

    Returns:
        float64 `[...]`, between 1 and the rank; 0 for a zero matrix, NaN where X is not finite.

    Cost: O(n d^2) time. Deterministic. No gradient.

    Example:
        >>> stable_rank(torch.eye(3)).item()
        3.0
    """
    with torch.no_grad():
        norm = narrow_norms(matrix)
        unit = torch.where(norm > 0, norm, 1.0)
        rank: torch.Tensor = (matrix.double() / unit[..., None, None]).square().sum(dim=(-2, -1))
        return torch.where(norm.isnan(), torch.nan, rank)


def softmax_stable_rank(
    query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
    is_causal: bool = False, tolerance: float = 1e-4, max_steps: int = 64,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return the stable rank of the softmax matrix `D^-1 A` of every head.

    Lemma 2 needs a number of value rows in proportion to it. For `n_q = n_k` it is at most alpha.
    Arguments and cost as `softmax_norm`, and one pass more.

    Returns:
        float64 `[batch, query_heads]`, at least 1; 0 where no row has keys.

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 2)
        >>> round(softmax_stable_rank(q, k).item(), 6)
        1.0
    """
    scores = Scores.of(query, key, scale=scale, is_causal=is_causal, dtype=dtype)
    total = column_squares(scores).sum(dim=-1)
    weight = torch.ones((*query.shape[:3], 1), dtype=torch.float64, device=query.device)
    found = weighted_norms(scores, weight, tolerance=tolerance, max_steps=max_steps)
    return _ratio(total, found.lower.squeeze(-1).square())


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Return the quotient, with 0 / 0 = 0."""
    return torch.where((part == 0) & (whole == 0), 0.0, part / whole)
