"""One attention call, from tensors to a state: choose, plan, attend, merge.

`HyperAttention` checks what it is given and hands it to a `Pipeline`; everything that depends on
lengths, causality and padding is decided here.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .assembly import product_plan, renormalised
from .blockplan import BlockPlan
from .builder import build_level_plans, build_plans
from .causal import Rectangle, attend_recursively
from .detectors import AbstractDetector
from .errors import UnsupportedError
from .estimators import AbstractEstimator
from .estimators.uniform import Uniform as UniformEstimator
from .kernels import attend_all, exact_attention, resolve_backend, visible_keys
from .kernels.exact import exact_output
from .masks import HeavyMask
from .padding import Part, Place
from .plan import TilePlan
from .rectangles import Level, Places
from .rowsums import RowSumRule
from .samplers import AbstractSampler
from .samplers.uniform import Uniform as UniformSampler
from .samples import KeySample, SampleDraw
from .state import AttentionState
from .trace import Solved, active_trace

__all__ = ["BREAK_EVEN", "DEFAULT_LEAF", "Pipeline"]

_LOGGER = logging.getLogger(__name__)

BREAK_EVEN = {
    ("cpu", "torch", False): 2047,
    ("cpu", "torch", True): 8191,
    ("cuda", "torch", False): 65535,
    ("cuda", "torch", True): 262143,
    ("cuda", "triton", False): 16383,
    ("cuda", "triton", True): 32767,
}
"""Keys up to which exact attention is the faster one, by (device, backend, is_causal).

What `min_seq_len=None` means for a whole call. Those of the torch backend are from
`benchmarks/crossover.py` (the causal one on a GPU lies beyond the measured lengths), those of the
Triton backend from `hyperframe bench --suite short`, for calls that launch one by one; measured
with `sort_lsh` (a detector may have a `break_even` of its own). Captured in
a CUDA graph they win from 2,048 and 8,192 keys on (`min_seq_len=0`).
"""

DEFAULT_LEAF = 2048
"""Longest leaf of the causal recursion when `min_seq_len=None`."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """One attention call: components and options as in `HyperAttention`, scale and generator.

    Attributes:
        need_lse: whether the caller wants the log normaliser; exact attention is cheaper without.
    """

    detector: AbstractDetector
    sampler: AbstractSampler
    estimator: AbstractEstimator
    num_samples: int
    causal: str
    strict_causal: bool
    assembly: str
    min_seq_len: int | None
    backend: str
    scale: float
    generator: Any  # a torch.Generator or a Stream; see `takes_stream` of the components
    need_lse: bool

    def is_exact(self, part: Part) -> bool:
        """Whether a part is answered by exact attention."""
        limit, num_keys = self.min_seq_len, part.key.shape[2]
        if limit is None:
            device = part.query.device.type
            backend = resolve_backend(
                self.backend, part.query.device, query=part.query, value=part.value
            )
            case = (device, backend, part.is_causal)
            limit = self.detector.break_even.get(case, BREAK_EVEN.get(case, 0))
            if num_keys <= limit and not torch.compiler.is_compiling():
                _log_exact(device, part.is_causal, limit)
        num_queries = part.query.shape[2]
        if part.place is not None and self.detector.is_positional:
            # where the rows of a call go by their positions, a single one left by the cut does too
            num_queries = part.place.num_queries
        return num_queries == 1 or num_keys <= limit

    @property
    def longest_leaf(self) -> int:
        """Longest exact leaf of the recursion."""
        chosen = self.min_seq_len
        return DEFAULT_LEAF if chosen is None else max(1, chosen)

    def solve(self, part: Part) -> AttentionState:
        """Attend without padding."""
        place = part.place
        query, key, value, is_causal = part.query, part.key, part.value, part.is_causal
        trace = active_trace()
        if self.is_exact(part):
            if trace is not None:
                trace.exact_calls += 1
            return self._exact(query, key, value, is_causal)
        if trace is not None:
            trace.approximate_calls += 1
        if place is not None:
            self._check_contiguous(place)
        if place is not None and place.is_rectangle:
            rectangle = Rectangle(
                query=query, key=key, value=value, earlier_query=part.earlier_query,
                query_start=place.query_start, key_start=place.key_start,
                first_row=place.first_row,
            )  # fmt: skip
            return self._solve_rectangle(rectangle, first_key=place.key_start)
        if is_causal and self.causal == "recursive":
            first_key = 0 if place is None else place.key_start
            return attend_recursively(
                query, key, value, longest_leaf=self.longest_leaf,
                solve=functools.partial(self._solve_rectangle, first_key=first_key),
                solve_leaf=lambda q, k, v: self._exact(q, k, v, True, need_lse=True),
                solve_square=self._solve_square, stacked=not self.detector.is_positional,
                skipped=0 if place is None else place.first_row, key_start=first_key,
            )  # fmt: skip
        strict = self.strict_causal and is_causal
        find = self.detector.find_strict if strict else self.detector.find
        if place is not None:
            find = functools.partial(
                self.detector.find_within, strict=strict, query_start=place.query_start,
                key_start=place.key_start, first_row=place.first_row,
                num_queries=place.num_queries, num_keys=place.num_keys,
            )  # fmt: skip
        with torch.no_grad():
            mask = find(query, key, scale=self.scale, is_causal=is_causal, generator=self.generator)
        return self._attend(query, key, value, mask)

    def _check_contiguous(self, place: Place) -> None:
        detector = self.detector
        if detector.is_positional and not place.is_contiguous:
            raise UnsupportedError(
                f"key_padding_mask: the detector {detector.name} goes by positions and cannot work "
                "with padding between real keys; pad at the ends only, so that the real keys of "
                "every batch item are contiguous, or use a detector that is not positional, such "
                "as heavy_columns"
            )

    def _exact(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool,
        need_lse: bool | None = None,
    ) -> AttentionState:  # fmt: skip
        self._count_exact(query.shape, key.shape[2], is_causal)
        if self.need_lse if need_lse is None else need_lse:
            return exact_attention(query, key, value, scale=self.scale, is_causal=is_causal)
        out = exact_output(query, key, value, scale=self.scale, is_causal=is_causal)
        return AttentionState(out=out, lse=out.new_empty(0))

    def _solve_rectangle(self, part: Rectangle, *, first_key: int = 0) -> AttentionState:
        with torch.no_grad():
            mask = self.detector.find_rectangle(
                part.query, part.key, scale=self.scale, generator=self.generator,
                query_start=part.query_start, key_start=part.key_start, first_row=part.first_row,
                first_key=first_key, earlier_query=part.earlier_query,
                strict=self.strict_causal,
            )  # fmt: skip
        state = self._attend(part.query, part.key, part.value, mask)
        trace = active_trace()
        if trace is not None and trace.on_solved is not None:
            solved = Solved(
                query=part.query, key=part.key, value=part.value, mask=mask, state=state,
                first_row=part.first_row, first_key=part.key_start,
            )  # fmt: skip
            trace.on_solved(solved)
        return state

    def _solve_square(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, leaf: int,
        levels: Sequence[Level],
    ) -> AttentionState | None:  # fmt: skip
        """Attend in all leaves and rectangles of the recursion at once, if all parts allow it.

        The detector has to find all levels at once, the sampler to draw for all of them at once,
        and the row sums have to be those of the plans.
        """
        sampler = self.sampler
        if self.assembly != "residual" or (self.num_samples and sampler.needs_mask):
            return None
        if self.strict_causal or type(self.estimator).rule is not UniformEstimator.rule:
            return None
        # asked first: a detector that found the levels in vain would have taken draws
        own_draw = type(sampler).sample_rectangles is not AbstractSampler.sample_rectangles
        if self.num_samples and not (own_draw or isinstance(sampler, UniformSampler)):
            return None

        def draw(rectangles: tuple[Places, ...]) -> KeySample | None:
            return sampler.sample_rectangles(
                query, key, value, num_samples=self.num_samples, rectangles=rectangles,
                generator=self.generator, scale=self.scale,
            )  # fmt: skip

        with torch.no_grad():
            masks = self.detector.find_levels(
                query, key, leaf=leaf, levels=levels, scale=self.scale, generator=self.generator
            )
            if masks is None:
                return None
            plans = build_level_plans(masks, draw if self.num_samples else None)
        if plans is None:
            return None
        full, rest = query.shape[2] // leaf, query.shape[2] % leaf
        for rows, runs in ((leaf, full), (rest, 1)):
            self._count_exact((*query.shape[:2], rows), rows, True, times=runs)
        self._count(plans, key.shape[1])
        trace = active_trace()
        if trace is not None and trace.on_solved is not None:
            for mask, plan in zip(masks, plans, strict=True):
                state = attend_all(
                    query, key, value, [plan], scale=self.scale, backend=self.backend
                )
                trace.on_solved(
                    Solved(query=query, key=key, value=value, mask=mask, state=state, is_level=True)
                )
        return attend_all(
            query, key, value, plans, scale=self.scale, backend=self.backend, leaf=leaf
        )

    def _count_exact(
        self, query_shape: Sequence[int], num_keys: int, is_causal: bool, times: int = 1
    ) -> None:
        """Tell an open trace of exact attention of `[batch, query_heads, n_q, ...]`."""
        trace = active_trace()
        if trace is not None:
            num_queries = query_shape[2]
            seen = torch.full((num_queries,), num_keys)
            if is_causal:
                seen = (torch.arange(num_queries) + 1 + num_keys - num_queries).clamp(min=0)
            trace.keys += times * int(seen.sum()) * query_shape[0] * query_shape[1]

    def _count(self, plans: Sequence[TilePlan | BlockPlan], key_heads: int) -> None:
        """Tell an open trace of plans."""
        trace = active_trace()
        if trace is not None:
            for plan in plans:
                tiles = plan.to_tile_plan() if isinstance(plan, BlockPlan) else plan
                trace.keys += int(visible_keys(tiles, key_heads=key_heads).sum())

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: HeavyMask
    ) -> AttentionState:
        """Attend by a mask, the sampled rest and the estimator's rule."""
        rule = RowSumRule()
        # columns of the numerator that make the estimate by themselves are not drawn again
        is_own = self.assembly == "residual" and self.estimator.columns == self.sampler
        if not is_own:
            rule = self.estimator.rule(
                query, key, mask, scale=self.scale, num_samples=self.num_samples,
                generator=self.generator,
            )  # fmt: skip
        draw = self.sampler.draws_for(
            mask, query, key, value, num_samples=self.num_samples, generator=self.generator,
            scale=self.scale,
        )  # fmt: skip
        if self.assembly == "paper" and draw is not None:
            return self._assemble(query, key, value, mask, rule, draw)
        plans = build_plans(mask, key_heads=key.shape[1], draw=draw, rule=rule)
        self._count(plans, key.shape[1])
        state = attend_all(query, key, value, plans, scale=self.scale, backend=self.backend)
        return state if rule.log_sum is None else renormalised(state, rule.log_sum)

    def _assemble(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: HeavyMask,
        rule: RowSumRule, draw: SampleDraw,
    ) -> AttentionState:  # fmt: skip
        """Attend as Algorithm 3 does: row sums and product, each by columns of its own."""
        log_sum, plans = rule.log_sum, []
        if log_sum is None:
            columns = UniformSampler().draws(
                query, key, value, num_samples=self.num_samples, generator=self.generator
            )
            plans = build_plans(mask, key_heads=key.shape[1], draw=columns, rule=rule)
            nothing = value.new_zeros((*value.shape[:3], 1))  # row sums need no values
            log_sum = attend_all(
                query, key, nothing, plans, scale=self.scale, backend=self.backend
            ).lse
        product = product_plan(mask, draw, sampler=self.sampler.name)
        self._count([*plans, product], key.shape[1])
        state = attend_all(query, key, value, [product], scale=self.scale, backend=self.backend)
        return renormalised(state, log_sum)


@functools.cache
def _log_exact(device_type: str, is_causal: bool, limit: int) -> None:
    """Say once for every kind of call that the default chose exact attention."""
    _LOGGER.info(
        "min_seq_len=None: exact attention runs up to %d keys on %s with is_causal=%s, where it "
        "was measured to be faster; min_seq_len=0 never falls back", limit, device_type, is_causal,
    )  # fmt: skip
