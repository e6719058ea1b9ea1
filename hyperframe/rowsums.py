"""Row sums of `A = exp(scale * Q K^T)`: what an estimator returns, and what it asks of the plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["RowSumRule", "RowSums"]


@dataclass(frozen=True, kw_only=True)
class RowSums:
    """Estimated diagonal of `D`.

    Args:
        log_sum: floating point `[batch, query_heads, n_q]`, natural logarithm of `D~_ii`;
            `-inf` for a row without keys.
    """

    log_sum: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class RowSumRule:
    """How a plan's row sums become `D~` (the normaliser of the output).

    With every field None the row sum of the plan itself is used: exact on heavy entries,
    importance weighted on sampled ones. `log_cap` and `log_floor` are the row-wise `log C_i` and
    `log(tau / kappa)` of Algorithm 2 and act on the sampled part alone. `log_sum` replaces the
    normaliser altogether (used to isolate the error of the numerator).

    Args:
        log_cap: floating point `[batch, query_heads, n_q]` or None.
        log_floor: floating point `[batch, query_heads, n_q]` or None.
        log_sum: floating point `[batch, query_heads, n_q]` or None.
    """

    log_cap: torch.Tensor | None = None
    log_floor: torch.Tensor | None = None
    log_sum: torch.Tensor | None = None
