"""Check that an estimator which says that it is unbiased is."""

from __future__ import annotations

import math

import torch

from ...detectors import create as create_detector
from ...estimators import AbstractEstimator
from ..oracles import dense_attention
from .problem import CheckSkippedError, fail, generator, inputs

__all__ = ["FALSE_ALARM", "check_sums_are_right_on_average"]

FALSE_ALARM = 1e-6
"""How likely the check fails for an estimator that is right, were its seeds drawn anew."""

_CALLS, _ROWS, _STAKE = 300, 24, 0.9


def check_sums_are_right_on_average(estimator: AbstractEstimator) -> None:
    """Where `is_unbiased` says so, `E[D~_ii] = D_ii`.

    A bet in which nobody wins on average: let `X_t` be what call `t` estimates for a row, divided
    by the truth, its mean over equal problems. If `E[X_t] = 1`, then a capital that starts at 1 and
    is multiplied by `1 + s (X_t - 1)` in every call has the expectation 1 throughout, for `s = 0.9`
    and for `s = -0.9`; being positive, it ends above `1 / p` with probability `p` at most
    (Markov). With a union over rows, stakes and both kinds of mask `p` makes `FALSE_ALARM` in all.
    For the negative stake no `X_t` may exceed 2, which is assumed: it is a mean of 16 estimates of
    a sum without heavy entries. A bias of 8 % of any row sum is seen.
    """
    if not estimator.is_unbiased:
        raise CheckSkippedError("is_unbiased is False: nothing is said about the mean")
    limit = math.log(4 * _ROWS / FALSE_ALARM)
    for is_causal in (False, True):
        x = inputs(
            8, batch=1, query_heads=1, key_heads=1, num_queries=_ROWS, num_keys=_ROWS,
            dtype=torch.float64,
        )  # fmt: skip
        truth = dense_attention(*x, is_causal=is_causal).lse
        # 16 equal problems; they may share their draws, as only their mean counts
        query, key = (t.expand(8, 2, -1, -1) for t in x[:2])
        mask = create_detector("sliding_window(width=3)").find(query, key, is_causal=is_causal)
        ratios = []
        for seed in range(_CALLS):
            sums = estimator.row_sums(query, key, mask, num_samples=6, generator=generator(seed))
            ratios.append((sums.log_sum.double() - truth).exp().mean(dim=(0, 1)))
        ratio = torch.stack(ratios)  # [calls, rows]
        for stake in (_STAKE, -_STAKE):
            capital = (1 + stake * (ratio - 1)).clamp(min=1e-9).log().sum(dim=0)
            if bool((capital > limit).any()):
                row = int(capital.argmax())
                mean = float(ratio[:, row].mean())
                found = f"{mean:.3f} of row {row}'s sum in the mean"
                remedy = "weigh m sampled keys by 1 / (m p_j), or set is_unbiased = False"
                fail(estimator, f"{_CALLS} estimates, {is_causal=}", found, remedy)
