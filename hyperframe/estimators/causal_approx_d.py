"""Algorithm 4 for row sums alone: recursion over the causal matrix, with a record of its calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..component import check_non_negative_int, check_positive_int
from ..detectors import AbstractDetector
from ..detectors import create as create_detector
from ..kernels import exact_attention
from ..masks import HeavyMask
from ..randomness import check_generator
from ..rectangles import Places, leaf_size
from ..rowsums import RowSums
from ..state import AttentionState, merge
from ..validation import check_inputs, check_scale
from . import create as create_estimator
from .base import AbstractEstimator

__all__ = ["RectangleRecord", "RecursionRecord", "causal_approx_d"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RectangleRecord:
    """One call of the unmasked algorithm, on queries that come after all of their keys.

    Attributes:
        places: `(query_start, query_stop, key_start, key_stop)`, rows and keys of the call.
        depth: how many splits lie above it: 0 for the whole matrix.
        alpha: `[batch, query_heads]`, or None if it was not asked for.
        kappa: `[batch, query_heads]`, or None if it was not asked for.
    """

    places: Places
    depth: int
    alpha: torch.Tensor | None = None
    kappa: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class RecursionRecord:
    """What a recursion did.

    Attributes:
        depth: splits on the way from the whole matrix to the deepest leaf.
        leaves: `(start, stop)` of the causal leaves on the diagonal, by rows, in their order.
        rectangles: the calls of the unmasked algorithm, in the order in which they were made.
    """

    depth: int
    leaves: tuple[tuple[int, int], ...]
    rectangles: tuple[RectangleRecord, ...]

    @property
    def num_calls(self) -> int:
        """Number of calls of the unmasked algorithm."""
        return len(self.rectangles)


def causal_approx_d(
    query: torch.Tensor, key: torch.Tensor, *, detector: str | AbstractDetector = "sort_lsh",
    estimator: str | AbstractEstimator = "approx_d", num_samples: int = 256,
    longest_leaf: int = 2048, scale: float | None = None,
    generator: torch.Generator | None = None, alpha: Callable[..., torch.Tensor] | None = None,
    kappa: Callable[..., torch.Tensor] | None = None,
) -> tuple[RowSums, RecursionRecord]:  # fmt: skip
    """Estimate the row sums of `A` under the causal mask by recursion.

    The causal matrix is two causal halves, solved likewise, and one rectangle below the diagonal
    without a mask, whose row sums Algorithm 2 estimates and which add to those of the later half.
    Leaves are exact. Rows see keys up to their own position, bottom-right aligned: keys before the
    first query are one more rectangle, rows before the first key have no keys.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        detector: finds the heavy entries of a rectangle: a name, a spec string, or an instance.
        estimator: of the row sums of a rectangle; the same three forms.
        num_samples: columns sampled for each rectangle.
        longest_leaf: rows of a leaf at most (4,096 in the paper).
        scale: factor of the logits; None is `1 / sqrt(d)`.
        generator: source of the draws, of detectors and estimators in turn.
        alpha: called as `alpha(query, key, scale=...)` with each rectangle's own queries and keys;
            what it returns is kept in the record.
        kappa: likewise, called as `kappa(query, key, mask, scale=...)`.

    Returns:
        The row sums, `log_sum` `[batch, query_heads, n_q]` and `-inf` for a row without keys; and
        the record.

    Cost: O(n (b + m) d log(n / longest_leaf) + n longest_leaf d) for b heavy keys a row. Random.
    Differentiable in query and key.
    Source: HyperAttention, Algorithm 4. Departure: all leaves but the last are equally long, as in
    the recursion of the attention, where Algorithm 4 halves; for a power of two it is the same.

    Example:
        >>> q = k = torch.zeros(1, 1, 6, 2)
        >>> sums, record = causal_approx_d(q, k, longest_leaf=2, num_samples=4)
        >>> sums.log_sum.exp().round().tolist(), record.depth, record.num_calls
        ([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]], 2, 2)
    """
    check_inputs(query, key, key)
    check_non_negative_int("causal_approx_d", "num_samples", num_samples)
    check_positive_int("causal_approx_d", "longest_leaf", longest_leaf)
    check_generator(generator)
    run = _Recursion(
        query=query, key=key, detector=create_detector(detector),
        estimator=create_estimator(estimator), num_samples=num_samples,
        scale=check_scale(scale, query.shape[-1]), generator=generator, alpha=alpha, kappa=kappa,
        offset=key.shape[2] - query.shape[2],
        leaf=leaf_size(min(query.shape[2], key.shape[2]), longest_leaf), leaves=[], rectangles=[],
    )  # fmt: skip
    num_queries, num_keys = query.shape[2], key.shape[2]
    first = max(0, num_queries - num_keys)
    log_sum, depth = run.square(first, num_queries, 0)
    if num_keys > num_queries:
        log_sum = _add(log_sum, run.rectangle((0, num_queries, 0, num_keys - num_queries), 0))
    log_sum = torch.nn.functional.pad(log_sum, (first, 0), value=float("-inf"))
    record = RecursionRecord(
        depth=depth, leaves=tuple(run.leaves), rectangles=tuple(run.rectangles)
    )
    return RowSums(log_sum=log_sum), record


@dataclass(frozen=True, kw_only=True, eq=False)
class _Recursion:
    """Arguments of a recursion, and what it has done so far."""

    query: torch.Tensor
    key: torch.Tensor
    detector: AbstractDetector
    estimator: AbstractEstimator
    num_samples: int
    scale: float
    generator: Any
    alpha: Callable[..., torch.Tensor] | None
    kappa: Callable[..., torch.Tensor] | None
    offset: int  # key position of query row 0
    leaf: int
    leaves: list[tuple[int, int]]
    rectangles: list[RectangleRecord]

    def square(self, start: int, stop: int, depth: int) -> tuple[torch.Tensor, int]:
        """Return the log row sums of rows against the keys at their own positions, and the depth.

        Algorithm 4, line by line: two halves, a rectangle, a sum.
        """
        if stop - start <= self.leaf:
            return self.exact(start, stop), depth
        half = self.leaf
        while 2 * half < stop - start:
            half *= 2
        middle = start + half
        earlier, depth_before = self.square(start, middle, depth + 1)
        later, depth_after = self.square(middle, stop, depth + 1)
        places = (middle, stop, start + self.offset, middle + self.offset)
        later = _add(later, self.rectangle(places, depth))
        return torch.cat([earlier, later], dim=-1), max(depth_before, depth_after)

    def exact(self, start: int, stop: int) -> torch.Tensor:
        """Return the log row sums of a causal leaf."""
        self.leaves.append((start, stop))
        key = self.key[:, :, start + self.offset : stop + self.offset]
        return exact_attention(
            self.query[:, :, start:stop], key, self.no_values(key.shape[2]), scale=self.scale,
            is_causal=True,
        ).lse  # fmt: skip

    def rectangle(self, places: Places, depth: int) -> torch.Tensor:
        """Return the log row sums of a rectangle by the unmasked algorithm."""
        query, key = self.query[:, :, places[0] : places[1]], self.key[:, :, places[2] : places[3]]
        with torch.no_grad():
            mask = self.detector.find_rectangle(
                query, key, scale=self.scale, generator=self.generator,
                query_start=places[0] + self.offset, key_start=places[2], first_row=places[0],
                earlier_query=self.earlier_query(places),
            )  # fmt: skip
            self.rectangles.append(
                RectangleRecord(
                    places=places,
                    depth=depth,
                    alpha=self.measured(self.alpha, query, key),
                    kappa=self.measured(self.kappa, query, key, mask),
                )
            )
        return self.estimator.row_sums(
            query, key, mask, scale=self.scale, num_samples=self.num_samples,
            generator=self.generator,
        ).log_sum  # fmt: skip

    def measured(
        self, measure: Callable[..., torch.Tensor] | None, *parts: torch.Tensor | HeavyMask
    ) -> torch.Tensor | None:
        """Return what is to be measured of a rectangle, if anything."""
        return None if measure is None else measure(*parts, scale=self.scale)

    def earlier_query(self, places: Places) -> torch.Tensor | None:
        """Return the queries at the positions of a rectangle's keys; None if there are none."""
        first, last = places[2] - self.offset, places[3] - self.offset
        return self.query[:, :, first:last] if first >= 0 else None

    def no_values(self, length: int) -> torch.Tensor:
        """Return values for as many keys: the row sums need none."""
        return self.key.new_zeros((*self.key.shape[:2], length, 1))


def _add(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Return `log(exp(one) + exp(two))`, with a gradient also where both are `-inf`."""
    nothing = one.new_zeros((*one.shape, 0))
    return merge(AttentionState(nothing, one), AttentionState(nothing, two)).lse
