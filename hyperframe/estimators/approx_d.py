"""ApproxD (Algorithm 2): uniform columns with a cap for single entries and a floor for the sum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..builder import build_plans
from ..component import (
    check_bool,
    check_choice,
    check_positive_int,
    check_positive_number,
)
from ..detectors.base import default_scale
from ..errors import ArgumentError
from ..kernels import attend
from ..masks import HeavyMask
from ..precision import without_autocast
from ..randomness import uniform
from ..rowsums import RowSumRule, RowSums
from ..samplers.uniform import Uniform as UniformSampler
from ..state import merge
from .base import AbstractEstimator
from .unmasked import held_keys, log_masked_sums, log_unmasked_sums, mean_logits, visible_keys

__all__ = ["ApproxD"]

_FEWEST_ROWS = 8  # of T, from which kappa is estimated

_NEG_INF = float("-inf")


@dataclass(frozen=True, kw_only=True)
class ApproxD(AbstractEstimator):
    """`D~_ii = sum_j M_ij A_ij + max(d_i, tau / kappa)` over m uniform columns.

    - T is a random set of m rows; `tau` is the largest of their unmasked row sums
      `sum_j (1 - M_ij) A_ij`, which are computed exactly.
    - `C_i = cap_factor epsilon^2 m / (n log n) (sum_j M_ij A_ij + tau / kappa)` caps every sampled
      entry: with its weight `n / m` it adds at most `cap_factor epsilon^2 / log n` times what is
      known of the row. With the default, that is about once.
    - `d_i = n/m sum_s (1 - M_{i,s}) min(A_{i,s}, C_i)` over m columns drawn uniformly.

    Without cap and floor this is the estimator `uniform`, unbiased; caps only lower a row sum,
    floors only raise it. Where few entries carry a row's rest, caps halve the mean square error of
    the row sums. In an attention the samples are the attention's own, so that numerator and
    normaliser move together. There, a cap on the normaliser alone would scale the output up by
    what it cut off, without a bound; so the attention has the floors only, unless `cap_attention`
    asks for Algorithm 2 to the letter. Rows that hold all of their keys, and rows that see no more
    keys than samples, are exact: no cap, no floor. (Where an attention's samples have a plan of
    their own, beside hash blocks, a row none of whose samples counts has no floor either.)

    `kappa` is the ratio of the largest to the smallest unmasked row sum. `"auto"` estimates it on
    T: if the logarithms of the positive sums there span `r`, `kappa = exp(r log n / log |T|)`, the
    range over all n rows were the tails exponential; from fewer than 8 rows nothing is estimated
    and there is no floor. (With `exp(r)` itself, one row in m would have a floor above its true
    sum.) The ratio is not invariant to a shift of all keys although softmax is: a shift multiplies
    every row of A by a factor of its own. `center=True` takes `tau`, `kappa` and the floor from
    keys less their mean, and gives each row its factor back; on real heads without it, a floor can
    exceed a row sum a hundredfold.

    Under a causal mask rows differ in how many keys they see, and no later key may move a row.
    Then n is the number of keys that the row sees; `tau` and `kappa` are those of the *mean*
    unmasked entry, and the floor is that times the number of the row's unmasked keys; the rows of T
    up to the row itself count; and the mean key is that of the keys it sees. With equal numbers
    this is the algorithm again. The causal recursion asks for each rectangle by itself, without a
    mask; `causal_approx_d` is Algorithm 4 for the row sums alone.

    Args:
        epsilon: the accuracy asked for, which scales the caps; `"auto"` is what `m` samples can
            promise at best, `(kappa^7 log n / m)^(1/6)` and at most 1 (Lemma 1's order with an
            alpha of 1), by the `kappa` that is given or estimated.
        kappa: a number of at least 1, or `"auto"`.
        cap_factor: the constant behind the Theta of `C_i`.
        cap_attention: also cap the samples in the normaliser of an attention, whose numerator is
            never capped.
        num_rows: rows in T; None takes as many as samples, as the paper does.
        center: compare row sums with one another after subtracting the mean key.
        strict: only rows of T up to a row count for it, also without a causal mask, so that in the
            rectangles of the recursion no row looks at later queries; `strict_causal=True` needs
            it.

    Cost: O((n_q (b + m) + num_rows n_k) d) for b held keys a row; in an attention, T and a pass
    over the held keys with a head dimension of 1 come on top. Random. Differentiable in query and
    key, with T's sums and the caps held constant.
    Source: HyperAttention, Algorithm 2. Departures: no caps in an attention, exact rows, `center`,
    and the causal form; T is drawn for every head.

    Example:
        >>> from hyperframe.detectors import create
        >>> q = k = torch.zeros(1, 1, 4, 2)
        >>> mask = create("oracle(budget=2)").find(q, k)
        >>> sums = ApproxD().row_sums(q, k, mask, num_samples=4)
        >>> sums.log_sum.exp().round().tolist()
        [[[4.0, 4.0, 4.0, 4.0]]]
    """

    takes_stream: ClassVar[bool] = True
    uses_queries: ClassVar[bool] = True

    epsilon: float | str = 0.5
    kappa: float | str = "auto"
    cap_factor: float = 32.0
    cap_attention: bool = False
    num_rows: int | None = None
    center: bool = True
    strict: bool = False

    def __post_init__(self) -> None:
        """Check the parameters."""
        if isinstance(self.epsilon, str):
            check_choice(self, "epsilon", self.epsilon, ("auto",))
        else:
            check_positive_number(self, "epsilon", self.epsilon)
        if isinstance(self.kappa, str):
            check_choice(self, "kappa", self.kappa, ("auto",))
        elif check_positive_number(self, "kappa", self.kappa) < 1:
            raise ArgumentError(
                f"{self.name}: kappa={self.kappa!r} is below 1: it is the ratio of the largest to "
                "the smallest unmasked row sum; pass a number of at least 1, or 'auto'"
            )
        check_positive_number(self, "cap_factor", self.cap_factor)
        if self.num_rows is not None:
            check_positive_int(self, "num_rows", self.num_rows)
        check_bool(self, "cap_attention", self.cap_attention)
        check_bool(self, "center", self.center)
        check_bool(self, "strict", self.strict)
        object.__setattr__(self, "uses_queries", not self.strict)

    def row_sums(
        self, query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, *,
        scale: float | None = None, num_samples: int = 256,
        generator: torch.Generator | None = None,
    ) -> RowSums:  # fmt: skip
        """Return the estimate; see `AbstractEstimator.row_sums`.

        Draws T first, then the columns, as an attention with this estimator does.
        """
        scale = default_scale(query, scale)
        rows = self.draw_rows(query, key, num_samples=num_samples, generator=generator)
        rule = RowSumRule()
        if rows is not None:
            rule = self._bounds(query, key, mask, rows, scale, num_samples, is_capped=True)
        value = key.new_zeros((*key.shape[:3], 1))
        draw = UniformSampler().draws(
            query, key, value, num_samples=num_samples, generator=generator
        )
        plans = build_plans(mask, key_heads=key.shape[1], draw=draw, rule=rule)
        states = [attend(query, key, value, plan, scale=scale) for plan in plans]
        if rule.log_floor is not None:
            # in a plan of its own, a row that holds all of its samples has no slot and no floor
            lse = torch.where(states[-1].lse == _NEG_INF, rule.log_floor, states[-1].lse)
            states[-1] = states[-1]._replace(lse=lse)
        return RowSums(log_sum=merge(*states).lse)

    def rule(
        self, query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, *, scale: float,
        num_samples: int, generator: torch.Generator | None = None,
    ) -> RowSumRule:  # fmt: skip
        """Return the floors, and with `cap_attention` the caps, for the attention's own samples."""
        rows = self.draw_rows(query, key, num_samples=num_samples, generator=generator)
        if rows is None:
            return RowSumRule()
        return self._bounds(
            query, key, mask, rows, scale, num_samples, is_capped=self.cap_attention
        )

    def draw_rows(
        self, query: torch.Tensor, key: torch.Tensor, *, num_samples: int,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Draw T: int64 `[batch, query_heads, rows]`, ascending; None if nothing is sampled.

        That is the case without samples, and where every key is taken once.
        """
        if num_samples == 0 or num_samples >= key.shape[2]:
            return None
        count = num_samples if self.num_rows is None else self.num_rows
        draws = uniform(tuple(query.shape[:3]), query.device, generator)
        return draws.argsort(dim=-1)[..., :count].sort(dim=-1).values

    def _bounds(
        self, query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, rows: torch.Tensor,
        scale: float, num_samples: int, *, is_capped: bool,
    ) -> RowSumRule:  # fmt: skip
        """Return caps (if asked for) and floors, given T."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        with torch.no_grad(), without_autocast(query):
            plans = build_plans(mask, key_heads=key.shape[1])
            visible = visible_keys(mask)  # [n_q]
            unheld = visible - held_keys(query, key, plans)  # [B, H, n_q]
            is_sampled = (visible > num_samples) & (unheld > 0)
            # the unit in which a row's unmasked sum is compared with those of other rows
            unit = torch.zeros(query.shape[:3], dtype=dtype, device=query.device)
            if mask.is_causal:
                unit = unit + unheld.clamp(min=1).to(dtype).log()
            if self.center:
                unit = unit + mean_logits(query, key, mask, scale=scale)
            sums = log_unmasked_sums(query, key, mask, rows, scale=scale)
            floor, log_kappa = self._log_floor(sums - unit.gather(-1, rows), rows, mask)
            floor = floor + unit
            floor = floor.masked_fill(~is_sampled, _NEG_INF)
            if not is_capped:
                return RowSumRule(log_floor=floor)
            known = torch.logaddexp(log_masked_sums(query, key, plans, scale=scale), floor)
        length = visible.clamp(min=2).to(dtype)
        square: torch.Tensor | float  # log epsilon^2
        if isinstance(self.epsilon, str):
            square = (7 * log_kappa + length.log().log() - math.log(num_samples)) / 3
            square = square.clamp(max=0)
        else:
            square = 2 * math.log(self.epsilon)
        constant = math.log(self.cap_factor) + math.log(num_samples)
        cap = constant + square - torch.log(length * length.log()) + known
        # where nothing is known of a row, nothing says what is too much
        cap = torch.where(is_sampled & (known > _NEG_INF), cap, torch.inf)
        return RowSumRule(log_cap=cap, log_floor=floor)

    def _log_floor(
        self, sums: torch.Tensor, rows: torch.Tensor, mask: HeavyMask
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `log(tau / kappa)` and `log kappa` from the unmasked sums of T.

        Returns:
            `[batch, query_heads, n_q]`, or one for all rows; `-inf` and `inf` where T says nothing.
        """
        low = torch.where(sums > _NEG_INF, sums, torch.inf)
        length = torch.full((1,), mask.num_queries, device=rows.device)
        if mask.is_causal or self.strict:
            # of the rows of T up to each row
            row = torch.arange(mask.num_queries, device=rows.device).expand(*rows.shape[:2], -1)
            seen = torch.searchsorted(rows, row.contiguous(), right=True)
            length = row + 1

            def so_far(best: torch.Tensor, empty: float) -> torch.Tensor:
                return torch.nn.functional.pad(best, (1, 0), value=empty).gather(-1, seen)

            count = so_far((sums > _NEG_INF).cumsum(dim=-1), 0)
            top = so_far(sums.cummax(dim=-1).values, _NEG_INF)
            low = so_far(low.cummin(dim=-1).values, torch.inf)
        else:
            count = (sums > _NEG_INF).sum(dim=-1, keepdim=True)
            top, low = sums.amax(dim=-1, keepdim=True), low.amin(dim=-1, keepdim=True)
        if not isinstance(self.kappa, str):
            log_kappa = math.log(self.kappa)
            return top - log_kappa, torch.full_like(top, log_kappa)
        # extremes of n numbers with exponential tails grow like log n
        length, count = length.to(sums.dtype), count.to(sums.dtype)
        reach = (length.log() / count.clamp(min=_FEWEST_ROWS).log()).clamp(min=1)
        is_known = count >= _FEWEST_ROWS
        spread = reach * (top - low)
        return (
            torch.where(is_known, top - spread, _NEG_INF),
            torch.where(is_known, spread, torch.inf),
        )
