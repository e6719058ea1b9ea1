"""Seconds and memory of a prefill, exact attention and a run in turn."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .model import LanguageModel
from .problem import Found, Problem, digest_of
from .settings import EXACT, EvalSettings, Run

__all__ = ["peak_memory", "problems"]

_STATUS = Path("/proc/self/statm")
_PAGE = 4096


def problems(lengths: Sequence[int], settings: EvalSettings) -> Iterator[Problem]:
    """Yield one problem for each length, on random tokens: what they are does not change the time.

    (Where a detector's time depends on what it finds, by little, real heads are for
    `hyperframe frontier`.)
    """
    for length in lengths:

        def measure(model: LanguageModel, run: Run, length: int = length) -> Found:
            generator = torch.Generator().manual_seed(settings.seed)
            size = model.model.config.vocab_size
            tokens = torch.randint(0, size, (length,), generator=generator)
            return prefill(model, run, tokens, repeats=settings.repeats)

        yield Problem(
            task="prefill", quantity="seconds", n=length, measure=measure,
            digest=digest_of(settings.repeats, settings.seed),
        )  # fmt: skip


def prefill(model: LanguageModel, run: Run, tokens: Tensor, *, repeats: int) -> Found:
    """Return median seconds of a forward that fills the cache and predicts one token.

    Args:
        model: the model.
        run: its attention.
        tokens: `[n]`.
        repeats: of exact attention and of the run, which take turns: both see the same state of
            clocks and caches.

    Attention's seconds come from an observer that waits for the device around every attention call;
    on a GPU that costs time, so that they are taken in passes of their own. On a GPU one pass that
    does not count compiles and tunes before. Memory is the peak beyond what was held before: what
    torch allocated on a GPU; elsewhere what the process took from the system, sampled every
    5 milliseconds, which is rough.
    """
    runs = [run] if run.is_exact else [Run(label=EXACT, layers=0), run]
    seconds: dict[str, list[float]] = {each.label: [] for each in runs}
    attention: dict[str, list[float]] = {each.label: [] for each in runs}
    memory: dict[str, list[int | None]] = {each.label: [] for each in runs}
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        for each in runs:
            with each.applied(model.model):
                model.prefill(tokens)
    for _ in range(repeats):
        for each in runs:
            calls: list[float] = []

            def observe(call: Any, calls: list[float] = calls) -> None:
                calls.append(call.seconds)

            if on_gpu:
                with each.applied(model.model, observe):
                    model.prefill(tokens)
            with each.applied(model.model, None if on_gpu else observe):
                took, peak = _timed(lambda: model.prefill(tokens), model.device)
            seconds[each.label].append(took)
            attention[each.label].append(sum(calls))
            memory[each.label].append(peak)
    value = statistics.median(seconds[run.label])
    details: dict[str, Any] = {
        "repeats": repeats, "fastest": min(seconds[run.label]),
        "attention": statistics.median(attention[run.label]),
        "peak_bytes": _most(memory[run.label]),
        "memory": "allocated by torch on the GPU" if on_gpu else "taken from the system, sampled",
    }  # fmt: skip
    if not run.is_exact:
        details |= {
            "exact_attention": statistics.median(attention[EXACT]),
            "exact_peak_bytes": _most(memory[EXACT]),
        }
    return Found(value=value, exact=statistics.median(seconds[EXACT]), details=details)


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[float, int | None]:
    with peak_memory(device) as peak:
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - started
    return took, peak[0]


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int | None]]:
    """Measure the most memory held inside, beyond what was held before.

    Args:
        device: what is asked: torch's allocator of a GPU, or the system.

    Yields:
        A list whose one entry are the bytes, afterwards; None where there is no way to know.
    """
    found: list[int | None] = [None]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device) - before
        return
    if not _STATUS.exists():
        yield found
        return
    _give_back()
    before, most, done = _resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
    found[0] = max(most[0], _resident(), before) - before


def _give_back() -> None:
    """Let glibc return what it keeps of freed memory, which would be used again unseen."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident() -> int:
    """Return the bytes of memory that the process holds."""
    return _PAGE * int(_STATUS.read_text(encoding="ascii").split()[1])


def _most(peaks: Sequence[int | None]) -> int | None:
    known = [peak for peak in peaks if peak is not None]
    return max(known, default=None)
