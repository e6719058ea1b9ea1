"""What a rung costs: seconds on this device at this length, or keys for each query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ..integrations.exact import exact_attention
from ..trace import tracing
from .rungs import Rung
from .sensitivity import Damage, clock

__all__ = ["COSTS", "Cost", "exact_cost", "measure_cost", "with_measured"]

COSTS = ("seconds", "keys")
"""What may be saved: seconds on this device, or keys that count for a query, on any."""

_HOPELESS = 3.0  # times the cost of exact attention in the first call: not timed again on a CPU
_REPEATS = 3

Sample = tuple[Tensor, Tensor, Tensor, "float | None", bool]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one layer, by the number of its key heads that attend so.

    A call costs something by itself, so that half of the heads cost more than half. Between one
    head and all of them the cost is taken as straight.

    Attributes:
        whole: of all heads.
        one: of a single key head with its query heads.
        num_key_heads: how many there are.

    Example:
        >>> Cost(whole=4.0, one=2.0, num_key_heads=3).of(2)
        3.0
    """

    whole: float
    one: float
    num_key_heads: int

    def of(self, heads: int) -> float:
        """Return the cost of some key heads."""
        if heads == 0:
            return 0.0
        if self.num_key_heads == 1:
            return self.whole
        share = (heads - 1) / (self.num_key_heads - 1)
        return self.one + share * (self.whole - self.one)


@torch.no_grad()
def measure_cost(rung: Rung | None, sample: Sample, *, kind: str, exact: float) -> Cost:
    """Return the cost of a rung on a layer's inputs.

    Args:
        rung: what runs; None is exact attention.
        sample: query, key, value, scale and causality.
        kind: one of `COSTS`.
        exact: cost of exact attention: what takes several times that is not timed with care.

    Cost: up to four calls on all heads and four on one key head.
    """
    num_key_heads = sample[1].shape[1]
    if kind == "keys":
        keys = _keys(rung, sample)
        return Cost(whole=keys, one=keys / num_key_heads, num_key_heads=num_key_heads)
    whole = _seconds(rung, sample, exact)
    one = whole / num_key_heads
    if whole < exact or rung is None:
        query, key, value, scale, is_causal = sample
        group = query.shape[1] // num_key_heads
        one = _seconds(rung, (query[:, :group], key[:, :1], value[:, :1], scale, is_causal), exact)
    one = min(max(one, whole / num_key_heads), whole)
    return Cost(whole=whole, one=one, num_key_heads=num_key_heads)


def exact_cost(sample: Sample, *, kind: str) -> Cost:
    """Return the cost of exact attention."""
    return measure_cost(None, sample, kind=kind, exact=float("inf"))


def with_measured(cost: Cost, damages: Sequence[Damage], *, exact: bool = False) -> Cost:
    """Return a cost in seconds with the median of what all layers took.

    Args:
        cost: of the sample; what one head costs keeps its share.
        damages: of one rung in all layers.
        exact: take the seconds of exact attention.
    """
    whole = median(x.exact_seconds if exact else x.seconds for x in damages)
    one = whole * cost.one / cost.whole
    return Cost(whole=whole, one=one, num_key_heads=cost.num_key_heads)


def _keys(rung: Rung | None, sample: Sample) -> float:
    query, key, value, scale, is_causal = sample
    n_q, n_k = query.shape[2], key.shape[2]
    visible = n_k - (n_q - 1) / 2 if is_causal else float(n_k)
    if rung is None:
        return visible
    with tracing() as trace:
        rung.attention(0)(query, key, value, is_causal=is_causal, scale=scale)
    return trace.keys_per_query


def _seconds(rung: Rung | None, sample: Sample, exact: float) -> float:
    query, key, value, scale, is_causal = sample
    attention = exact_attention if rung is None else rung.attention(0)
    least = float("inf")
    for repeat in range(1 + _REPEATS):  # the first call may compile and tune kernels
        started = clock(query)
        attention(query, key, value, is_causal=is_causal, scale=scale)
        least = min(least, clock(query) - started)
        if repeat == 0 and not query.is_cuda and least > _HOPELESS * exact:
            break
    return least
