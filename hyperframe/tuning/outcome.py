"""What tuning found: the policy, and what was predicted and measured of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..integrations.policy import Policy, Rule
from .costs import Cost
from .options import EXACT
from .paired import Increase
from .rungs import Rung
from .search import Choice, Trial
from .sensitivity import Damage

__all__ = ["Tuned", "policy_rules"]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The result.

    Attributes:
        policy: what `apply` and `hyperframe eval` read; its `info` holds the numbers below.
        choice: the option of every layer.
        trial: what was measured of it; None for exact attention, which was not measured.
        trials: all that were measured.
        rungs: those that paid, by their numbers in options.
        skipped: labels of the others, with the reason.
        costs: of each rung, for a layer.
        exact: cost of exact attention.
        damages: of every layer and rung.
        is_reached: whether the limit is kept and the speed target reached.
        message: one sentence on the outcome.
        facts: what was asked and how it was measured, in values of JSON.
        seconds: of the stages.
    """

    policy: Policy
    choice: Choice
    trial: Trial | None
    trials: Sequence[Trial]
    rungs: Sequence[Rung]
    skipped: Mapping[str, str]
    costs: Sequence[Cost]
    exact: Cost
    damages: Mapping[tuple[int, int], Damage]
    exact_seconds: Mapping[int, float]
    is_reached: bool
    message: str
    facts: Mapping[str, Any]
    seconds: Mapping[str, float]

    @property
    def speed(self) -> float:
        """How many times less the attention of all layers costs than exact attention, predicted."""
        return speed_of(self.choice, self.exact)

    def layers(self) -> list[dict[str, Any]]:
        """Return one row for each layer, in values of JSON."""
        measured = {} if self.trial is None else self.trial.verified.seconds
        rows = []
        for layer, option in self.choice.options.items():
            rows.append(
                {
                    "layer": layer,
                    "rungs": [label_of(rung, self.rungs) for rung in option.rungs],
                    "cost": option.cost, "exact_cost": self.exact.whole,
                    "predicted_percent": 100 * math.expm1(option.loss),
                    "relative_error": self._error(layer, option.rungs),
                    "seconds": measured.get(layer),
                    "exact_seconds": self.exact_seconds.get(layer),
                }
            )  # fmt: skip
        return rows

    def _error(self, layer: int, rungs: Sequence[int]) -> float:
        """Return the largest relative error of a key head."""
        return max(
            0.0 if rung == EXACT else self.damages[layer, rung].error[head]
            for head, rung in enumerate(rungs)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything in values of JSON."""
        return {
            **self.facts, "is_reached": self.is_reached, "message": self.message,
            "predicted_percent": 100 * math.expm1(self.choice.loss),
            "measured": None if self.trial is None else trial_dict(self.trial, self.exact),
            "predicted_speed": self.speed, "measured_speed": self.measured_speed,
            "trials": [trial_dict(trial, self.exact) for trial in self.trials],
            "rungs": [
                {"rung": rung.label, "cost": cost.whole, "exact_cost": self.exact.whole}
                for rung, cost in zip(self.rungs, self.costs, strict=True)
            ],
            "skipped": dict(self.skipped), "layers": self.layers(), "seconds": dict(self.seconds),
        }  # fmt: skip

    @property
    def measured_speed(self) -> float | None:
        """Seconds of exact attention over those of the policy, in the runs that verified it."""
        if self.trial is None or not self.trial.verified.seconds:
            return None
        found = self.trial.verified.seconds
        return sum(self.exact_seconds[layer] for layer in found) / sum(found.values())


def speed_of(choice: Choice, exact: Cost) -> float:
    """Return how many times less a choice costs than exact attention."""
    whole = exact.whole * len(choice.options)
    return whole / choice.cost if choice.cost > 0 else math.inf


def label_of(rung: int, rungs: Sequence[Rung]) -> str:
    """Return the spec of a rung, or "exact"."""
    return "exact" if rung == EXACT else rungs[rung].label


def increase_dict(increase: Increase) -> dict[str, float]:
    """Return an increase in percent of the perplexity, with its standard error."""
    return {"percent": increase.percent, "standard_error": increase.percent_error}


def trial_dict(trial: Trial, exact: Cost) -> dict[str, Any]:
    """Return a trial in values of JSON."""
    return {
        "predicted_percent": 100 * math.expm1(trial.choice.loss),
        "predicted_speed": speed_of(trial.choice, exact),
        **increase_dict(trial.verified.increase),
        "upper_percent": 100 * math.expm1(trial.upper), "passed": trial.passed,
    }  # fmt: skip


def policy_rules(choice: Choice, rungs: Sequence[Rung], *, seed: int) -> list[Rule]:
    """Return the rules of a choice: one for every rung and set of key heads.

    Exact layers and heads need none.
    """
    places: dict[tuple[int, tuple[int, ...] | None], list[int]] = {}
    for layer, option in choice.options.items():
        for rung in sorted(set(option.rungs) - {EXACT}):
            heads = tuple(head for head, other in enumerate(option.rungs) if other == rung)
            whole = len(heads) == len(option.rungs)
            places.setdefault((rung, None if whole else heads), []).append(layer)
    return [
        Rule(layers=layers, attention={**rungs[rung].options, "seed": seed}, key_heads=heads)
        for (rung, heads), layers in sorted(
            places.items(), key=lambda item: (item[0][0], item[0][1] or ())
        )
    ]
