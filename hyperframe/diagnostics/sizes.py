"""How many samples Lemmas 1 and 2 ask for: an order of growth, and a proven number."""

from __future__ import annotations

import torch

from ..component import check_fraction, check_positive_int, check_positive_number
from ..errors import ArgumentError

__all__ = ["sample_size", "value_sample_size"]


def sample_size(
    alpha: float | torch.Tensor, kappa: float | torch.Tensor, epsilon: float, n: int, *,
    constant: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """Return how the columns for ApproxD grow: `constant kappa^7 alpha^2 log(n) / epsilon^6`.

    With enough columns, `||(D~^-1 - D^-1) A||_op <= epsilon / 2 ||D^-1 A||_op` with probability
    `1 - 1 / poly(n)`. The form is that of Lemma 1; its powers are given as this project knows them,
    not as a quotation, and no constant is known to go with them. What is proven here (Proposition
    1 of docs/theory.md) is the order `max(kappa^5 alpha^2 / epsilon^6, kappa^8 alpha / epsilon^4)
    log n`, no more than this one where `kappa epsilon^2 <= alpha`, with a constant above a million.
    So read it to compare heads and lengths, not as a number of columns to take; where m is above n
    it says nothing that exact row sums don't.

    Args:
        alpha: of `alpha`, at least 0; a number or a tensor.
        kappa: of `kappa`, at least 1; a number or a tensor.
        epsilon: the error, above 0 and up to 1.
        n: length of the sequence.
        constant: what the order of growth hides.

    Returns:
        float64, whole numbers of at least 1, in the broadcast shape of alpha and kappa; `inf` where
        the number is too large.

    Raises:
        ArgumentError: an alpha below 0, a kappa below 1, an epsilon out of range.

    Source: HyperAttention, Lemma 1, in content; the powers are not quoted.

    Example:
        >>> sample_size(1.0, 1.0, 0.5, 8192).item(), sample_size(8.2, 2.0, 0.5, 3136).item()
        (577.0, 4434570.0)
    """
    check_fraction("sample_size", "epsilon", epsilon)
    check_positive_int("sample_size", "n", n)
    check_positive_number("sample_size", "constant", constant)
    a, k = (torch.as_tensor(x, dtype=torch.float64) for x in (alpha, kappa))
    for name, x, least in (("alpha", a, 0.0), ("kappa", k, 1.0)):
        # kappas within rounding of 1 are those of equal rows
        if not bool((x >= least - 1e-6).all()):
            raise ArgumentError(
                f"{name}: holds {x.min().item():.6g}, but it is at least {least:g} by its "
                f"definition; pass what diagnostics.{name} returns"
            )
    log_n = torch.tensor(float(n), dtype=torch.float64, device=a.device).log()
    return (constant * k**7 * a**2 * log_n / epsilon**6).ceil().clamp(min=1)


def value_sample_size(
    stable_rank: float | torch.Tensor, head_dim: int, epsilon: float, *, failure: float = 0.01
) -> torch.Tensor:
    """Return the rows of V that the matrix product needs: `m = d srank / (failure epsilon^2)`.

    With m rows drawn in proportion to their squared norms, `P S^T S V` differs from `P V` by at
    most `epsilon ||P||_op ||V||_op` in operator norm with probability `1 - failure`. Here the
    constant is proven: the expected squared Frobenius error is at most `||P||_F^2 ||V||_F^2 / m`,
    `||V||_F^2 <= d ||V||_op^2`, and Markov's inequality gives the rest. A product of two stable
    ranks in place of `d srank` would do as well.

    Args:
        stable_rank: of the softmax matrix `P`, from `softmax_stable_rank`; a number or a tensor.
        head_dim: columns of V.
        epsilon: the error, above 0 and up to 1.
        failure: probability of a larger error.

    Returns:
        float64, whole numbers of at least 1, in the shape of `stable_rank`.

    Raises:
        ArgumentError: a stable rank below 0; an epsilon or failure out of range.

    Source: HyperAttention, Lemma 2, in content: `m` in proportion to `d srank(D^-1 A) / epsilon^2`.
    The bound above, with its constant, is ours.

    Example:
        >>> value_sample_size(2.0, 64, 0.5).item()
        51200.0
    """
    check_fraction("value_sample_size", "epsilon", epsilon)
    check_fraction("value_sample_size", "failure", failure, include_one=False)
    check_positive_int("value_sample_size", "head_dim", head_dim)
    rank = torch.as_tensor(stable_rank, dtype=torch.float64)
    if not bool((rank >= 0).all()):
        raise ArgumentError(
            f"stable_rank: holds {rank.min().item():.6g}, but it is never negative; pass what "
            "diagnostics.softmax_stable_rank returns"
        )
    return (head_dim * rank / (failure * epsilon**2)).ceil().clamp(min=1)
