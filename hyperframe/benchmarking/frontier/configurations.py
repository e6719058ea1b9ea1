"""What is measured: detectors at budgets, beside one window, with one residual each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ... import detectors, samplers
from ...attention import HyperAttention
from ...component import (
    check_bool,
    check_choice,
    check_non_negative_int,
    check_positive_int,
)
from ...detectors import AbstractDetector
from ...detectors.auto import spec_of_preset
from ...errors import ArgumentError, SpecError, UnknownComponentError
from .budgets import LEFT_OUT, has_budget, with_budget, with_tile_size
from .oracle import TileOracle

__all__ = [
    "CAUSAL",
    "NO_DETECTOR",
    "ORACLE",
    "YARDSTICKS",
    "Configuration",
    "configurations",
    "default_detectors",
    "oracle_of",
]

CAUSAL = ("single_pass", "recursive", "none")
NO_DETECTOR = "none"
"""What is asked for to measure the window and the samples alone."""
ORACLE = "tile_oracle"
"""What is asked for to measure `TileOracle`, which has no name in the registry."""
YARDSTICKS = (ORACLE, "oracle")
"""Detectors that look at all entries; they take no part in a Pareto front."""

_TILE = 64  # rows of a tile where a detector does not say


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One point to measure.

    Attributes:
        detector: a name or spec string, `NO_DETECTOR` or `ORACLE`.
        budget: keys that it aims at; None leaves it as it is.
        sampler: a name or spec string.
        num_samples: sampled keys of a row.
        causal: one of `CAUSAL`.
        strict: see `strict_causal` of `HyperAttention`.
        window: keys of the sliding window beside the detector; 0 is no window.
        sinks: leading keys that every row holds.
        tile_size: of detectors that have tiles; None leaves them as they are.
        min_seq_len: see `HyperAttention`; here the longest exact leaf of the recursion.
        seed: of all draws.
    """

    detector: str
    budget: int | None = None
    sampler: str = "uniform"
    num_samples: int = 256
    causal: str = "single_pass"
    strict: bool = False
    window: int = 128
    sinks: int = 64
    tile_size: int | None = None
    min_seq_len: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers; names are looked up when the attention is made."""
        owner = "frontier"
        check_choice(owner, "causal", self.causal, CAUSAL)
        check_bool(owner, "strict", self.strict)
        for name in ("num_samples", "window", "sinks", "min_seq_len"):
            check_non_negative_int(owner, name, getattr(self, name))
        for name in ("budget", "tile_size"):
            if getattr(self, name) is not None:
                check_positive_int(owner, name, getattr(self, name))
        if self.window == 0 and (self.sinks > 0 or self.detector == NO_DETECTOR):
            raise ArgumentError(
                f"frontier: window=0 with sinks={self.sinks} and the detector {self.detector!r}; "
                "sinks are part of the window, and something has to be held: pass window=1 or more"
            )

    @property
    def label(self) -> str:
        """A few words for a progress bar."""
        budget = "" if self.budget is None else f" at {self.budget}"
        strict = ", strict" if self.strict else ""
        return f"{self.detector}{budget} + {self.sampler}{strict}"

    def chosen(self) -> AbstractDetector | None:
        """Return the detector at its budget, without the window; None for the window alone."""
        if self.detector == NO_DETECTOR:
            return None
        if self.detector == ORACLE:
            beside = None if self.causal == "recursive" else self._window()
            found: AbstractDetector = TileOracle(beside=beside)
        else:
            found = detectors.create(self.detector)
        if self.budget is not None:
            found = with_budget(found, self.budget)
        return found if self.tile_size is None else with_tile_size(found, self.tile_size)

    def attention(self, backend: str = "auto") -> HyperAttention:
        """Return the attention to measure.

        Raises:
            HyperframeError: the components cannot be had, or not together.
        """
        members = [part for part in (self._window(), self.chosen()) if part is not None]
        detector = members[0]
        if len(members) > 1:
            detector = detectors.create("union", detectors=tuple(members))
        return HyperAttention(
            detector=detector, sampler=self.sampler, num_samples=self.num_samples,
            causal="recursive" if self.causal == "recursive" else "single_pass",
            strict_causal=self.strict, min_seq_len=self.min_seq_len, backend=backend,
            seed=self.seed,
        )  # fmt: skip

    def _window(self) -> AbstractDetector | None:
        if self.window == 0:
            return None
        return detectors.create("sliding_window", width=self.window, num_sinks=self.sinks)


def default_detectors() -> tuple[str, ...]:
    """Return the window alone and every registered detector that is not in `LEFT_OUT`."""
    return NO_DETECTOR, *(name for name in detectors.names() if name not in LEFT_OUT)


def oracle_of(configuration: Configuration) -> Configuration | None:
    """Return the tile oracle of the same budget, tiles and residual; None without a budget."""
    if configuration.budget is None or configuration.detector == ORACLE:
        return None
    own = getattr(configuration.chosen(), "tile_size", _TILE)
    tile_size = configuration.tile_size if own == _TILE else own
    return dataclasses.replace(configuration, detector=ORACLE, tile_size=tile_size)


def configurations(
    base: Configuration, *, names: Sequence[str] | None, chosen_samplers: Sequence[str],
    budgets: Sequence[int], oracle: bool = False,
) -> Iterator[Configuration]:  # fmt: skip
    """Yield every detector x budget x sampler, the samplers of one detector and budget together.

    A detector without a budget rule (see `budgets`) is measured once, as it is. A detector that
    cannot even be made is yielded: the attempt to measure it says why.

    Args:
        base: everything else.
        names: names, spec strings or presets; None takes `default_detectors()`.
        chosen_samplers: names or spec strings.
        budgets: keys.
        oracle: whether the tile oracles that the others are compared with come first.

    Raises:
        UnknownComponentError, SpecError: a detector or sampler that was named does not exist, or
            is not written right.
    """
    for sampler in chosen_samplers:
        samplers.create(sampler)
    found: dict[Configuration, None] = {}
    chosen = default_detectors() if names is None else map(spec_of_preset, names)
    for name in dict.fromkeys(chosen):
        for budget in budgets if _takes_budget(name, is_named=names is not None) else (None,):
            for sampler in dict.fromkeys(chosen_samplers):
                found[dataclasses.replace(base, detector=name, budget=budget, sampler=sampler)] = (
                    None
                )
    yardsticks: dict[Configuration, None] = {}
    for configuration in found if oracle else ():
        yardstick = _oracle_or_none(configuration)
        if yardstick is not None:
            yardsticks[yardstick] = None
    yield from yardsticks
    yield from (one for one in found if one not in yardsticks)


def _takes_budget(name: str, *, is_named: bool) -> bool:
    if name in (NO_DETECTOR, ORACLE):
        return name == ORACLE
    try:
        return has_budget(detectors.create(name))
    except (SpecError, UnknownComponentError):
        if is_named:
            raise
    except Exception:
        return False
    return False


def _oracle_or_none(configuration: Configuration) -> Configuration | None:
    try:
        return oracle_of(configuration)
    except Exception:
        return None
