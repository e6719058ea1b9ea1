"""Running a frontier: every file, length and configuration, one row for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...component import check_bool, check_non_negative_int, check_positive_int
from ...errors import ArgumentError
from ...kernels import resolve_backend
from ..environment import describe_environment
from ..report import append_rows
from ..timing import Failure
from .configurations import YARDSTICKS, Configuration, configurations, oracle_of
from .measure import Cache, measure
from .problem import Problem, load_problem
from .rows import is_done, key_of, known_rows, make_row

__all__ = ["FrontierSettings", "Progress", "run"]

Progress = Callable[[int, int, str], None]
"""Called with the number of a configuration, their total and a few words, before it is measured,
and with an empty string after the last one."""

_LEAF = 512  # of the recursion, where nothing was given


@dataclass(frozen=True, kw_only=True)
class FrontierSettings:
    """What is measured, and how.

    Attributes:
        files: of captured heads, see `hyperframe.integrations.capture.save`.
        detectors: names or spec strings, also `none` and `tile_oracle`; None takes every registered
            one for which a budget makes sense, and `none`.
        samplers: names or spec strings.
        budgets: keys, see `hyperframe.benchmarking.frontier.budgets`.
        num_samples: sampled keys of a row.
        causal: `single_pass`, `recursive` or `none`; None is `single_pass` where the captured
            attention was causal, and `none` where it was not.
        strict: whether only earlier queries may help to choose.
        window: keys of the sliding window beside every detector; 0 is no window.
        sinks: leading keys that every row holds.
        tile_size: of detectors that have tiles; None leaves them as they are.
        min_seq_len: longest exact leaf of the recursion; None is 512.
        heads: the first query heads only; None takes all.
        lengths: the first positions only, for each of some lengths; None takes all.
        device: where.
        backend: of the attention.
        seed: of all draws.
        oracle: also measure the tile oracle, and compare with it.
        repeats: of each timed stage; 0 takes no times.
    """

    files: Sequence[Path | str]
    detectors: Sequence[str] | None = None
    samplers: Sequence[str] = ("uniform",)
    budgets: Sequence[int] = (128, 256, 512)
    num_samples: int = 256
    causal: str | None = None
    strict: bool = False
    window: int = 128
    sinks: int = 64
    tile_size: int | None = None
    min_seq_len: int | None = None
    heads: int | None = None
    lengths: Sequence[int] | None = None
    device: torch.device | str = "cpu"
    backend: str = "auto"
    seed: int = 0
    oracle: bool = False
    repeats: int = 3

    def __post_init__(self) -> None:
        """Check what later messages would not say clearly."""
        owner = "frontier"
        if not self.files:
            raise ArgumentError("frontier: no file of captured heads was named; name one at least")
        names = [Path(file).name for file in self.files]
        if len(set(names)) < len(names):
            raise ArgumentError(
                f"frontier: the files {', '.join(names)} do not differ in their names, by which "
                "rows are told apart; rename one"
            )
        for budget in self.budgets:
            check_positive_int(owner, "budget", budget)
        if not self.budgets or not self.samplers:
            raise ArgumentError("frontier: budgets and samplers: name one of each at least")
        check_bool(owner, "oracle", self.oracle)
        check_non_negative_int(owner, "repeats", self.repeats)
        self.base(is_causal=True)

    def base(self, *, is_causal: bool) -> Configuration:
        """Return what all configurations of a problem have in common."""
        causal = self.causal or ("single_pass" if is_causal else "none")
        leaf = _LEAF if self.min_seq_len is None else self.min_seq_len
        return Configuration(
            detector="sliding_window", num_samples=self.num_samples, causal=causal,
            strict=self.strict, window=self.window, sinks=self.sinks, tile_size=self.tile_size,
            min_seq_len=leaf if causal == "recursive" else 0, seed=self.seed,
        )  # fmt: skip

    def asked(self, problem: Problem) -> list[Configuration]:
        """Return the configurations to measure on a problem.

        Raises:
            ArgumentError: a detector or sampler does not exist; `causal` does not fit the heads.
        """
        base = self.base(is_causal=problem.is_causal)
        if base.causal != "none" and not problem.is_causal:
            raise ArgumentError(
                f"--causal {base.causal}: the attention in {problem.file} was not causal; leave "
                "the option out, or pass --causal none"
            )
        return list(
            configurations(
                base, names=self.detectors, chosen_samplers=self.samplers, budgets=self.budgets,
                oracle=self.oracle,
            )
        )  # fmt: skip


def run(
    settings: FrontierSettings, *, out: Path | None = None, progress: Progress | None = None
) -> Iterator[dict[str, Any]]:
    """Measure, and yield a row (see `FRONTIER_KEYS`) for every configuration that was asked for.

    Args:
        settings: what is measured.
        out: a JSON-lines file: rows that are there with the same `KEY_FIELDS` are yielded as they
            are and not measured again, new ones are appended as they are made.
        progress: told of every configuration before it is measured.

    Raises:
        ArgumentError: files, names or numbers that cannot work, before anything is measured.
        BackendUnavailableError: the backend cannot run on the device.

    A configuration that cannot be measured is a row with its `failure`. Cost: see `measure`, for
    each configuration; the tensors of one file at a time.
    """
    device = torch.device(settings.device)
    resolve_backend(settings.backend, device)
    known = {} if out is None else known_rows(out)
    for file in settings.files:  # refuses before anything is measured
        _problems(settings, load_problem(file))
    environment = describe_environment(device)
    places = [(file, number) for file in settings.files for number in range(_lengths(settings))]
    done, total = 0, None
    for file in settings.files:
        for problem in _problems(settings, load_problem(file, device)):
            asked, cache = settings.asked(problem), Cache()
            total = len(asked) * len(places) if total is None else total
            for configuration in asked:
                row = _known(problem, configuration, settings, known)
                if row is None:
                    if progress is not None:
                        where = f"{problem.file}, n = {problem.length}: {configuration.label}"
                        progress(done, total, where)
                    row = _measured(problem, configuration, settings, known, environment, cache)
                    known[key_of(row)] = row
                    if out is not None:
                        append_rows(out, [row])
                done += 1
                yield row
    if progress is not None:
        progress(done, done, "")


def _lengths(settings: FrontierSettings) -> int:
    return 1 if settings.lengths is None else len(settings.lengths)


def _problems(settings: FrontierSettings, whole: Problem) -> list[Problem]:
    """Return the problem at every length; refuses what does not fit it."""
    found = [
        whole.cut(length=length, heads=settings.heads)
        for length in ([None] if settings.lengths is None else settings.lengths)
    ]
    settings.asked(whole)
    return found


def _key(problem: Problem, configuration: Configuration, backend: str) -> tuple[Any, ...]:
    nothing = Failure("")
    return key_of(make_row(problem, configuration, nothing, backend=backend, environment={}))


def _known(
    problem: Problem, configuration: Configuration, settings: FrontierSettings,
    known: dict[tuple[Any, ...], dict[str, Any]],
) -> dict[str, Any] | None:  # fmt: skip
    row = known.get(_key(problem, configuration, settings.backend))
    if row is None:
        return None
    oracle = settings.oracle and row["failure"] is None and _yardstick(configuration) is not None
    timed = settings.repeats > 0 and configuration.detector not in YARDSTICKS
    return row if is_done(row, oracle=oracle, timed=timed) else None


def _yardstick(configuration: Configuration) -> Configuration | None:
    try:
        return oracle_of(configuration)
    except Exception:  # a detector that cannot be made; measuring it says why
        return None


def _measured(
    problem: Problem, configuration: Configuration, settings: FrontierSettings,
    known: dict[tuple[Any, ...], dict[str, Any]], environment: dict[str, Any], cache: Cache,
) -> dict[str, Any]:  # fmt: skip
    found: dict[str, Any] | Failure
    try:
        found = measure(
            problem, configuration, backend=settings.backend, repeats=settings.repeats,
            cache=cache,
        )  # fmt: skip
    except Exception as error:
        found = Failure.of(error)
    oracle_row = None
    if settings.oracle and (yardstick := _yardstick(configuration)) is not None:
        oracle_row = known.get(_key(problem, yardstick, settings.backend))
    return make_row(
        problem, configuration, found, backend=settings.backend, environment=environment,
        oracle_row=oracle_row,
    )  # fmt: skip
