"""kappa and entropy: how different the rows are, and how spread out each is."""

from __future__ import annotations

import torch

from ..masks import HeavyMask
from .scores import Scores, exponentials, log_sums, mask_rows

__all__ = ["entropy", "kappa", "log_kappa", "log_ratio", "row_entropies", "unmasked_log_sums"]


def kappa(
    query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, *, scale: float | None = None,
    centred: bool = False, dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return `kappa = max_i S_i / min_i S_i` of every head, `S_i = <1 - M_i, exp(scale K q_i)>`.

    `S_i` is what the mask leaves of row i of `A`: ApproxD estimates it from columns shared by all
    rows, with a cap and a floor that are the same for all, and works where these sums are alike.

    As defined, kappa is not a property of the attention: adding a vector `c` to all keys leaves
    the softmax alone, but multiplies `S_i` by `exp(scale <q_i, c>)`. On real heads it may be 1e100
    for that reason only. `centred=True` takes the mean key away first, which is free for an
    estimator as well.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        mask: the entries left out. Its causality and offset hold: under `is_causal` row i sums
            over its visible prefix only, and sums grow with the length of the prefix.
        scale: factor of the logits; None is `1 / sqrt(d)`.
        centred: whether the mean of all keys is subtracted from the keys first.
        dtype: arithmetic; None is float32, or float64 for float64 tensors.

    Returns:
        float64 `[batch, query_heads]`; `inf` from about 1e308 on: see `log_kappa`. Rows that have
        nothing left need no estimate and do not count; a head with no other rows has kappa 1.

    Raises:
        ArgumentError: inputs or a mask that do not fit; inputs that are not finite.
        ArgumentTypeError: something else than a mask.

    Source: HyperAttention, Lemma 1. There a row with nothing left would make kappa infinite.

    Cost: one pass over the logits, O(n_q n_k d) time, memory linear in n. Deterministic. No
    gradient. `sampled_log_kappa` is linear in n.

    Example:
        >>> from hyperframe.detectors import create
        >>> q, k = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1), torch.ones(1, 1, 4, 1)
        >>> mask = create("oracle(budget=1)").find(q, k)
        >>> round(kappa(q, k, mask).item(), 4), kappa(q, k, mask, centred=True).item()
        (2.7183, 1.0)
    """
    return log_kappa(query, key, mask, scale=scale, centred=centred, dtype=dtype).exp()


def log_kappa(
    query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, *, scale: float | None = None,
    centred: bool = False, dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return the natural logarithm of `kappa`, which never overflows; arguments as there."""
    scores = Scores.under(mask, query, key, scale=scale, dtype=dtype)
    return log_ratio(unmasked_log_sums(scores, mask, centred=centred))


def unmasked_log_sums(
    scores: Scores, mask: HeavyMask, *, centred: bool, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `log S_i` of some or all rows: float64 `[batch, query_heads, R]`; `-inf` for none."""
    sums = []
    for chunk in scores.chunks(rows):
        held = mask_rows(mask, chunk.rows, chunk.logits.shape[-1])
        part = log_sums(chunk.logits.masked_fill_(held, float("-inf")))
        if not centred:
            part = part + scores.shift(chunk.rows)
        sums.append(part)
    return torch.cat(sums, dim=-1)


def log_ratio(log_sums: torch.Tensor) -> torch.Tensor:
    """Return the largest less the smallest logarithm; empty rows do not count, none give 0."""
    is_empty = log_sums == float("-inf")
    most = log_sums.amax(dim=-1)
    least = log_sums.masked_fill(is_empty, float("inf")).amin(dim=-1)
    return torch.where(is_empty.all(dim=-1), 0.0, most - least)


def entropy(
    query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
    is_causal: bool = False, dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return the entropy of every softmax row, in nats; its exponential counts effective keys.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        scale: factor of the logits; None is `1 / sqrt(d)`.
        is_causal: bottom-right aligned causality.
        dtype: arithmetic; None is float32, or float64 for float64 tensors.

    Returns:
        float64 `[batch, query_heads, n_q]`, between 0 and `log n_k`; 0 for a row without keys.

    Raises:
        ArgumentError: inputs that do not fit or are not finite.

    Cost: one pass over the logits, O(n_q n_k d) time, memory linear in n. Deterministic. No
    gradient. `sampled_entropy` is linear in n.

    Example:
        >>> q = k = torch.zeros(1, 1, 2, 1)
        >>> entropy(q, k, is_causal=True).exp().round().tolist()
        [[[1.0, 2.0]]]
    """
    return row_entropies(Scores.of(query, key, scale=scale, is_causal=is_causal, dtype=dtype))


def row_entropies(scores: Scores, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Return the entropies of some or all rows: float64 `[batch, query_heads, R]`."""
    entropies = []
    for chunk in scores.chunks(rows):
        terms, total, _ = exponentials(chunk.logits)
        # sum of -p log p with p = term / total, and 0 log 0 = 0
        surprise = torch.special.entr(terms).sum(dim=-1).double()
        total = total.squeeze(-1)
        found = total.log() + surprise / total
        entropies.append(torch.where(total > 0, found.clamp(min=0.0), 0.0))
    return torch.cat(entropies, dim=-1)
