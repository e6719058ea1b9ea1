"""alpha: how large the largest column of the softmax matrix is."""

from __future__ import annotations

import torch

from ..component import check_non_negative_int
from ..errors import ArgumentError
from ..precision import without_autocast
from .scores import Scores, exponentials

__all__ = ["alpha", "check_skip", "column_squares"]


def alpha(
    query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
    is_causal: bool = False, skip_first: int = 0, dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return `alpha = n * max_j ||D^-1 A e_j||_2^2` of every head.

    The squared norm of a column of the softmax matrix says how much all queries together rely on
    one key. With `n = n_q = n_k`: 1 for uniform attention, n when every query attends to a key of
    its own, n^2 when all attend to the same one. Uniform sampling of columns works where alpha
    grows slower than n; a column that every query attends to (a sink) must be held exactly, and
    `skip_first` measures the rest.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        scale: factor of the logits; None is `1 / sqrt(d)`.
        is_causal: bottom-right aligned causality.
        skip_first: leading columns left out of the maximum; the softmax still runs over them, and
            n stays.
        dtype: arithmetic; None is float32, or float64 for float64 tensors. float32 holds 1e-5 for
            centred logits up to about 50.

    Returns:
        float64 `[batch, query_heads]`.

    Raises:
        ArgumentError: inputs that do not fit or are not finite; no column left.

    Source: HyperAttention, Theorem 1 and section 4.3 (32 columns left out). For `n_q != n_k`,
    where the paper says nothing, n is `n_k`: then `||D^-1 A||_F^2 <= alpha`, as for square ones.

    Cost: one pass over the logits, O(n_q n_k d) time, memory linear in n. Deterministic. No
    gradient. `sampled_alpha` is linear in n.

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 2)
        >>> alpha(q, k).item(), round(alpha(q, k, is_causal=True).item(), 4)
        (1.0, 5.6944)
    """
    scores = Scores.of(query, key, scale=scale, is_causal=is_causal, dtype=dtype)
    check_skip(skip_first, scores.num_keys)
    return scores.num_keys * column_squares(scores)[..., skip_first:].amax(dim=-1)


def column_squares(scores: Scores, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Return the squared norms of the columns: float64 `[batch, query_heads, n_k]`.

    Args:
        scores: the problem.
        rows: int64 on the CPU, ascending: the rows that count; None for all.
    """
    shape = (*scores.query.shape[:2], scores.num_keys)
    squares = torch.zeros(shape, dtype=torch.float64, device=scores.query.device)
    for chunk in scores.chunks(rows):
        terms, total, _ = exponentials(chunk.logits)
        weight = torch.where(total > 0, total.square().reciprocal(), 0.0)  # [B, H, R, 1]
        with without_autocast(terms):
            part = weight.mT.to(terms.dtype) @ terms.square_()
        squares[..., : part.shape[-1]] += part.squeeze(2)
    return squares


def check_skip(skip_first: object, num_keys: int) -> None:
    """Refuse to leave out all columns."""
    if check_non_negative_int("alpha", "skip_first", skip_first) >= num_keys:
        raise ArgumentError(
            f"skip_first={skip_first}: leaves none of the {num_keys} columns to take the maximum "
            f"over; pass at most {num_keys - 1}"
        )
