"""The exact diagnostics from a sample of rows: linear in n, with confidence limits.

Rows are drawn without replacement, the same for all heads, and each is computed over all of its
keys. From `num_rows >= n_q` on all rows are taken, and the limits are the value itself.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..errors import ArgumentError, ArgumentTypeError
from ..masks import HeavyMask
from ..randomness import Stream, check_generator, uniform
from .columns import check_skip, column_squares
from .intervals import Estimate, failure_of, mean_estimate, mean_limits
from .quality import row_masses
from .rows import log_ratio, row_entropies, unmasked_log_sums
from .scores import Scores

__all__ = ["sampled_alpha", "sampled_entropy", "sampled_log_kappa", "sampled_mass"]


def sampled_alpha(
    query: torch.Tensor, key: torch.Tensor, *, num_rows: int, scale: float | None = None,
    is_causal: bool = False, skip_first: int = 0, confidence: float = 0.95,
    generator: torch.Generator | Stream | None = None, dtype: torch.dtype | None = None,
) -> Estimate:  # fmt: skip
    """Estimate `alpha` from `num_rows` rows.

    The value is the largest column of the sampled rows, scaled up: of a maximum this is too high
    on average. `low` avoids that, it picks the column with one half of the sample and measures it
    with the other. `high` is what the largest column may have and still show as little as the
    largest in the sample does; as only one column is the largest, it need not be divided among n.

    No sample can exclude a key that a few rows, not drawn, attend to alone. So `high` is at least
    about `log(2 / (1 - confidence)) n_q n_k / num_rows`: it says how much there may be of a sink
    that every query sees, and needs `num_rows` close to n to confirm an alpha close to n.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        num_rows: rows to draw; at least 2.
        scale: factor of the logits; None is `1 / sqrt(d)`.
        is_causal: bottom-right aligned causality.
        skip_first: leading columns left out of the maximum.
        confidence: probability that both limits hold.
        generator: source of the draw.
        dtype: arithmetic; None is float32, or float64 for float64 tensors.

    Returns:
        The estimate, `[batch, query_heads]`.

    Raises:
        ArgumentError: inputs that do not fit or are not finite; no column left.

    Cost: O(num_rows n_k d) time, memory linear in n. Random. No gradient.

    Example:
        >>> q = k = torch.zeros(1, 1, 100, 2)
        >>> estimate = sampled_alpha(q, k, num_rows=50)
        >>> round(estimate.value.item(), 4), bool(estimate.low <= 1.0 <= estimate.high)
        (1.0, True)
    """
    scores = Scores.of(query, key, scale=scale, is_causal=is_causal, dtype=dtype)
    check_skip(skip_first, scores.num_keys)
    num_queries, num_keys = scores.num_queries, scores.num_keys
    failure = failure_of(confidence)
    rows = _draw(scores, num_rows, 2, generator)
    if rows is None:
        largest = num_keys * column_squares(scores)[..., skip_first:].amax(dim=-1)
        return Estimate(value=largest, low=largest, high=largest, confidence=confidence)
    # sorted only now: each half is a sample by itself
    half = len(rows) // 2
    first, second = (
        column_squares(scores, part.sort().values)[..., skip_first:]
        for part in (rows[:half], rows[half:])
    )
    value = (first + second).amax(dim=-1) / len(rows)  # a mean of numbers in [0, 1]
    _, high = mean_limits(value, len(rows), failure=failure)
    chosen = first.argmax(dim=-1, keepdim=True)
    seen, measured = (part.gather(-1, chosen).squeeze(-1) for part in (first, second))
    # the second half is a sample of the rows that the first left
    low, _ = mean_limits(measured / (len(rows) - half), len(rows) - half, failure=failure)
    low = torch.minimum((seen + (num_queries - half) * low) / num_queries, value)
    factor = num_keys * num_queries
    return Estimate(
        value=factor * value, low=factor * low, high=factor * high, confidence=confidence
    )


def sampled_log_kappa(
    query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, *, num_rows: int,
    scale: float | None = None, centred: bool = False, confidence: float = 0.95,
    generator: torch.Generator | Stream | None = None, dtype: torch.dtype | None = None,
) -> Estimate:  # fmt: skip
    """Bound `log_kappa` from below with `num_rows` rows; `.exp()` of the result is for kappa.

    The sampled rows' ratio is never above that of all rows: it is both `value` and `low`, and
    certain. Nothing bounds the rows that were not drawn, so that `high` is `inf`. What the sample
    does say: with probability `confidence`, at most a share `log(2 / (1 - confidence)) / num_rows`
    of the rows lies above its largest sum, and at most that share below its smallest.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        mask: the entries left out; its causality and offset hold.
        num_rows: rows to draw.
        scale: factor of the logits; None is `1 / sqrt(d)`.
        centred: whether the mean of all keys is subtracted from the keys first.
        confidence: probability that both shares are as said.
        generator: source of the draw.
        dtype: arithmetic; None is float32, or float64 for float64 tensors.

    Returns:
        The estimate, `[batch, query_heads]`, natural logarithms.

    Raises:
        ArgumentError: inputs or a mask that do not fit; inputs that are not finite.

    Cost: O(num_rows n_k d) time, memory linear in n. Random. No gradient.

    Example:
        >>> from hyperframe.detectors import create
        >>> q = k = torch.ones(1, 1, 100, 2)
        >>> mask = create("oracle(budget=10)").find(q, k)
        >>> sampled_log_kappa(q, k, mask, num_rows=50).value.item()
        0.0
    """
    scores = Scores.under(mask, query, key, scale=scale, dtype=dtype)
    failure_of(confidence)
    rows = _draw(scores, num_rows, 1, generator)
    sums = unmasked_log_sums(scores, mask, centred=centred, rows=_sorted(rows))
    found = log_ratio(sums)
    high = found if rows is None else torch.full_like(found, float("inf"))
    return Estimate(value=found, low=found, high=high, confidence=confidence)


def sampled_entropy(
    query: torch.Tensor, key: torch.Tensor, *, num_rows: int, scale: float | None = None,
    is_causal: bool = False, confidence: float = 0.95,
    generator: torch.Generator | Stream | None = None, dtype: torch.dtype | None = None,
) -> Estimate:  # fmt: skip
    """Estimate the mean of `entropy` over all rows from `num_rows` of them.

    The limits use nothing but that an entropy lies between 0 and `log n_k`.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        num_rows: rows to draw.
        scale: factor of the logits; None is `1 / sqrt(d)`.
        is_causal: bottom-right aligned causality.
        confidence: probability that both limits hold.
        generator: source of the draw.
        dtype: arithmetic; None is float32, or float64 for float64 tensors.

    Returns:
        The estimate, `[batch, query_heads]`, nats.

    Raises:
        ArgumentError: inputs that do not fit or are not finite.

    Cost: O(num_rows n_k d) time, memory linear in n. Random. No gradient.

    Example:
        >>> q = k = torch.zeros(1, 1, 100, 2)
        >>> round(sampled_entropy(q, k, num_rows=50).value.exp().item(), 3)
        100.0
    """
    scores = Scores.of(query, key, scale=scale, is_causal=is_causal, dtype=dtype)
    rows = _draw(scores, num_rows, 1, generator)
    entropies = row_entropies(scores, _sorted(rows))
    return mean_estimate(
        entropies, math.log(scores.num_keys), is_exact=rows is None, confidence=confidence
    )


def sampled_mass(
    query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, *, num_rows: int,
    scale: float | None = None, confidence: float = 0.95,
    generator: torch.Generator | Stream | None = None, dtype: torch.dtype | None = None,
) -> Estimate:  # fmt: skip
    """Estimate the `mass` of `mask_quality` from `num_rows` rows.

    The limits use nothing but that the mass of a row lies between 0 and 1.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        mask: what a detector found; its causality and offset hold.
        num_rows: rows to draw.
        scale: factor of the logits; None is `1 / sqrt(d)`.
        confidence: probability that both limits hold.
        generator: source of the draw.
        dtype: arithmetic; None is float32, or float64 for float64 tensors.

    Returns:
        The estimate, `[batch, query_heads]`.

    Raises:
        ArgumentError: inputs or a mask that do not fit; inputs that are not finite.

    Cost: O(num_rows n_k d) time and what the mask needs for a dense row; memory linear in n.
    Random. No gradient.

    Example:
        >>> from hyperframe.detectors import create
        >>> q = k = torch.zeros(1, 1, 100, 2)
        >>> mask = create("oracle(budget=10)").find(q, k)
        >>> round(sampled_mass(q, k, mask, num_rows=50).value.item(), 3)
        0.1
    """
    scores = Scores.under(mask, query, key, scale=scale, dtype=dtype)
    rows = _draw(scores, num_rows, 1, generator)
    masses = row_masses(scores, mask, _sorted(rows))
    # a row without keys has mass 0, and the mean is over the others
    factor = scores.num_queries / max(1, int((scores.num_visible() > 0).sum()))
    found = mean_estimate(factor * masses, factor, is_exact=rows is None, confidence=confidence)
    return replace(found, high=found.high.clamp(max=1.0))


def _draw(
    scores: Scores, num_rows: object, least: int, generator: torch.Generator | Stream | None
) -> torch.Tensor | None:
    """Return distinct rows in random order, int64 on the CPU; None for all of them."""
    check_generator(generator)
    if isinstance(num_rows, bool) or not isinstance(num_rows, int):
        raise ArgumentTypeError(
            f"num_rows={num_rows!r}: has type {type(num_rows).__name__}; pass a plain int"
        )
    if num_rows < least:
        raise ArgumentError(
            f"num_rows={num_rows}: too few rows to estimate from; pass at least {least}"
        )
    if num_rows >= scores.num_queries:
        return None
    order = uniform((scores.num_queries,), scores.query.device, generator).argsort()
    return order[:num_rows].cpu()


def _sorted(rows: torch.Tensor | None) -> torch.Tensor | None:
    return None if rows is None else rows.sort().values
