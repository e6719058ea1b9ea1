"""Repeats follow the budget, functions take turns, failures are told apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from hyperframe.benchmarking import Candidate, Timing, measure, timing
from hyperframe.benchmarking.timing import Failure, peak_bytes
from hyperframe.errors import ArgumentError, UnsupportedError

CPU = torch.device("cpu")


def test_timing_summarises_its_repeats() -> None:
    found = Timing.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.median_ms, found.min_ms, found.repeats) == (3.0, 1.0, 5)
    assert (found.p10_ms, found.p90_ms) == pytest.approx((1.4, 4.6))
    assert Timing.of([2.0]).as_dict()["p90_ms"] == 2.0


class Clock:
    """A clock that moves only when it is told to, in milliseconds."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now / 1e3


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    return made


def test_repeats_that_are_asked_for_follow_one_call_of_each(clock: Clock) -> None:
    order: list[str] = []

    def call(name: str, milliseconds: float) -> Candidate:
        def run() -> None:
            order.append(name)
            clock.now += milliseconds

        return Candidate(run)

    calls = {"endless": call("endless", 1e4), "fast": call("fast", 3)}
    found = measure(calls, device=CPU, seconds=0.1, repeats=2)
    assert order == ["endless", "fast"] * 3
    assert all(isinstance(time, Timing) and time.repeats == 2 for time in found.values())


def test_slow_functions_are_repeated_less_and_in_turn(clock: Clock) -> None:
    order: list[str] = []

    def call(name: str, milliseconds: float) -> Candidate:
        def run() -> None:
            order.append(name)
            clock.now += milliseconds

        return Candidate(run)

    calls = {"endless": call("endless", 1e5), "slow": call("slow", 30), "fast": call("fast", 3)}
    found = measure(calls, device=CPU, seconds=0.1)
    assert {name: time.repeats for name, time in found.items() if isinstance(time, Timing)} == {
        "endless": 1, "slow": 3, "fast": 33,
    }  # fmt: skip
    assert [time.median_ms for time in found.values() if isinstance(time, Timing)] == pytest.approx(
        [1e5, 30, 3]
    )
    # warm-up: twice each, once what is endless. then the slow ones stand between the fast ones
    assert order[:5] == ["endless", "slow", "slow", "fast", "fast"]
    places = [place for place, name in enumerate(order[5:]) if name == "slow"]
    assert places[0] > 9
    assert places[1] - places[0] > 9


def test_what_compiles_at_first_is_repeated_like_others(clock: Clock) -> None:
    calls = 0

    def compiled() -> None:
        nonlocal calls
        calls += 1
        clock.now += 2e4 if calls == 1 else 5

    found = measure({"compiled": Candidate(compiled)}, device=CPU, seconds=0.1)["compiled"]
    assert isinstance(found, Timing)
    assert (found.repeats, found.p90_ms) == (20, pytest.approx(5))


def test_context_is_entered_before_the_clock_starts(clock: Clock) -> None:
    @contextlib.contextmanager
    def slow() -> Iterator[None]:
        clock.now += 1000
        yield

    found = measure({"call": Candidate(lambda: None, slow)}, device=CPU, seconds=0.001)["call"]
    assert isinstance(found, Timing)
    assert found.median_ms == 0


def test_failures_leave_the_others_alone() -> None:
    def fail(error: Exception) -> Candidate:
        def run() -> None:
            raise error

        return Candidate(run)

    found = measure(
        {
            "broken": fail(RuntimeError("out of memory\nlong story")),
            "refused": fail(UnsupportedError("there is no such thing")),
            "fine": Candidate(lambda: None),
        },
        device=CPU,
        seconds=0.001,
    )
    assert found["broken"] == Failure("RuntimeError: out of memory", is_refusal=False)
    assert found["refused"] == Failure("UnsupportedError: there is no such thing", is_refusal=True)
    assert isinstance(found["fine"], Timing)
    with pytest.raises(ArgumentError):
        measure({"wrong": fail(ArgumentError("n is 0"))}, device=CPU, seconds=0.001)


def test_peak_memory_is_unknown_on_a_cpu() -> None:
    assert peak_bytes(Candidate(lambda: None), CPU) is None


@pytest.mark.gpu
def test_events_graphs_and_peak_memory_on_a_gpu() -> None:
    from hyperframe.benchmarking.timing import capture

    cuda = torch.device("cuda")
    x = torch.randn(1 << 22, device=cuda)
    candidate = Candidate(lambda: x * 2)
    peak = peak_bytes(candidate, cuda)
    assert peak is not None
    assert x.nbytes <= peak < 2 * x.nbytes
    replay = capture(candidate)
    found = measure({"eager": candidate, "graph": replay}, device=cuda, seconds=0.05, flush=True)
    assert all(isinstance(time, Timing) and time.median_ms > 0 for time in found.values())


@pytest.mark.gpu
def test_a_captured_call_keeps_what_it_reads() -> None:
    from hyperframe.benchmarking.timing import capture

    cuda = torch.device("cuda")
    out = torch.zeros(1 << 22, device=cuda)

    def made() -> Candidate:
        x = torch.ones_like(out)
        return Candidate(lambda: out.add_(x))

    replays = [capture(made()) for _ in range(2)]  # a capture empties the cache of what is unused
    torch.cuda.empty_cache()
    out.zero_()
    for replay in replays:
        replay()
    torch.cuda.synchronize()
    assert torch.equal(out, torch.full_like(out, 2))
