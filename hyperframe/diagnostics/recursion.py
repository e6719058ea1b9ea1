"""What the causal recursion of an attention does: every rectangle, measured by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..attention import HyperAttention
from ..errors import ArgumentError, ArgumentTypeError
from ..masks import BlockMask, HeavyMask
from ..pipeline import DEFAULT_LEAF
from ..rectangles import Places, leaf_size
from ..trace import Solved, tracing
from ..validation import check_scale
from .columns import column_squares
from .errors import relative_error
from .quality import row_masses
from .rows import log_ratio, unmasked_log_sums
from .scores import Scores

__all__ = ["RectangleReport", "RecursionReport", "recursion_report"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RectangleReport:
    """One call of the unmasked algorithm, on queries that come after all of their keys.

    The measures are `[batch, query_heads]`, of the rectangle's own softmax.

    Attributes:
        places: `(query_start, query_stop, key_start, key_stop)`, rows and keys of the call.
        depth: how many splits lie above it: 0 for the whole matrix.
        alpha: as `diagnostics.alpha`.
        kappa: as `diagnostics.kappa`, of what the mask leaves; `inf` from about 1e308 on.
        centred_kappa: the same after the mean key is subtracted.
        mass: softmax mass that the mask holds, mean over rows.
        error: relative Frobenius error of the rectangle's output.
        weight: the rectangle's share of its rows' normalisers, mean over rows: how much of its
            error the output sees.
    """

    places: Places
    depth: int
    alpha: torch.Tensor
    kappa: torch.Tensor
    centred_kappa: torch.Tensor
    mass: torch.Tensor
    error: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class RecursionReport:
    """What a recursion did; see `recursion_report`.

    Attributes:
        depth: splits on the way from the whole matrix to the deepest leaf.
        leaves: `(start, stop)` of the causal leaves on the diagonal, by rows, in their order.
        rectangles: by depth, the whole matrix first, then by rows.
        out: `[batch, query_heads, n_q, d_v]`, the output of the attention.
    """

    depth: int
    leaves: tuple[tuple[int, int], ...]
    rectangles: tuple[RectangleReport, ...]
    out: torch.Tensor

    @property
    def num_calls(self) -> int:
        """Number of calls of the unmasked algorithm."""
        return len(self.rectangles)


def recursion_report(
    attention: HyperAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
    scale: float | None = None, generator: Any = None,
) -> RecursionReport:  # fmt: skip
    """Attend once, causally and by recursion, and measure every rectangle of it (Algorithm 4).

    What is measured is that very call: its masks, its samples, its outputs. Theorem 1 and Lemma 1
    speak of rectangles, which have no mask of their own, so alpha and kappa belong to each of them.

    Args:
        attention: with `causal="recursive"`.
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        value: `[batch, key_heads, n_k, d_v]`.
        scale: factor of the logits; None is `1 / sqrt(d)`.
        generator: as in a call of the attention.

    Returns:
        The report; a call that exact attention answers has one leaf and no rectangles.

    Raises:
        ArgumentError: an attention that does not recurse.
        ArgumentTypeError: something else than a `HyperAttention`.

    Cost: the call; five passes over the logits of every rectangle, O(n^2 d) in all, memory linear
    in n. Deterministic. No gradient.
    Source: HyperAttention, Algorithm 4; its row sums alone are `estimators.causal_approx_d`.

    Example:
        >>> q = k = v = torch.randn(1, 1, 8, 2)
        >>> attention = HyperAttention(
        ...     detector="sort_lsh(block_size=1)", causal="recursive", min_seq_len=2, num_samples=1)
        >>> report = recursion_report(attention, q, k, v)
        >>> report.depth, [one.places for one in report.rectangles]
        (2, [(4, 8, 0, 4), (2, 4, 0, 2), (6, 8, 4, 6)])
    """
    if not isinstance(attention, HyperAttention):
        raise ArgumentTypeError(
            f"attention: expected a HyperAttention, got {type(attention).__name__}; make one with "
            "HyperAttention(causal='recursive', ...)"
        )
    if attention.causal != "recursive":
        raise ArgumentError(
            f"attention: has causal={attention.causal!r}, which makes no rectangles; pass "
            "attention.replace(causal='recursive')"
        )
    seen: list[Solved] = []
    with torch.no_grad(), tracing(seen.append) as trace:
        out, total = attention(
            query, key, value, is_causal=True, scale=scale, return_lse=True, generator=generator
        )
    num_queries, num_keys = query.shape[2], key.shape[2]
    first = max(0, num_queries - num_keys)
    if trace.approximate_calls == 0:
        leaves = ((first, num_queries),)
        return RecursionReport(depth=0, leaves=leaves, rectangles=(), out=out)
    chosen = attention.min_seq_len
    longest = DEFAULT_LEAF if chosen is None else max(1, chosen)
    leaf = leaf_size(num_queries - first, longest)
    starts = range(first, num_queries, leaf)
    depth = (len(starts) - 1).bit_length()
    scale = check_scale(scale, query.shape[-1])
    found = []
    for solved in seen:
        for places, part in _rectangles(solved, query, num_keys):
            # the keys before all rows are a rectangle beside the square
            is_before = places[3] <= num_keys - num_queries
            above = 0 if is_before else _splits_above(places[0], first, num_queries, leaf)
            rows = total[:, :, places[0] : places[1]]
            found.append(_measure(part, rows, scale=scale, places=places, depth=above))
    found.sort(key=lambda one: (one.depth, one.places))
    return RecursionReport(
        depth=depth, leaves=tuple((start, min(start + leaf, num_queries)) for start in starts),
        rectangles=tuple(found), out=out,
    )  # fmt: skip


def _splits_above(row: int, start: int, stop: int, leaf: int) -> int:
    """Return how many splits lie above the one of `[start, stop)` that begins its half at a row."""
    above = 0
    while True:
        half = leaf
        while 2 * half < stop - start:
            half *= 2
        middle = start + half
        if row == middle:
            return above
        start, stop = (start, middle) if row < middle else (middle, stop)
        above += 1


def _rectangles(
    solved: Solved, query: torch.Tensor, num_keys: int
) -> Iterator[tuple[Places, Solved]]:
    """Yield the single rectangles of a stack or a level, with rows and keys of the call."""
    if solved.is_level:
        mask = solved.mask
        if not isinstance(mask, BlockMask):  # `find_levels` returns nothing else
            raise TypeError(type(mask).__name__)
        first_row = max(0, query.shape[2] - num_keys)
        first_key = max(0, num_keys - query.shape[2])
        for start, stop, begin, end in mask.rectangles:
            part = Solved(
                query=solved.query[:, :, start:stop], key=solved.key[:, :, begin:end],
                value=solved.value[:, :, begin:end],
                mask=_of_rectangle(mask, (start, stop, begin, end)),
                state=type(solved.state)(*(x[:, :, start:stop] for x in solved.state)),
            )  # fmt: skip
            yield (
                start + first_row, stop + first_row, begin + first_key, end + first_key
            ), part  # fmt: skip
        return
    count = solved.query.shape[0] // query.shape[0]
    rows, keys = solved.query.shape[2], solved.key.shape[2]
    for number in range(count):
        row, key = (x + 2 * keys * number for x in (solved.first_row, solved.first_key))
        own = torch.arange(number, solved.query.shape[0], count, device=query.device)
        part = Solved(
            query=solved.query[own], key=solved.key[own], value=solved.value[own],
            mask=_OfBatch(
                batch_size=len(own), num_query_heads=query.shape[1], num_queries=rows,
                num_keys=keys, whole=solved.mask, own=own,
            ),
            state=type(solved.state)(*(x[own] for x in solved.state)),
        )  # fmt: skip
        yield (row, row + rows, key, key + keys), part


@dataclass(frozen=True, kw_only=True, eq=False)
class _OfBatch(HeavyMask):
    """Some batch items of a mask."""

    whole: HeavyMask
    own: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.whole.device

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        return self.whole.rows(start, stop)[self.own]


def _of_rectangle(mask: BlockMask, places: Places) -> BlockMask:
    """Return one rectangle of a mask whose orders move rows and keys only inside of each."""
    start, stop, begin, end = places
    return replace(
        mask, num_queries=stop - start, num_keys=end - begin, query_offset=None, key_rank=None,
        query_order=mask.query_order[..., start:stop] - start,
        key_order=mask.key_order[..., begin:end] - begin,
        rectangles=((0, stop - start, 0, end - begin),),
    )  # fmt: skip


def _measure(
    part: Solved, total: torch.Tensor, *, scale: float, places: Places, depth: int
) -> RectangleReport:
    """Measure one rectangle; `total` is the log normaliser of its rows in the whole call."""
    scores = Scores.under(part.mask, part.query, part.key, scale=scale, dtype=None)
    kappas = (
        log_ratio(unmasked_log_sums(scores, part.mask, centred=centred)).exp()
        for centred in (False, True)
    )
    kappa, centred_kappa = kappas
    share = torch.where(total > float("-inf"), part.state.lse - total, float("-inf")).double().exp()
    return RectangleReport(
        places=places, depth=depth, kappa=kappa, centred_kappa=centred_kappa,
        alpha=scores.num_keys * column_squares(scores).amax(dim=-1),
        mass=row_masses(scores, part.mask).mean(dim=-1),
        error=relative_error(part.query, part.key, part.value, part.state.out, scale=scale),
        weight=share.mean(dim=-1),
    )  # fmt: skip
