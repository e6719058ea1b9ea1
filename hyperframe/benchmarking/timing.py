"""Timing of several functions in turn, CUDA graphs, and peak memory.

A repeat starts on an idle device and ends when the device is idle again: CUDA events around the
call on a GPU, the clock elsewhere. Functions that are compared take turns, so that they share the
state of the clocks, and each gets as many repeats as its time allows.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import HyperframeError, UnsupportedError

__all__ = ["Candidate", "Failure", "Timing", "capture", "measure", "peak_bytes"]

_FLUSH_BYTES = 256 << 20  # more than any L2 cache
_FEWEST, _MOST = 3, 100
_LONGEST_COMPILATION = 60.0  # seconds: a first call that took longer is slow itself


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    Attributes:
        call: the function.
        context: makes the context in which it is called, entered before the clock starts.
    """

    call: Callable[[], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __call__(self) -> Any:
        """Call once, in the context."""
        with self.context():
            return self.call()


@dataclass(frozen=True)
class Timing:
    """Milliseconds of the repeats of one function.

    Attributes:
        median_ms: the median; every ratio is made of medians.
        min_ms: the fastest repeat.
        p10_ms: the tenth percentile.
        p90_ms: the ninetieth.
        repeats: how many there were.
    """

    median_ms: float
    min_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int

    @classmethod
    def of(cls, times: list[float]) -> Timing:
        """Summarise milliseconds, one or more."""
        low, median, high = (float(x) for x in np.quantile(times, (0.1, 0.5, 0.9)))
        return cls(median, min(times), low, high, len(times))

    def as_dict(self) -> dict[str, float | int]:
        """Return the fields, for a row."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Failure:
    """Why something could not be measured, in one line.

    Attributes:
        reason: the exception's name and the first line of its message.
        is_refusal: the library refused by name what was asked; nothing went wrong.
    """

    reason: str
    is_refusal: bool = False

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Describe an exception."""
        line = next(iter(str(error).strip().splitlines()), "no message")
        return cls(f"{type(error).__name__}: {line}", isinstance(error, UnsupportedError))


def measure(
    candidates: Mapping[str, Candidate], *, device: torch.device, seconds: float,
    flush: bool = False, repeats: int | None = None,
) -> dict[str, Timing | Failure]:  # fmt: skip
    """Time functions in turn.

    Args:
        candidates: what to time, by name.
        device: where it runs.
        seconds: time for the repeats of each function, more or less: 3 to 100 repeats, fewer only
            for a function that takes more than twice as long as this.
        flush: write 256 MiB before every repeat, so that it starts with a cold L2 cache.
        repeats: repeats of each function, however long they take, after one call that does not
            count; None goes by `seconds`.

    Returns:
        The times, or why a function failed when it was warmed up; errors that say that the call
        was wrong (`HyperframeError`, other than a refusal by name) are raised.
    """
    results: dict[str, Timing | Failure] = {}
    counts: dict[str, int] = {}
    buffer = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if flush else None
    for name, candidate in candidates.items():
        try:
            for _ in range(2 if repeats is None else 1):  # the first compiles and fills caches
                estimate = _milliseconds(candidate, device, buffer)
                if estimate > 1e3 * max(2 * seconds, _LONGEST_COMPILATION):
                    break
        except Exception as error:
            if isinstance(error, HyperframeError) and not isinstance(error, UnsupportedError):
                raise
            results[name] = Failure.of(error)
            _release(device)
            continue
        fewest = 1 if estimate > 2e3 * seconds else _FEWEST
        affordable = max(fewest, min(_MOST, int(1e3 * seconds / max(estimate, 1e-3))))
        counts[name] = affordable if repeats is None else repeats
    times: dict[str, list[float]] = {name: [] for name in counts}
    rounds = max(counts.values(), default=0)
    for turn in range(rounds):
        for name, count in counts.items():
            # spread evenly over the rounds: slow functions take part in some of them
            if (turn + 1) * count // rounds > turn * count // rounds:
                times[name].append(_milliseconds(candidates[name], device, buffer))
    results |= {name: Timing.of(found) for name, found in times.items()}
    return {name: results[name] for name in candidates}


def _milliseconds(candidate: Candidate, device: torch.device, buffer: torch.Tensor | None) -> float:
    if buffer is not None:
        buffer.zero_()
    with candidate.context():
        if device.type != "cuda":
            start = time.perf_counter()
            candidate.call()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        candidate.call()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end))


def capture(candidate: Candidate) -> Candidate:
    """Capture a call in a CUDA graph; what is returned replays it.

    It also keeps what the call reads: a graph holds addresses, not tensors, and another capture
    gives the memory of tensors that nobody names back to the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            candidate()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with candidate.context(), torch.cuda.graph(graph):
        candidate.call()
    return Candidate(_Replay(graph, candidate))


@dataclass(frozen=True)
class _Replay:
    graph: torch.cuda.CUDAGraph
    candidate: Candidate

    def __call__(self) -> None:
        self.graph.replay()


def peak_bytes(candidate: Candidate, device: torch.device) -> int | None:
    """Return the most memory a call held beyond what was allocated before it, output included.

    None where there is no such counter (on a CPU).
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = candidate()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
