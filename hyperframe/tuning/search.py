"""Which option each layer takes, so that the measured increase keeps a limit.

Predictions choose, the loss of the whole model decides. A policy is chosen for a limit of the
predicted increase; what it does is measured on other text. The next limit follows from the ratio of
the two, between the largest that passed and the smallest that failed. The cheapest policy that
passed is the answer; exact attention passes always.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .knapsack import choose
from .options import EXACT, Option
from .paired import Increase

__all__ = ["Choice", "Trial", "Verified", "cheapest", "mildest", "search"]

_FIRST = 0.35  # of the limit, predicted at first: the upper end of a measurement has to keep it
_MOST = 8.0  # times the limit; a prediction that is that much too high is not believed
_AIM = 0.9  # of the limit, for the upper end of the next measured increase
_STEP = (0.1, 4.0)  # by which the limit of the prediction changes at most in one round
_AFTER_FAILURE = 0.5  # and at least, after a failure: a second one costs a round and confidence
_NEAR = 1.15  # ratio of two limits of the prediction that is not worth another round
_WORTH_MIXING = 0.97  # of the cost without mixed layers


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An option for every layer.

    Attributes:
        options: by layer.
        cost: of all.
        loss: predicted increase of the mean loss.
    """

    options: dict[int, Option]
    cost: float
    loss: float

    @property
    def is_exact(self) -> bool:
        """Whether nothing is replaced."""
        return all(set(option.rungs) == {EXACT} for option in self.options.values())


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What the whole model did with a choice.

    Attributes:
        increase: of the loss.
        seconds: of the attention of every layer, a sequence.
    """

    increase: Increase
    seconds: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A choice, and what it did to the text that verifies.

    Attributes:
        choice: what was measured.
        budget: limit of the predicted increase that it was chosen for; None for a speed.
        verified: measured.
        upper: the upper confidence limit of the increase.
        passed: whether that keeps the limit that was asked for.
    """

    choice: Choice
    budget: float | None
    verified: Verified
    upper: float
    passed: bool


def cheapest(options: Mapping[int, Sequence[Option]], limit: float) -> Choice:
    """Return the choice of least cost whose predicted increase keeps a limit.

    Layers are mixed only where that saves 3 % of the cost. See `hyperframe.tuning.knapsack`.
    """
    mixed = _solve(options, limit, by="cost", under="loss")
    plain = _solve(_uniform(options), limit, by="cost", under="loss")
    if mixed is None:
        raise AssertionError("exact attention, or what is as good, is among the options")
    return plain if plain is not None and mixed.cost > _WORTH_MIXING * plain.cost else mixed


def mildest(options: Mapping[int, Sequence[Option]], cost: float) -> Choice | None:
    """Return the choice of least predicted increase that costs at most this; None: nothing does."""
    return _solve(options, cost, by="loss", under="cost")


def _uniform(options: Mapping[int, Sequence[Option]]) -> Mapping[int, Sequence[Option]]:
    return {layer: [x for x in found if x.is_uniform] for layer, found in options.items()}


def _solve(
    options: Mapping[int, Sequence[Option]], limit: float, *, by: str, under: str
) -> Choice | None:
    if not all(options.values()):
        return None
    values, weights = (
        [[getattr(option, name) for option in found] for found in options.values()]
        for name in (by, under)
    )
    picks = choose(values, weights, limit)
    if picks is None:
        return None
    chosen = {
        layer: found[pick] for (layer, found), pick in zip(options.items(), picks, strict=True)
    }
    return Choice(
        options=chosen, cost=math.fsum(option.cost for option in chosen.values()),
        loss=math.fsum(option.loss for option in chosen.values()),
    )  # fmt: skip


def search(
    options: Mapping[int, Sequence[Option]], verify: Callable[[Choice], Verified], *, limit: float,
    rounds: int, confidence: float,
) -> list[Trial]:  # fmt: skip
    """Measure choices until one is near the limit, or all rounds are used.

    Args:
        options: of every layer, exact attention (or what is as good) among them.
        verify: measures a choice on the whole model.
        limit: of the measured increase, nats for each token.
        rounds: measurements at most.
        confidence: with which the answer keeps the limit. Limits grow while measurements pass, so
            that only the first choice that is too bold, and the first such one after each failure,
            can pass by luck. Their chances are halved from failure to failure: together they stay
            below what is allowed.

    Returns:
        The trials in their order, each of another choice. Exact attention is not measured: where
        no trial passed, it is the answer.
    """
    trials: list[Trial] = []
    failures = 0
    if limit <= 0:
        return trials
    last = cheapest(options, math.inf)
    passed, failed = 0.0, _MOST * limit  # limits of the prediction
    budget = _FIRST * limit
    while passed < budget < failed and budget > limit / 1000:
        choice = cheapest(options, budget)
        trial = next((x for x in trials if x.choice.options == choice.options), None)
        is_new = trial is None and not choice.is_exact
        if is_new:
            if len(trials) == rounds:
                break
            sure = 1 - (1 - confidence) / 2 ** (1 + failures)
            trial = _tried(choice, verify(choice), budget, limit, sure)
            trials.append(trial)
            failures += not trial.passed
        if trial is None or trial.passed:
            passed = budget
        else:
            failed = budget
        if trial is not None and trial.passed and choice.options == last.options:
            break  # nothing is cheaper
        if trial is not None and is_new:
            budget *= _step(trial, limit)
            if trial.passed and budget < _NEAR * passed:
                break  # it is as near as the measurement says
        if not passed < budget < failed:  # the measurement has nothing new to say
            budget = math.sqrt(passed * failed) if passed else failed / 4
        if passed and failed / passed < _NEAR:
            break
    return trials


def _step(trial: Trial, limit: float) -> float:
    """Return by how much the limit of the prediction may grow, or has to shrink.

    The increase goes with the prediction, and its error with the root of it: a solution of
    `mean x + slack sqrt(x) = limit`.
    """
    mean = max(0.0, trial.verified.increase.mean)
    slack, aim = trial.upper - trial.verified.increase.mean, _AIM * limit
    root = slack + math.sqrt(slack**2 + 4 * mean * aim)  # without a difference of large numbers
    step = (2 * aim / root) ** 2 if root > 0 else math.inf
    return min(max(step, _STEP[0]), _STEP[1] if trial.passed else _AFTER_FAILURE)


def _tried(
    choice: Choice, verified: Verified, budget: float, limit: float, confidence: float
) -> Trial:
    upper = verified.increase.upper(confidence)
    return Trial(
        choice=choice, budget=budget, verified=verified, upper=upper, passed=upper <= limit
    )  # fmt: skip
