"""What is kept of a measurement: the keys of a row, and how a row is made."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from .accuracy import ApproximationError, KernelError
from .inputs import Shape
from .methods import AbstractMethod
from .timing import Failure, Timing

__all__ = ["MODES", "ROW_KEYS", "Entry", "make_row"]

MODES = ("forward", "forward_graph", "forward_backward", "forward_backward_graph")
"""What is timed: eager calls, and their replay as a CUDA graph."""

ROW_KEYS: dict[str, str] = {
    "suite": "name of the suite, or custom",
    "label": "short name of what was timed",
    "kind": "exact, masked (FlexAttention on the heavy entries alone) or approximate",
    "spec": "code or words that say what was computed; null for exact kernels",
    "is_causal": "whether the problem is causal",
    "n": "queries, and keys",
    "batch": "batch items",
    "heads": "query heads",
    "kv_heads": "key and value heads",
    "head_dim": "d",
    "dtype": "of the inputs",
    "inputs": "kind of inputs",
    "seed": "of inputs and draws",
    "backend": "that ran; null for exact kernels",
    "l2_flush": "whether every repeat started with a cold L2 cache",
    **dict.fromkeys(MODES, "median_ms, min_ms, p10_ms, p90_ms, repeats; null where not timed"),
    "stages": "the same for each stage of a forward, or null",
    "peak_extra_bytes": "most memory of a forward beyond its inputs, output included; null on CPU",
    "tensor_bytes": "bytes of query, key, value and output",
    "error": "against exact attention: median, worst, rows, bound, is_finite; null if not measured",
    "kernel_error": "against float64, same entries: ours, torch, limit, length, and grad_ours, "
    "grad_torch, grad_exact, grad_limit; null if exact",
    "gate": "passed (null where there is nothing to check) and reasons",
    "speed_up": "by mode: the fastest exact kernel's median over this one's; null if not reported",
    "versus": "by mode: the exact kernel that the speed-up refers to",
    "not_timed": "by mode (or all): why a time is missing",
    "environment": "device, driver and versions",
    "time": "when the row was made, UTC",
}
"""The keys of a row and what they hold. Values that were not measured are null, never absent."""


@dataclass(kw_only=True)
class Entry:
    """What is known of one timed thing at one shape."""

    label: str
    kind: str
    call: Callable[..., torch.Tensor] | None = None
    context: Callable[[], Any] = nullcontext
    method: AbstractMethod | None = None
    times: dict[str, Timing] = field(default_factory=dict)
    not_timed: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)  # why the gate fails
    stages: dict[str, Timing] | None = None
    peak: int | None = None
    error: ApproximationError | None = None
    kernel: KernelError | None = None

    def fail(self, mode: str, failure: Failure) -> None:
        """Keep why a mode has no time; a call that broke fails the gate too."""
        self.not_timed[mode] = failure.reason
        if self.method is not None and not failure.is_refusal and not mode.endswith("graph"):
            self.reasons.append(f"the call failed: {failure.reason}")

    @property
    def gate(self) -> tuple[bool | None, list[str]]:
        """Whether the accuracy gate is passed (None without a method that was timed), and why not.

        A method that was timed and whose errors were not measured has not passed.
        """
        if self.method is None:
            return None, []
        reasons = list(self.reasons)
        errors = [error for error in (self.kernel, self.error) if error is not None]
        reasons += [error.reason for error in errors if error.reason is not None]
        if self.times and (self.kernel is None or self.error is None) and not reasons:
            reasons.append("the errors were not measured")
        if not self.times and not reasons:
            return None, []
        return not reasons, reasons


def make_row(
    entry: Entry, entries: Sequence[Entry], *, suite: str, shape: Shape, is_causal: bool,
    dtype: torch.dtype, inputs: str, seed: int, backend: str, flush: bool,
    environment: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Return the row of an entry: plain JSON values under `ROW_KEYS`.

    Args:
        entry: what was measured.
        entries: all that was measured at this shape; the exact kernels among them are what a
            speed-up refers to.
        suite: name of the suite.
        shape: the problem.
        is_causal: whether it is causal.
        dtype: of the inputs.
        inputs: kind of inputs.
        seed: of inputs and draws.
        backend: that ran the methods.
        flush: whether the L2 cache was flushed.
        environment: see `describe_environment`.
    """
    passed, reasons = entry.gate
    speed_up: dict[str, float | None] = dict.fromkeys(MODES)
    versus: dict[str, str | None] = dict.fromkeys(MODES)
    for mode in MODES if passed else ():
        exact = {e.label: e.times[mode] for e in entries if e.kind == "exact" and mode in e.times}
        if exact and mode in entry.times:
            best = min(exact, key=lambda label: exact[label].median_ms)
            versus[mode] = best
            speed_up[mode] = exact[best].median_ms / entry.times[mode].median_ms
    stages = entry.stages
    return {
        "suite": suite, "label": entry.label, "kind": entry.kind,
        "spec": None if entry.method is None else entry.method.spec,
        "is_causal": is_causal, "n": shape.length, "batch": shape.batch, "heads": shape.heads,
        "kv_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "dtype": str(dtype).removeprefix("torch."), "inputs": inputs, "seed": seed,
        "backend": None if entry.method is None else backend, "l2_flush": flush,
        **{mode: _dict_of(entry.times.get(mode)) for mode in MODES},
        "stages": None if stages is None else {k: t.as_dict() for k, t in stages.items()},
        "peak_extra_bytes": entry.peak, "tensor_bytes": shape.elements * dtype.itemsize,
        "error": _dict_of(entry.error), "kernel_error": _dict_of(entry.kernel),
        "gate": {"passed": passed, "reasons": reasons},
        "speed_up": speed_up, "versus": versus, "not_timed": entry.not_timed,
        "environment": dict(environment),
        "time": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def _dict_of(found: Timing | ApproximationError | KernelError | None) -> dict[str, Any] | None:
    return None if found is None else dict(found.as_dict())
