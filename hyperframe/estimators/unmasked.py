"""What is known of the row sums of `A` beside a sample: masked parts, unmasked sums of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..blockplan import BlockPlan
from ..kernels import attend_all
from ..masks import EntryMask, HeavyMask, UnionMask
from ..masks.select import rows_at
from ..plan import TilePlan

__all__ = [
    "held_keys",
    "log_masked_sums",
    "log_unmasked_sums",
    "mean_logits",
    "visible_keys",
]

Plans = Sequence[TilePlan | BlockPlan]

_CHUNK_BYTES = 64 << 20  # of logits and masks held at once
_BYTES_PER_LOGIT = 32  # the logits, their exponentials, and what the rows of a mask take


def log_masked_sums(
    query: torch.Tensor, key: torch.Tensor, plans: Plans, *, scale: float
) -> torch.Tensor:
    """Return `log sum_j M_ij A_ij`: `[batch, query_heads, n_q]`, `-inf` for rows that hold nothing.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        plans: those of the mask, without samples.
        scale: factor of the logits.

    Cost: one attention over the mask, O(n_q b d) for b held keys a row.
    """
    value = key.new_zeros((*key.shape[:3], 1))
    return attend_all(query, key, value, plans, scale=scale).lse


def visible_keys(mask: HeavyMask) -> torch.Tensor:
    """Return how many keys each row may see: int64 `[n_q]`."""
    if not mask.is_causal:
        return torch.full((mask.num_queries,), mask.num_keys, device=mask.device)
    row = torch.arange(mask.num_queries, device=mask.device)
    return (row + 1 + mask.position_offset).clamp(min=0, max=mask.num_keys)


def held_keys(query: torch.Tensor, key: torch.Tensor, plans: Plans) -> torch.Tensor:
    """Return how many keys each row holds, `sum_j M_ij`: int64 `[batch, query_heads, n_q]`.

    That is the masked row sum where all logits are 0; sums of ones are whole numbers up to
    rounding. Cost: one attention over the mask with a head dimension of 1.
    """
    zero_q, zero_k = (x.new_zeros((*x.shape[:3], 1), dtype=torch.float32) for x in (query, key))
    return log_masked_sums(zero_q, zero_k, plans, scale=1.0).exp().round().long()


def mean_logits(
    query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, *, scale: float
) -> torch.Tensor:
    """Return the mean logit of every row over the keys it may see, masked or not.

    Under a causal mask that is the mean of a prefix: no later key takes part.

    Returns:
        `[batch, query_heads, n_q]`, float32 at least; 0 for a row without keys. Cost O((n_q +
        n_k) d) time and memory.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k = query.to(dtype).unflatten(1, (key.shape[1], -1)), key.to(dtype)
    if mask.is_causal:
        visible = visible_keys(mask)
        sums = k.cumsum(dim=2)[:, :, (visible - 1).clamp(min=0)]  # [B, Hk, n_q, d]
        mean = torch.where(visible.unsqueeze(-1) > 0, sums / visible.clamp(min=1).unsqueeze(-1), 0)
    else:
        mean = k.mean(dim=2, keepdim=True)
    logits: torch.Tensor = scale * (q * mean.unsqueeze(2)).sum(dim=-1).flatten(1, 2)
    return logits


def log_unmasked_sums(
    query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, rows: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Return `log sum_j (1 - M_ij) A_ij` of some rows, from the entries that are left.

    Not as the difference of a whole and a masked sum, in which nothing would be left of a small
    one.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        mask: the mask.
        rows: int64 `[batch, query_heads, R]`.
        scale: factor of the logits.

    Returns:
        float32 at least, `[batch, query_heads, R]`; `-inf` where all that a row sees is masked.
        Cost O(R n_k d) time and one bounded chunk of memory.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, count = rows.shape
    chosen = query.gather(2, rows.unsqueeze(-1).expand(-1, -1, -1, query.shape[3])).to(dtype)
    k = key.to(dtype).transpose(-1, -2)
    step = max(1, _CHUNK_BYTES // (_BYTES_PER_LOGIT * batch * heads * key.shape[2]))
    key_position = torch.arange(key.shape[2], device=key.device)
    # plans hold the entries of a tile for all of its rows
    parts = (x.to_lists() if isinstance(x, EntryMask) else x for x in mask.parts())
    held = UnionMask.of(*parts)
    found = []
    for start in range(0, count, step):
        part = slice(start, start + step)
        grouped = chosen[:, :, part].unflatten(1, (key.shape[1], -1)).flatten(2, 3)
        logits = (scale * grouped @ k).view(batch, heads, -1, key.shape[2])
        hidden = rows_at(held, rows[:, :, part])
        if mask.is_causal:
            position = rows[:, :, part].unsqueeze(-1) + mask.position_offset
            hidden = hidden | (key_position > position)
        found.append(logits.masked_fill(hidden, float("-inf")).logsumexp(dim=-1))
    return torch.cat(found, dim=-1) if len(found) != 1 else found[0]
