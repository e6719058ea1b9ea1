"""Where the time of a call goes: detect, plan, attend, each run and timed by itself.

The stages are made of the functions that `hyperframe.pipeline` is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..attention import HyperAttention
from ..blockplan import BlockPlan
from ..builder import build_level_plans, build_plans
from ..causal import Rectangle, attend_recursively
from ..estimators.uniform import Uniform as UniformEstimator
from ..kernels import attend, attend_all, exact_attention, resolve_backend
from ..kernels.exact import exact_leaves
from ..masks import HeavyMask
from ..pipeline import DEFAULT_LEAF
from ..plan import TilePlan
from ..randomness import Stream
from ..rectangles import causal_levels, leaf_size
from ..state import AttentionState, empty_state, merge
from .timing import Candidate, Failure, Timing, measure

__all__ = ["STAGES", "time_stages"]

STAGES = ("detect", "plan", "attend", "leaves", "merge")
"""Stages in their order. `attend` is all that follows `plan`; `leaves` (the exact part of the
recursion) and `merge` are parts of it that are also timed by themselves."""

_FUSED = ("triton",)  # backends that merge states inside their kernels

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Plans = Sequence[TilePlan | BlockPlan]


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One attention call: its options and inputs."""

    attention: HyperAttention
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    is_causal: bool

    @property
    def inputs(self) -> Tensors:
        return self.query, self.key, self.value

    @property
    def scale(self) -> float:
        return float(self.query.shape[-1] ** -0.5)

    @property
    def longest_leaf(self) -> int:
        chosen = self.attention.min_seq_len
        return DEFAULT_LEAF if chosen is None else max(1, chosen)

    @property
    def leaf(self) -> int:
        return leaf_size(self.query.shape[2], self.longest_leaf)

    def stream(self) -> Any:
        return Stream.of(self.attention.seed, self.query.device)

    def plans(self, inputs: Tensors, mask: HeavyMask, stream: Any) -> Plans:
        """Estimate, draw and build, as `Pipeline` does for one mask."""
        query, key, value = inputs
        options = {"num_samples": self.attention.num_samples, "generator": stream}
        rule = self.attention.estimator.rule(query, key, mask, scale=self.scale, **options)
        draw = self.attention.sampler.draws_for(mask, query, key, value, **options)
        return build_plans(mask, key_heads=key.shape[1], draw=draw, rule=rule)

    def attend(self, inputs: Tensors, plans: Plans, leaf: int | None = None) -> AttentionState:
        backend = self.attention.backend
        return attend_all(*inputs, plans, scale=self.scale, backend=backend, leaf=leaf)

    def attend_leaves(self) -> AttentionState:
        return exact_leaves(*self.inputs, leaf=self.leaf, scale=self.scale)

    @property
    def is_fused(self) -> bool:
        backend = resolve_backend(
            self.attention.backend, self.query.device, query=self.query, value=self.value
        )
        return backend in _FUSED


class _Stages(Protocol):
    """The stages of a kind of call; each stage takes what the one before returned."""

    def detect(self) -> Any: ...

    def plan(self, found: Any) -> Any: ...

    def attend(self, plans: Any) -> AttentionState: ...

    def merge(self, plans: Any) -> Callable[[], Any] | None: ...


@dataclass(frozen=True)
class _Whole:
    """A problem that has one mask."""

    call: _Call

    def detect(self) -> HeavyMask:
        call = self.call
        strict = call.attention.strict_causal and call.is_causal
        detector = call.attention.detector
        find: Callable[..., HeavyMask] = detector.find_strict if strict else detector.find
        return find(
            call.query, call.key, scale=call.scale, is_causal=call.is_causal,
            generator=call.stream(),
        )  # fmt: skip

    def plan(self, found: HeavyMask) -> Plans:
        return self.call.plans(self.call.inputs, found, self.call.stream())

    def attend(self, plans: Plans) -> AttentionState:
        return self.call.attend(self.call.inputs, plans)

    def merge(self, plans: Plans) -> Callable[[], Any] | None:
        if len(plans) == 1:
            return None
        return _merge_of(self.call, plans)


@dataclass(frozen=True)
class _Levels:
    """A recursion whose levels are found and attended at once."""

    call: _Call

    def detect(self) -> Any:
        call = self.call
        levels = causal_levels(call.query.shape[2], call.leaf)
        return call.attention.detector.find_levels(
            call.query, call.key, leaf=call.leaf, levels=levels, scale=call.scale,
            generator=call.stream(),
        )  # fmt: skip

    def plan(self, found: Any) -> Any:
        call, stream = self.call, self.call.stream()
        sampler, num_samples = call.attention.sampler, call.attention.num_samples

        def draw(rectangles: Any) -> Any:
            return sampler.sample_rectangles(
                *call.inputs, num_samples=num_samples, rectangles=rectangles, generator=stream
            )

        return build_level_plans(found, draw if num_samples else None)

    def attend(self, plans: Plans) -> AttentionState:
        return self.call.attend(self.call.inputs, plans, leaf=self.call.leaf)

    def merge(self, plans: Plans) -> Callable[[], Any] | None:
        return _merge_of(self.call, plans, self.call.attend_leaves())


@dataclass(frozen=True)
class _Rectangles:
    """A recursion that solves one stack of rectangles after another."""

    call: _Call
    parts: list[Rectangle] = field(default_factory=list)

    def _recurse(self, solve: Any, solve_leaf: Any) -> AttentionState:
        return attend_recursively(
            *self.call.inputs, longest_leaf=self.call.longest_leaf, solve=solve,
            solve_leaf=solve_leaf, stacked=not self.call.attention.detector.is_positional,
        )  # fmt: skip

    def _cut(self) -> None:
        def keep(part: Rectangle) -> AttentionState:
            self.parts.append(part)
            return empty_state(part.query, part.value)

        self._recurse(keep, lambda query, key, value: empty_state(query, value))

    def detect(self) -> list[HeavyMask]:
        if not self.parts:
            self._cut()
        attention, stream = self.call.attention, self.call.stream()
        return [
            attention.detector.find_rectangle(
                part.query, part.key, scale=self.call.scale, generator=stream,
                query_start=part.query_start, key_start=part.key_start, first_row=part.first_row,
                earlier_query=part.earlier_query, strict=attention.strict_causal,
            )
            for part in self.parts
        ]  # fmt: skip

    def plan(self, found: list[HeavyMask]) -> list[Plans]:
        stream = self.call.stream()
        return [
            self.call.plans((part.query, part.key, part.value), mask, stream)
            for part, mask in zip(self.parts, found, strict=True)
        ]

    def attend(self, plans: list[Plans]) -> AttentionState:
        left: Iterator[Plans] = iter(plans)

        def solve(part: Rectangle) -> AttentionState:
            return self.call.attend((part.query, part.key, part.value), next(left))

        def solve_leaf(*inputs: torch.Tensor) -> AttentionState:
            return exact_attention(*inputs, scale=self.call.scale, is_causal=True)

        return self._recurse(solve, solve_leaf)

    def merge(self, plans: list[Plans]) -> Callable[[], Any]:
        return lambda: self._recurse(
            lambda part: empty_state(part.query, part.value),
            lambda query, key, value: empty_state(query, value),
        )


def _merge_of(call: _Call, plans: Plans, *states: AttentionState) -> Callable[[], Any] | None:
    if call.is_fused:
        return None
    backend = call.attention.backend
    all_states = [
        *states, *(attend(*call.inputs, plan, scale=call.scale, backend=backend) for plan in plans)
    ]  # fmt: skip
    return lambda: merge(*all_states)


def time_stages(
    attention: HyperAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
    is_causal: bool, seconds: float, flush: bool = False, repeats: int | None = None,
) -> dict[str, Timing | Failure]:  # fmt: skip
    """Time the stages of a forward.

    Args:
        attention: the options, with the backend and the seed to use.
        query: `[batch, heads, n, d]`.
        key: `[batch, kv_heads, n, d]`.
        value: `[batch, kv_heads, n, d_v]`.
        is_causal: whether the call is causal.
        seconds: for each stage.
        flush: see `measure`.
        repeats: see `measure`.

    Returns:
        A time for every one of `STAGES` that such a call has.
    """
    call = _Call(attention=attention, query=query, key=key, value=value, is_causal=is_causal)
    with torch.no_grad():
        stages, found, plans = _first_run(call)
        runs: dict[str, Callable[[], Any] | None] = {
            "detect": stages.detect,
            "plan": lambda: stages.plan(found),
            "attend": lambda: stages.attend(plans),
            "leaves": None if isinstance(stages, _Whole) else call.attend_leaves,
            "merge": stages.merge(plans),
        }
        candidates = {name: Candidate(run) for name, run in runs.items() if run is not None}
        return measure(
            candidates, device=query.device, seconds=seconds, flush=flush, repeats=repeats
        )


def _first_run(call: _Call) -> tuple[_Stages, Any, Any]:
    """Choose the kind of call, as `Pipeline` does, and what its stages hand to one another."""
    attention = call.attention
    stages: _Stages = _Whole(call)
    if call.is_causal and attention.causal == "recursive":
        has_own_sums = type(attention.estimator).rule is not UniformEstimator.rule
        if not attention.strict_causal and not has_own_sums:
            stages = _Levels(call)
            found = stages.detect()
            plans = None if found is None else stages.plan(found)
            if plans is not None:
                return stages, found, plans
        stages = _Rectangles(call)
    found = stages.detect()
    return stages, found, stages.plan(found)
