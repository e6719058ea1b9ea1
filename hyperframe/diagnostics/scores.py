"""Logits in row chunks: what every exact diagnostic is computed from, in memory linear in n."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import ArgumentError, ArgumentTypeError
from ..masks import HeavyMask, check_mask_type
from ..precision import without_autocast
from ..ragged import spread_heads
from ..validation import check_inputs, check_scale

__all__ = ["Chunk", "Scores", "exponentials", "log_sums", "mask_rows"]

_CHUNK_ENTRIES = 1 << 22  # logits held at once, ...
_FEWEST_ROWS = 16  # ... unless these rows of all heads are more: shorter products are slow


class Chunk(NamedTuple):
    """Logits of some rows.

    Attributes:
        rows: int64 `[R]` on the CPU, ascending.
        logits: `[batch, query_heads, R, seen]`, for the first `seen` keys: no row sees a later
            one; `-inf` where a key is hidden. The caller may write into it.
    """

    rows: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Logits `scale * Q K^T` of one problem, their keys shifted by the mean key.

    A shift of all keys adds a number to each row: the softmax does not see it, and smaller logits
    round less. `shift` returns what was taken away.

    Args:
        query: `[batch, query_heads, n_q, d]`, times the scale.
        key: `[batch, key_heads, n_k, d]`, centred.
        mean: float64 `[batch, query_heads, 1, d]`, what was subtracted from the keys.
        is_causal: whether later keys are hidden.
        offset: key position of query row 0.
    """

    query: torch.Tensor
    key: torch.Tensor
    mean: torch.Tensor
    is_causal: bool
    offset: int

    @classmethod
    def of(
        cls, query: torch.Tensor, key: torch.Tensor, *, scale: float | None, is_causal: bool,
        dtype: torch.dtype | None, offset: int | None = None,
    ) -> Scores:  # fmt: skip
        """Check the tensors and return their scores.

        Args:
            query: `[batch, query_heads, n_q, d]`.
            key: `[batch, key_heads, n_k, d]`.
            scale: factor of the logits; None is `1 / sqrt(d)`.
            is_causal: whether later keys are hidden.
            dtype: of the products and exponentials, float32 or float64; None is float32, and
                float64 for float64 tensors.
            offset: key position of query row 0; None aligns bottom right.
        """
        check_inputs(query, key, key, check_finite=True)
        scale = check_scale(scale, query.shape[-1])
        if dtype is None:
            dtype = torch.promote_types(query.dtype, torch.float32)
        elif dtype not in (torch.float32, torch.float64):
            raise ArgumentTypeError(
                f"dtype={dtype}: diagnostics are computed in float32 or float64; pass one of "
                "these, or None"
            )
        work = torch.promote_types(key.dtype, dtype)
        mean = key.detach().mean(dim=2, keepdim=True, dtype=torch.float64).to(work)
        return cls(
            query=(query.detach().to(work) * scale).to(dtype),
            key=(key.detach().to(work) - mean).to(dtype),
            mean=spread_heads(mean.double(), query.shape[1]), is_causal=is_causal,
            offset=key.shape[2] - query.shape[2] if offset is None else offset,
        )  # fmt: skip

    @classmethod
    def under(
        cls, mask: HeavyMask, query: torch.Tensor, key: torch.Tensor, *, scale: float | None,
        dtype: torch.dtype | None,
    ) -> Scores:  # fmt: skip
        """Check tensors and mask and return the scores, under the causality of the mask."""
        _check_mask(mask, query, key)
        return cls.of(
            query, key, scale=scale, is_causal=mask.is_causal, dtype=dtype,
            offset=mask.position_offset,
        )  # fmt: skip

    @property
    def num_queries(self) -> int:
        """`n_q`."""
        return self.query.shape[2]

    @property
    def num_keys(self) -> int:
        """`n_k`."""
        return self.key.shape[2]

    def shift(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what centring took from the logits of rows: float64 `[batch, query_heads, R]`."""
        picked = self.query[:, :, rows.to(self.query.device)].double()
        return (picked * self.mean).sum(dim=-1)

    def num_visible(self) -> torch.Tensor:
        """Return how many keys each row sees: int64 `[n_q]`."""
        if not self.is_causal:
            return torch.full((self.num_queries,), self.num_keys, device=self.query.device)
        position = torch.arange(self.num_queries, device=self.query.device) + self.offset
        return (position + 1).clamp(0, self.num_keys)

    def chunks(self, rows: torch.Tensor | None = None) -> Iterator[Chunk]:
        """Yield the logits of all rows, or of some.

        Args:
            rows: int64 on the CPU, ascending; None for all.
        """
        if rows is None:
            rows = torch.arange(self.num_queries)
        heads = self.query.shape[0] * self.query.shape[1]
        step = max(_FEWEST_ROWS, _CHUNK_ENTRIES // (heads * self.num_keys))
        for some in rows.split(step):
            yield Chunk(some, self._logits(some))

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        batch, heads, _, dim = self.query.shape
        key_heads = self.key.shape[1]
        seen = self.num_keys
        if self.is_causal:
            seen = min(max(int(rows[-1]) + self.offset + 1, 1), seen)
        picked = self.query[:, :, rows.to(self.query.device)]
        grouped = picked.reshape(batch, key_heads, heads // key_heads * len(rows), dim)
        with without_autocast(grouped):
            logits = grouped @ self.key[:, :, :seen].mT
        logits = logits.view(batch, heads, len(rows), seen)
        if self.is_causal:
            # keys up to the position of the first row are seen by all
            first = min(max(int(rows[0]) + self.offset, 0), seen)
            position = (rows + self.offset).to(logits.device)
            later = torch.arange(first, seen, device=logits.device) > position.unsqueeze(-1)
            logits[..., first:].masked_fill_(later, float("-inf"))
        return logits


def exponentials(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turn logits into `exp(logits - top)`, in place.

    Returns:
        The exponentials; their sums in float64 and the tops, both with a last dimension of 1. A
        row without keys has sum and top 0.
    """
    top = logits.amax(dim=-1, keepdim=True)
    top = torch.where(torch.isinf(top), 0.0, top)
    terms = logits.sub_(top).exp_()
    return terms, terms.sum(dim=-1, keepdim=True).double(), top


def log_sums(logits: torch.Tensor) -> torch.Tensor:
    """Return the log-sum-exp over the last dimension in float64, `-inf` for none; overwrites."""
    _, total, top = exponentials(logits)  # faster than logsumexp, which copies
    return (total.log() + top).squeeze(-1)


def mask_rows(mask: HeavyMask, rows: torch.Tensor, seen: int) -> torch.Tensor:
    """Return some rows of a mask: bool `[batch, query_heads, R, seen]`; `rows` ascend."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):
        return mask.rows(first, last + 1)[..., :seen]
    single = [mask.rows(row, row + 1)[..., :seen] for row in rows.tolist()]
    return torch.cat(single, dim=2)


def _check_mask(mask: HeavyMask, query: torch.Tensor, key: torch.Tensor) -> None:
    """Refuse what is no mask, or one of another problem or device."""
    check_inputs(query, key, key)
    check_mask_type("mask", mask)
    expected = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    found = (mask.batch_size, mask.num_query_heads, mask.num_queries, mask.num_keys)
    if expected != found:
        raise ArgumentError(
            f"mask: it is over [batch, query_heads, n_q, n_k] = {found}, but query and key "
            f"have {expected}; find the mask with the same query and key"
        )
    if mask.device != query.device:
        raise ArgumentError(
            f"mask: is on {mask.device}, but query is on {query.device}; find it with the same "
            "query and key, or move those with .to"
        )
