"""How good a heavy mask is: density, mass, precision and recall."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..budget import check_budget, resolve_budget
from ..component import check_fraction
from ..masks import HeavyMask
from ..ragged import spread_heads
from .scores import Scores, exponentials, mask_rows

__all__ = ["MaskQuality", "mask_quality", "row_masses"]


@dataclass(frozen=True, kw_only=True)
class MaskQuality:
    """What `mask_quality` measures; float64 `[batch, query_heads]` each, between 0 and 1.

    Args:
        density: share of the visible entries that the mask holds; 0 where nothing is visible.
        mass: softmax mass that it holds, mean over the rows that see a key; 0 where none does.
        precision: share of its entries that are heavy; 1 for an empty mask.
        recall: share of the heavy entries that it holds; 1 where none is heavy.
    """

    density: torch.Tensor
    mass: torch.Tensor
    precision: torch.Tensor
    recall: torch.Tensor


def mask_quality(
    query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, *, budget: int | float = 256,
    threshold: float | None = None, scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> MaskQuality:  # fmt: skip
    """Compare a mask with the heaviest entries of the softmax matrix.

    Precision and recall count entries, and a row may have many that hardly matter; the mass says
    what the output sees.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        mask: what a detector found; its causality and offset hold.
        budget: heavy are the `budget` largest entries of each row; a float is a fraction of the
            keys. Which of those count that tie, up to rounding, is decided in favour of the mask.
        threshold: instead of a budget, heavy are softmax entries above this share of their row.
        scale: factor of the logits; None is `1 / sqrt(d)`.
        dtype: arithmetic; None is float32, or float64 for float64 tensors.

    Returns:
        The four measures of every head. Counts are summed over a head's rows before they are
        divided.

    Raises:
        ArgumentError: inputs, mask, budget or threshold that do not fit.
        ArgumentTypeError: something else than a mask.

    Cost: one pass over the logits and a selection in each row, O(n_q n_k d) time, memory linear in
    n. Deterministic. No gradient. `sampled_mass` is linear in n.

    Example:
        >>> from hyperframe.detectors import create
        >>> q = k = 3 * torch.eye(4).view(1, 1, 4, 4)
        >>> mask = create("sliding_window(width=3, num_sinks=0)").find(q, k)
        >>> quality = mask_quality(q, k, mask, budget=1)
        >>> quality.recall.item(), quality.precision.item()
        (1.0, 0.4)
    """
    if threshold is None:
        check_budget("mask_quality", "budget", budget)
    else:
        check_fraction("mask_quality", "threshold", threshold, include_zero=True)
    scores = Scores.under(mask, query, key, scale=scale, dtype=dtype)
    longest = min(resolve_budget(budget, scores.num_keys), scores.num_keys)
    rounding = _rounding(scores)
    zeros = torch.zeros(query.shape[:2], dtype=torch.float64, device=query.device)
    num_held, num_heavy, num_right, num_found, mass = (zeros.clone() for _ in range(5))
    for chunk in scores.chunks():
        logits = chunk.logits
        held = mask_rows(mask, chunk.rows, logits.shape[-1])
        if threshold is None:
            last = logits.topk(min(longest, logits.shape[-1]), dim=-1).values[..., -1:]
            least = last - rounding[:, :, chunk.rows.to(last.device)]
            is_heavy = (logits >= least) & (logits > float("-inf"))
        terms, total, _ = exponentials(logits)
        if threshold is not None:
            is_heavy = terms > threshold * total.to(terms.dtype)
        heavy, right = is_heavy.sum(dim=-1), (held & is_heavy).sum(dim=-1)  # [B, H, R]
        if threshold is None:
            heavy = heavy.clamp(max=longest)  # of those that tie, any will do
        num_held += held.sum(dim=(-2, -1))
        num_heavy += heavy.sum(dim=-1)
        num_right += right.sum(dim=-1)
        num_found += torch.minimum(right, heavy).sum(dim=-1)
        mass += _held_share(terms, total, held).sum(dim=-1)
    visible = scores.num_visible()
    return MaskQuality(
        density=num_held / visible.sum().clamp(min=1),
        mass=mass / (visible > 0).sum().clamp(min=1),
        precision=torch.where(num_held > 0, num_right / num_held.clamp(min=1), 1.0),
        recall=torch.where(num_heavy > 0, num_found / num_heavy.clamp(min=1), 1.0),
    )


def row_masses(scores: Scores, mask: HeavyMask, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Return the softmax mass held in some or all rows: float64 `[batch, query_heads, R]`.

    It is 0 in a row without keys.
    """
    masses = []
    for chunk in scores.chunks(rows):
        held = mask_rows(mask, chunk.rows, chunk.logits.shape[-1])
        terms, total, _ = exponentials(chunk.logits)
        masses.append(_held_share(terms, total, held))
    return torch.cat(masses, dim=-1)


def _rounding(scores: Scores) -> torch.Tensor:
    """Return by how much logits of equal keys may differ: `[batch, query_heads, n_q, 1]`."""
    longest = scores.key.norm(dim=-1).amax(dim=-1)  # [B, Hkv]
    longest = spread_heads(longest, scores.query.shape[1])[..., None, None]
    step = 16 * torch.finfo(scores.query.dtype).eps
    rounding: torch.Tensor = step * scores.query.norm(dim=-1, keepdim=True) * longest
    return rounding


def _held_share(terms: torch.Tensor, total: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    kept = terms.masked_fill(~held, 0.0).sum(dim=-1).double()
    return kept / torch.where(total > 0, total, 1.0).squeeze(-1)
