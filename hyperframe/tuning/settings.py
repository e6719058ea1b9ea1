"""What a tuner is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..component import check_bool, check_choice, check_fraction, check_positive_int
from ..errors import ArgumentError, ArgumentTypeError
from .costs import COSTS
from .rungs import DEFAULT_LADDER, Rung, ladder

__all__ = ["TuneSettings", "parse_percent", "parse_speed"]

_LEAST_LENGTH = 64  # fewer tokens say nothing of an approximation


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """What is asked for, and how it is measured.

    Attributes:
        max_increase: limit of the relative increase of the perplexity, 0.01 for 1 %; None where a
            speed is asked for.
        speed_target: attention of all layers is to cost this many times less than exact; None
            where a limit is asked for.
        specs: the rungs, see `hyperframe.tuning.rungs.parse_rung`.
        cost: "seconds" on this device at this length, or "keys" for each query.
        length: tokens of a sequence.
        choosing: sequences that errors are measured on.
        verifying: other sequences, on which the policy has to keep the limit.
        rounds: policies that are verified at most.
        confidence: probability with which the increase has to keep the limit, see `search`.
        mixed: whether key heads of a layer may attend in two ways.
        seed: of all draws.
    """

    max_increase: float | None = 0.01
    speed_target: float | None = None
    specs: Sequence[str] = DEFAULT_LADDER
    cost: str = "seconds"
    length: int = 4096
    choosing: int = 1
    verifying: int = 2
    rounds: int = 4
    confidence: float = 0.95
    mixed: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check everything, the rungs included."""
        owner = "tune"
        if (self.max_increase is None) == (self.speed_target is None):
            raise ArgumentError(
                "tune: give one of --max-ppl-increase and --speed-target, and not both: the other "
                "one is what comes out"
            )
        if self.max_increase is not None:
            _check_number("--max-ppl-increase", self.max_increase, least=0.0)
        if self.speed_target is not None:
            _check_number("--speed-target", self.speed_target, least=1.0)
        check_choice(owner, "cost", self.cost, COSTS)
        for name in ("length", "choosing", "verifying", "rounds"):
            check_positive_int(owner, name, getattr(self, name))
        if self.length < _LEAST_LENGTH:
            raise ArgumentError(
                f"tune: length={self.length}: so few tokens say nothing of an approximation; take "
                f"at least {_LEAST_LENGTH}, and better as many as the model will read"
            )
        check_fraction(owner, "confidence", self.confidence, include_one=False)
        check_bool(owner, "mixed", self.mixed)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ArgumentTypeError(f"tune: seed={self.seed!r} is no int")
        self.rungs()

    def rungs(self) -> tuple[Rung, ...]:
        """Return the rungs."""
        return ladder(self.specs)

    @property
    def limit(self) -> float | None:
        """The limit in nats for each token."""
        return None if self.max_increase is None else math.log1p(self.max_increase)


def parse_percent(text: str) -> float:
    """Return the fraction of `"1%"` or `"0.01"`.

    Raises:
        ArgumentError: it is neither, negative or not finite.

    Example:
        >>> parse_percent("0.5%"), parse_percent("0.5 %"), parse_percent("0.005")
        (0.005, 0.005, 0.005)
    """
    number = text.strip()
    is_percent = number.endswith("%")
    try:
        value = float(number.removesuffix("%"))
    except ValueError:
        raise ArgumentError(f"--max-ppl-increase {text}: is no number; write 1% or 0.01") from None
    _check_number("--max-ppl-increase", value, least=0.0)
    if not is_percent and value >= 1:
        raise ArgumentError(
            f"--max-ppl-increase {text}: would be {100 * value:g} %; write {text}% to mean percent"
        )
    return value / 100 if is_percent else value


def parse_speed(text: str) -> float:
    """Return the factor of `"2x"` or `"2"`.

    Raises:
        ArgumentError: it is neither, or below 1.

    Example:
        >>> parse_speed("1.5x")
        1.5
    """
    try:
        value = float(text.strip().lower().removesuffix("x"))
    except ValueError:
        raise ArgumentError(f"--speed-target {text}: is no number; write 2x") from None
    _check_number("--speed-target", value, least=1.0)
    return value


def _check_number(option: str, value: object, *, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{option} {value!r}: is no number")
    if not math.isfinite(value) or value < least:
        raise ArgumentError(f"{option} {value:g}: must be a finite number of at least {least:g}")
