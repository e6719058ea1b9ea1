"""Tuning: measure errors and costs, choose, verify."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..evaluation.model import LanguageModel
from ..integrations.policy import Policy
from .costs import Cost, exact_cost, measure_cost, with_measured
from .gradients import Gradients, loss_gradients
from .options import EXACT, Option, layer_options
from .outcome import Tuned, policy_rules, speed_of
from .paired import paired_increase
from .rungs import Rung
from .scoring import mean_seconds, score
from .search import Choice, Trial, Verified, cheapest, mildest, search
from .sensitivity import Damage, add_damage, measure_damage
from .settings import TuneSettings

__all__ = ["Progress", "tune"]

Progress = Callable[[int, int, str], None]
"""Called with the number of a step, their total and a few words, before it is done."""

_PAYS = 1.05  # a rung that costs this many times what exact attention does is not measured further


def tune(
    language: LanguageModel, choosing: Sequence[Tensor], verifying: Sequence[Tensor],
    settings: TuneSettings, *, progress: Progress | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Tuned:  # fmt: skip
    """Choose for every layer, and for its key heads, how it attends.

    Args:
        language: the model.
        choosing: sequences of tokens `[n]` that errors are measured on.
        verifying: others, on which the loss of the whole model decides.
        settings: what is asked for.
        progress: told of every step.
        facts: kept with the policy, for example names of texts.

    Returns:
        What was found. Where no rung keeps the limit that is exact attention everywhere.

    Raises:
        ArgumentError, UnsupportedError: a model that has no loss or cannot be routed.

    Cost: for every sequence that chooses a forward, a backward and a forward with a call of each
    rung that pays; for every one that verifies `1 + rounds` forwards. The same seed and device give
    the same predictions; seconds differ.
    """
    return _Tuner(language, choosing, verifying, settings, progress, facts or {}).run()


class _Tuner:
    def __init__(
        self, language: LanguageModel, choosing: Sequence[Tensor], verifying: Sequence[Tensor],
        settings: TuneSettings, progress: Progress | None, facts: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.language, self.settings = language, settings
        self.choosing, self.verifying = choosing, verifying
        self.progress, self.given = progress, facts
        self.seconds: dict[str, float] = {}
        self.rungs: list[Rung] = []
        self.skipped: dict[str, str] = {}
        self.done = 0
        self.total = len(settings.rungs()) + len(choosing) * (1 + language.depth) + len(
            verifying
        ) * (1 + (settings.rounds if settings.speed_target is None else 1))  # fmt: skip

    def run(self) -> Tuned:
        settings = self.settings
        with self._stage("gradients"):
            first = self._gradients(0)
        with self._stage("costs"):
            self.exact = exact_cost(first.sample, kind=settings.cost)
            costs = self._paying(first)
        with self._stage("errors"):
            damages = self._damages(first)
        self.costs = self._final_costs(costs, damages)
        layers = list(first.of_layer)
        options = {
            layer: layer_options(
                [damages[layer, number] for number in range(len(self.rungs))], self.costs,
                self.exact, mixed=settings.mixed,
            )
            for layer in layers
        }  # fmt: skip
        with self._stage("verification"):
            choice, trial, trials, is_reached, message = self._choose(options)
        policy = Policy(rules=policy_rules(choice, self.rungs, seed=settings.seed))
        tuned = Tuned(
            policy=policy, choice=choice, trial=trial, trials=trials, rungs=self.rungs,
            skipped=self.skipped, costs=self.costs, exact=self.exact, damages=damages,
            exact_seconds=self.exact_seconds, is_reached=is_reached, message=message,
            facts=self._facts(), seconds=self.seconds,
        )  # fmt: skip
        self._tell("")
        info = {"tuned": tuned.to_dict()}
        policy = Policy(rules=policy.rules, model=self.language.name, info=info)
        return dataclasses.replace(tuned, policy=policy)

    def _choose(
        self, options: dict[int, list[Option]]
    ) -> tuple[Choice, Trial | None, list[Trial], bool, str]:
        settings = self.settings
        none = Choice(
            options={layer: self._exact_option() for layer in options},
            cost=self.exact.whole * len(options), loss=0.0,
        )  # fmt: skip
        self._exact_runs()
        if settings.limit is not None:
            trials = search(
                options, self._verify, limit=settings.limit, rounds=settings.rounds,
                confidence=settings.confidence,
            )  # fmt: skip
            passed = [trial for trial in trials if trial.passed]
            if not passed:
                return none, None, trials, True, self._nothing(trials)
            best = min(passed, key=lambda trial: (trial.choice.cost, trial.choice.loss))
            return best.choice, best, trials, True, "the limit is kept"
        assert settings.speed_target is not None
        choice = mildest(options, none.cost / settings.speed_target)
        is_reached = choice is not None
        if choice is None:
            choice = cheapest(options, math.inf)
        message = f"{settings.speed_target:g}x is reached"
        if not is_reached:
            message = (
                f"{settings.speed_target:g}x cannot be reached with these rungs: the fastest "
                f"policy reaches {speed_of(choice, self.exact):.2f}x"
            )
        if choice.is_exact:
            return none, None, [], is_reached, message + "; that is exact attention everywhere"
        verified = self._verify(choice)
        trial = Trial(
            choice=choice, budget=None, verified=verified, passed=is_reached,
            upper=verified.increase.upper(settings.confidence),
        )  # fmt: skip
        return choice, trial, [trial], is_reached, message

    def _nothing(self, trials: Sequence[Trial]) -> str:
        if not self.rungs:
            return "no rung costs less than exact attention here: every layer stays exact"
        if not trials:
            return "no rung keeps the limit in any layer: every layer stays exact"
        least = min(trial.upper for trial in trials)
        return (
            f"none of {len(trials)} policies kept the limit for sure (the best of them may cost "
            f"{100 * math.expm1(least):.2f} %): every layer stays exact; more text to verify on "
            "(--verifying) makes that surer"
        )

    def _exact_option(self) -> Option:
        heads = self.exact.num_key_heads
        return Option(rungs=(EXACT,) * heads, cost=self.exact.whole, loss=0.0)

    def _gradients(self, number: int) -> Gradients:
        self._tell(f"gradients of sequence {number + 1}")
        return loss_gradients(self.language.model, self.choosing[number])

    def _paying(self, gradients: Gradients) -> list[Cost]:
        """Return the costs of the rungs that may pay, and leave the others out."""
        costs = []
        length = gradients.sample[1].shape[2]
        for rung in self.settings.rungs():
            self._tell(f"cost of {rung.label}")
            if rung.is_exact(length):  # whatever seems to be saved would be noise of the clock
                self.skipped[rung.label] = f"answers {length:,} tokens exactly"
                continue
            cost = measure_cost(
                rung, gradients.sample, kind=self.settings.cost, exact=self.exact.whole
            )
            if cost.whole > _PAYS * self.exact.whole:
                ratio = cost.whole / self.exact.whole
                self.skipped[rung.label] = f"costs {ratio:.1f} times what exact attention does"
            else:
                self.rungs.append(rung)
                costs.append(cost)
        return costs

    def _damages(self, first: Gradients) -> dict[tuple[int, int], Damage]:
        tables = []
        for number, tokens in enumerate(self.choosing):
            gradients = first if number == 0 else self._gradients(number)
            tables.append(
                measure_damage(
                    self.language.model, tokens, gradients, self.rungs, seed=self.settings.seed,
                    step=lambda layer: self._tell(f"errors of layer {layer}"),
                )
            )  # fmt: skip
        return add_damage(tables)

    def _final_costs(
        self, costs: Sequence[Cost], damages: Mapping[tuple[int, int], Damage]
    ) -> list[Cost]:
        if self.settings.cost == "keys" or not costs:
            return list(costs)
        self.exact = with_measured(self.exact, list(damages.values()), exact=True)
        return [
            with_measured(cost, [x for (_, rung), x in damages.items() if rung == number])
            for number, cost in enumerate(costs)
        ]

    def _exact_runs(self) -> None:
        self.bases, seconds = [], []
        for number, tokens in enumerate(self.verifying):
            self._tell(f"exact, verifying sequence {number + 1}")
            losses, taken = score(self.language, tokens, None)
            self.bases.append(losses)
            seconds.append(taken)
        self.exact_seconds = mean_seconds(seconds)

    def _verify(self, choice: Choice) -> Verified:
        policy = Policy(rules=policy_rules(choice, self.rungs, seed=self.settings.seed))
        runs, seconds = [], []
        for number, tokens in enumerate(self.verifying):
            self._tell(
                f"policy of {speed_of(choice, self.exact):.2f}x, verifying sequence {number + 1}"
            )
            losses, taken = score(self.language, tokens, policy)
            runs.append(losses)
            seconds.append({layer: taken[layer] for layer in choice.options})
        return Verified(increase=paired_increase(runs, self.bases), seconds=mean_seconds(seconds))

    def _facts(self) -> dict[str, Any]:
        settings, device = self.settings, self.language.device
        loss = sum(float(base.double().mean()) for base in self.bases) / len(self.bases)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        return {
            **self.given, "model": self.language.name, "max_increase": settings.max_increase,
            "speed_target": settings.speed_target, "cost": settings.cost,
            "length": len(self.verifying[0]), "choosing": len(self.choosing),
            "verifying": len(self.verifying), "confidence": settings.confidence,
            "seed": settings.seed, "exact_perplexity": math.exp(loss), "device": name,
            "dtype": self.language.dtype, "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }  # fmt: skip

    def _tell(self, what: str) -> None:
        if self.progress is not None:
            self.progress(self.done if what else self.total, self.total, what)
        self.done = min(self.done + 1, self.total)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
