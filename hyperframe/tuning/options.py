"""The ways a layer may attend: every rung for all heads, or two of them shared among key heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from .costs import Cost
from .sensitivity import Damage

__all__ = ["EXACT", "Option", "layer_options"]

EXACT = -1
"""The number of exact attention, beside those of rungs."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way.

    Attributes:
        rungs: of every key head, the number of its rung; `EXACT` is none.
        cost: of the layer.
        loss: predicted increase of the mean loss, nats.
    """

    rungs: tuple[int, ...]
    cost: float
    loss: float

    @property
    def is_uniform(self) -> bool:
        """Whether all heads attend alike."""
        return len(set(self.rungs)) == 1


def layer_options(
    damages: Sequence[Damage], costs: Sequence[Cost], exact: Cost, *, mixed: bool
) -> list[Option]:
    """Return the ways of one layer, without those to which another is preferable in both respects.

    Args:
        damages: of every rung in this layer.
        costs: of every rung.
        exact: of exact attention.
        mixed: whether key heads may attend in two ways: for each pair of rungs the heads that gain
            the most from the better one have it, one more in each option.

    Returns:
        Options by falling cost: those in which all heads attend alike to which no other such one is
        preferable, and those mixed ones to which none at all is.

    Example:
        >>> bad = Damage(first=(0.0, 0.0), quadratic=(0.5, 0.0), error=(1.0, 0.1), seconds=1.0,
        ...     exact_seconds=3.0)
        >>> cost, exact = (Cost(whole=c, one=c / 2, num_key_heads=2) for c in (1.0, 3.0))
        >>> [option.rungs for option in layer_options([bad], [cost], exact, mixed=True)]
        [(-1, -1), (-1, 0), (0, 0)]
    """
    heads = exact.num_key_heads
    losses = {EXACT: (0.0,) * heads, **{k: x.quadratic for k, x in enumerate(damages)}}
    price = {EXACT: exact, **dict(enumerate(costs))}
    found = [
        Option(rungs=(rung,) * heads, cost=price[rung].of(heads), loss=sum(losses[rung]))
        for rung in losses
    ]
    pairs = permutations(losses, 2) if mixed and heads > 1 else ()
    for better, cheaper in pairs:
        if price[better].whole <= price[cheaper].whole:
            continue
        gains = [losses[cheaper][head] - losses[better][head] for head in range(heads)]
        ranked = sorted(range(heads), key=lambda head: -gains[head])
        for count in range(1, heads):
            has = set(ranked[:count])
            rungs = tuple(better if head in has else cheaper for head in range(heads))
            cost = price[better].of(count) + price[cheaper].of(heads - count)
            loss = sum(losses[rung][head] for head, rung in enumerate(rungs))
            found.append(Option(rungs=rungs, cost=cost, loss=loss))
    plain = _pareto([option for option in found if option.is_uniform])
    best = [option for option in _pareto(found) if not option.is_uniform]
    return sorted(plain + best, key=lambda x: (-x.cost, x.loss))


def _pareto(options: Sequence[Option]) -> list[Option]:
    kept: list[Option] = []
    # by cost, then loss; among equals uniform ones stand first
    for option in sorted(options, key=lambda x: (x.cost, x.loss, not x.is_uniform)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept
