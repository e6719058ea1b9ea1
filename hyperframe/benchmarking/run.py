"""Running a suite: every shape, exact kernels and methods in turn, one row for each of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import HyperframeError, UnsupportedError
from ..kernels import resolve_backend
from .accuracy import KernelError, kernel_error, sampled_error
from .baselines import exact_candidates, flex_candidate
from .environment import describe_environment
from .inputs import ERROR_BOUNDS, Shape, make_inputs
from .methods import AbstractMethod, SpecMethod
from .rows import Entry, make_row
from .settings import Settings
from .stages import time_stages
from .suites import Suite
from .timing import Candidate, Failure, Timing, capture, measure, peak_bytes

__all__ = ["run_suite"]


def run_suite(suite: Suite, settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure, and yield a row (see `ROW_KEYS`) for everything timed at every shape.

    Args:
        suite: what to measure.
        settings: how.

    Raises:
        BackendUnavailableError: the backend cannot run on the device.
        ArgumentError: a spec that does not fit the shapes.
    """
    device = settings.device
    resolve_backend(settings.backend, device)  # refuses before anything is measured
    environment = describe_environment(device)
    inputs = settings.inputs or suite.inputs
    checked: dict[Any, KernelError] = {}
    lengths = settings.lengths
    if lengths is None:
        lengths = suite.lengths if device.type == "cuda" else suite.cpu_lengths
    for head_dim in settings.head_dims or suite.head_dims:
        for length in lengths:
            shape = Shape(
                batch=settings.batch, heads=settings.heads,
                kv_heads=settings.kv_heads or settings.heads, length=length, head_dim=head_dim,
            )  # fmt: skip
            for is_causal in (False, True):
                methods = tuple(m for m in suite.methods if m.is_causal == is_causal)
                if not methods:
                    continue
                group = _Group(
                    suite=suite, settings=settings, shape=shape, is_causal=is_causal,
                    inputs=inputs, checked=checked,
                )  # fmt: skip
                entries = group.measure(methods)
                for entry in entries:
                    yield make_row(
                        entry, entries, suite=suite.name, shape=shape, is_causal=is_causal,
                        dtype=settings.dtype, inputs=inputs, seed=settings.seed,
                        backend=group.backend, flush=settings.flush, environment=environment,
                    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    """One shape and causality: everything that is timed in turn, on the same inputs."""

    suite: Suite
    settings: Settings
    shape: Shape
    is_causal: bool
    inputs: str
    checked: dict[Any, KernelError] = field(repr=False)  # kernel errors of earlier shapes

    @functools.cached_property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        settings = self.settings
        return make_inputs(
            self.inputs, self.shape, dtype=settings.dtype, device=settings.device,
            seed=settings.seed,
        )  # fmt: skip

    @property
    def has_backward(self) -> bool:
        return self.suite.backward and not self.settings.forward_only

    @property
    def backend(self) -> str:
        """The backend that takes these inputs; the one asked for if none does."""
        query, _, value = self.tensors
        try:
            return resolve_backend(self.settings.backend, query.device, query=query, value=value)
        except UnsupportedError:
            return self.settings.backend

    @functools.cached_property
    def grad(self) -> torch.Tensor:
        query = self.tensors[0]
        generator = torch.Generator(device=query.device).manual_seed(self.settings.seed)
        return torch.randn(query.shape, generator=generator, device=query.device, dtype=query.dtype)

    def measure(self, methods: tuple[AbstractMethod, ...]) -> list[Entry]:
        """Time and examine exact kernels, methods and their fixed masks."""
        entries = [*self._exact(), *map(self._method, methods), *self._flex(methods)]
        timed = [entry for entry in entries if entry.call is not None]
        with torch.no_grad():
            self._time("forward", timed)
            for entry in timed:
                if "forward" in entry.times:
                    self._examine(entry)
        if self.has_backward:
            self._time("forward_backward", [entry for entry in timed if entry.times])
        return entries

    # -- what is timed ------------------------------------------------------------------------

    def _exact(self) -> Iterator[Entry]:
        longest = self.suite.longest_exact
        if longest is not None and self.shape.length > longest:
            why = f"exact kernels are timed up to n = {longest} in this suite"
            yield Entry(label="exact", kind="exact", not_timed={"all": why})
            return
        found = exact_candidates(
            self.shape, is_causal=self.is_causal, dtype=self.settings.dtype,
            device=self.settings.device,
        )  # fmt: skip
        for label, candidate in found.items():
            if isinstance(candidate, Failure):
                yield Entry(label=label, kind="exact", not_timed={"all": candidate.reason})
            else:
                yield Entry(label=label, kind="exact", call=candidate[0], context=candidate[1])

    def _method(self, method: AbstractMethod) -> Entry:
        entry = Entry(label=method.label, kind="approximate", method=method)
        if method.is_exact_at(self.shape.length):
            entry.not_timed["all"] = "min_seq_len has exact attention answer this length"
        else:
            query, key, _ = self.tensors
            backend, seed = self.settings.backend, self.settings.seed
            entry.call = method.prepare(query, key, backend=backend, seed=seed)
        return entry

    def _flex(self, methods: tuple[AbstractMethod, ...]) -> Iterator[Entry]:
        for method in methods:
            if not isinstance(method, SpecMethod):
                continue
            found = flex_candidate(
                method.attention.detector, self.shape, is_causal=self.is_causal,
                device=self.settings.device,
            )  # fmt: skip
            label = f"flex: {method.label}"
            if isinstance(found, Failure):
                yield Entry(label=label, kind="masked", not_timed={"all": found.reason})
            else:
                yield Entry(label=label, kind="masked", call=found)

    # -- timing -------------------------------------------------------------------------------

    def _candidate(self, entry: Entry, mode: str, **options: Any) -> Candidate:
        call = entry.call
        assert call is not None
        if mode == "forward":
            tensors = self.tensors
            return Candidate(lambda: call(*tensors, **options), entry.context)
        leaves = [tensor.detach().requires_grad_() for tensor in self.tensors]
        grad = self.grad
        return Candidate(
            lambda: torch.autograd.grad(call(*leaves, **options), leaves, grad), entry.context
        )

    def _time(self, mode: str, timed: list[Entry]) -> None:
        self._store(mode, timed, {e.label: self._candidate(e, mode) for e in timed})
        graphs = self.suite.graphs if self.settings.graphs is None else self.settings.graphs
        if not graphs:
            return
        device = self.settings.device
        replays = {}
        for entry in timed:
            if device.type != "cuda":
                entry.not_timed[f"{mode}_graph"] = "CUDA graphs need a CUDA device"
            elif mode in entry.times:
                options = {}
                if isinstance(entry.method, SpecMethod):
                    # read when the graph runs, so that every replay could draw anew
                    options["generator"] = torch.tensor(self.settings.seed, device=device)
                try:
                    replays[entry.label] = capture(self._candidate(entry, mode, **options))
                except Exception as error:
                    entry.fail(f"{mode}_graph", Failure.of(error))
        self._store(f"{mode}_graph", timed, replays)

    def _store(self, mode: str, timed: list[Entry], candidates: Mapping[str, Candidate]) -> None:
        settings = self.settings
        results = measure(
            candidates, device=settings.device, seconds=settings.seconds, flush=settings.flush
        )
        for entry in timed:
            result = results.get(entry.label)
            if isinstance(result, Timing):
                entry.times[mode] = result
            elif isinstance(result, Failure):
                entry.fail(mode, result)

    # -- what stands beside the times ---------------------------------------------------------

    def _examine(self, entry: Entry) -> None:
        """Measure errors, memory and stages of what was timed."""
        settings = self.settings
        forward = self._candidate(entry, "forward")
        entry.peak = peak_bytes(forward, settings.device)
        bound = None
        if entry.method is not None:
            bound = settings.max_error
            bound = ERROR_BOUNDS[self.inputs] if bound is None else bound
            try:
                entry.kernel = self._kernel_error(entry.method)
            except Exception as error:
                if isinstance(error, HyperframeError) and not isinstance(error, UnsupportedError):
                    raise
                entry.reasons.append(f"the kernels were not checked: {Failure.of(error).reason}")
        entry.error = sampled_error(
            *self.tensors, forward(), is_causal=self.is_causal, seed=settings.seed, bound=bound
        )
        has_stages = self.suite.stages if settings.stages is None else settings.stages
        if has_stages and isinstance(entry.method, SpecMethod):
            self._time_stages(entry, entry.method)

    def _kernel_error(self, method: AbstractMethod) -> KernelError:
        # beyond the length of the check, the same problem is checked for all lengths
        length = min(self.shape.length, method.gate_length)
        case = (method, self.shape.head_dim, length)
        if case not in self.checked:
            settings = self.settings
            self.checked[case] = kernel_error(
                method, self.shape, inputs=self.inputs, dtype=settings.dtype,
                device=settings.device, backend=settings.backend, seed=settings.seed,
                backward=self.has_backward,
            )  # fmt: skip
        return self.checked[case]

    def _time_stages(self, entry: Entry, method: SpecMethod) -> None:
        settings = self.settings
        attention = method.attention.replace(backend=settings.backend, seed=settings.seed)
        try:
            found = time_stages(
                attention, *self.tensors, is_causal=self.is_causal, seconds=settings.seconds,
                flush=settings.flush,
            )  # fmt: skip
        except Exception as error:
            entry.not_timed["stages"] = Failure.of(error).reason
            return
        entry.stages = {name: time for name, time in found.items() if isinstance(time, Timing)}
        entry.not_timed |= {
            f"stages.{name}": time.reason
            for name, time in found.items()
            if isinstance(time, Failure)
        }
