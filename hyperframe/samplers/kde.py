"""Kde: keys drawn by the squared column norms of the softmax matrix (KDEformer)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..component import check_fraction, check_non_negative_int, check_positive_int
from ..detectors.base import default_scale
from ..precision import without_autocast
from ..randomness import check_generator, uniform
from ..samples import KeySample
from ..validation import check_inputs
from .base import AbstractSampler
from .places import whole_where_short

__all__ = ["Kde"]

_CHUNK_BYTES = 64 << 20  # of logits, or of tables of sums, held at once
_TINY = 1e-300


@dataclass(frozen=True, kw_only=True)
class Kde(AbstractSampler):
    """Keys drawn with probability `p_j = (1 - floor) s_j + floor / n`, independently.

    `s_j` is the share of column `j` in the squared Frobenius norm of the softmax matrix,
    `||D^-1 A e_j||^2 / ||D^-1 A||_F^2`, estimated from the exact rows of `num_queries` queries of
    every query head in the key head's group. Whatever the rows say, the estimator of any column
    sum is unbiased, and no weight is above `n / (floor m)`.

    In a single causal pass the columns that all rows of a tile see are drawn by the rows before
    the tile, each of which sees its own prefix: nothing later than the tile takes part. The keys
    of the tile itself, and the first tiles, are drawn uniformly. In the recursion, where all keys
    of a rectangle come before its rows, its own rows count: `strict_causal=True` refuses this
    sampler.

    Where `importance` has the mean mass of pooled queries, this has single queries and squares:
    it draws what a few rows look at hard, and less of what all of them look at a little.

    Args:
        num_queries: rows that are looked at, evenly spaced, for each problem or rectangle.
        floor: share of the draws that is uniform; 1 is uniform sampling.

    Cost: O(num_queries n d) time for a query head, and O(num_queries n) memory for a key head in
    the single causal pass, beside chunks of 64 MiB. Random. No gradient.
    Source: KDEformer (arXiv 2302.02451), which estimates the column norms, sums of exponentials of
    doubled logits over squared row sums, by kernel density estimation. Departure: here they come
    from a subset of the rows, exactly; a part is uniform; and the norms of the values, which take
    part there and are of no use on real heads, do not here (see `row_norm`).

    Example:
        >>> q, k = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
        >>> k[:, :, 2] = 9.0  # holds nearly all of the mass
        >>> [round(p, 3) for p in Kde().density(q, k, k)[0, 0].tolist()]
        [0.125, 0.125, 0.625, 0.125]
    """

    uses_queries: ClassVar[bool] = True
    takes_stream: ClassVar[bool] = True

    num_queries: int = 64
    floor: float = 0.5

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_positive_int(self, "num_queries", self.num_queries)
        check_fraction(self, "floor", self.floor)

    def density(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        scale: float | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Return the probabilities where all rows see all keys: float64, they add up to 1."""
        rows = self._rows(query.shape[2], 0, key.device)
        squares = _column_squares(query, key, rows, None, scale=default_scale(query, scale))
        share = squares.sum(dim=2)
        return (1 - self.floor) * share / share.sum(-1, keepdim=True) + self.floor / key.shape[2]

    def sample_prefixes(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        prefixes: torch.Tensor, generator: torch.Generator | None = None,
        scale: float | None = None,
    ) -> KeySample:  # fmt: skip
        """Draw from the prefix of each tile; see the class and `AbstractSampler`."""
        check_non_negative_int(self, "num_samples", num_samples)
        check_inputs(query, key, value)
        check_generator(generator)
        (batch, heads, num_keys), offset = key.shape[:3], key.shape[2] - query.shape[2]
        draws = uniform((batch, heads, len(prefixes), num_samples), key.device, generator)
        rows = self._rows(query.shape[2], max(0, -offset), key.device)
        length = prefixes.clamp(min=1, max=num_keys).unsqueeze(-1)  # [T, 1]
        before = prefixes.new_full((1,), max(0, offset))
        seen = torch.cat([before, prefixes[:-1]]).unsqueeze(-1).minimum(length)  # [T, 1]
        # how many of the rows that are looked at see no key beyond those
        earlier = torch.searchsorted(rows + 1 + offset, seen, right=True)  # [T, 1]
        found = []
        step = max(1, _CHUNK_BYTES // (24 * (len(rows) + 1) * num_keys))
        grouped = query.unflatten(1, (heads, -1)).flatten(0, 1)
        parts = (x.split(step) for x in (grouped, key.flatten(0, 1), draws.flatten(0, 1)))
        with torch.no_grad():
            for q, k, u in zip(*parts, strict=True):
                squares = _column_squares(
                    q, k.unsqueeze(1), rows, offset, scale=default_scale(query, scale)
                )
                sums = torch.nn.functional.pad(squares.squeeze(1).cumsum(dim=1), (0, 0, 1, 0))
                found.append(self._draw(sums, u, length, seen, earlier))
        index, gain = (torch.cat(x).unflatten(0, (batch, heads)) for x in zip(*found, strict=True))
        log_weight = torch.log(length / max(1, num_samples)) - torch.log(gain)
        return whole_where_short(index, log_weight, prefixes, num_keys)

    def _draw(
        self, sums: torch.Tensor, draws: torch.Tensor, length: torch.Tensor, seen: torch.Tensor,
        earlier: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Draw for some heads.

        Args:
            sums: float64 `[N, R + 1, n_k]`: squares of the first `r` rows, added up.
            draws: `[N, T, m]`.
            length: int64 `[T, 1]`, prefixes.
            seen: int64 `[T, 1]`, the keys of them that all rows of the tile see.
            earlier: int64 `[T, 1]`, how many rows are before the tile.

        Returns:
            Keys `[N, T, m]`, and how much likelier than uniform they were drawn.
        """
        num_tables, num_keys = sums.shape[1:]
        # one ascending sequence: the sums of each table go from its number to the next one
        cumulative = sums.cumsum(dim=-1)
        last = (seen - 1).clamp(min=0).squeeze(-1)
        table = earlier.squeeze(-1)
        total = cumulative[:, table, last].unsqueeze(-1)  # [N, T, 1]
        whole = cumulative[..., -1:].clamp(min=_TINY)
        cumulative = cumulative / whole + torch.arange(num_tables, device=sums.device).unsqueeze(-1)
        # [0, length) is cut into: seen keys by the rows | seen keys uniformly | unseen keys
        place = draws * length
        share = (total > 0).double() * (1 - self.floor) * seen
        target = place / share.clamp(min=_TINY) * total / whole[:, table] + earlier
        by_rows = torch.searchsorted(cumulative.flatten(1), target.flatten(1), right=True)
        by_rows = by_rows.view(draws.shape) - earlier * num_keys
        uniformly = (place - share) / (seen - share).clamp(min=_TINY) * seen
        index = torch.where(place < seen, uniformly, place).long()
        index = torch.where(place < share, by_rows.clamp(min=0), index)
        index = torch.where(place < seen, torch.minimum(index, seen - 1), index)
        index = torch.minimum(index, length - 1)
        density = sums.flatten(1).gather(-1, (earlier * num_keys + index).flatten(1))
        gain = share * density.view(draws.shape) / total.clamp(min=_TINY)
        gain = gain + (seen - share) / seen.clamp(min=1)
        return index, torch.where(index < seen, gain, 1.0)

    def _rows(self, num_queries: int, first: int, device: torch.device) -> torch.Tensor:
        """Return the rows that are looked at, from `first` on: int64, ascending."""
        count = min(self.num_queries, num_queries - first)
        place = torch.arange(count, device=device) * 2 + 1
        return first + torch.div(place * (num_queries - first), 2 * count, rounding_mode="floor")


def _column_squares(
    query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor, offset: int | None, *, scale: float
) -> torch.Tensor:
    """Return the squared entries of some rows of the softmax matrix, added up over the group.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        rows: int64 `[R]`.
        offset: key position of query row 0 under a causal mask, or None.
        scale: factor of the logits.

    Returns:
        float64 `[batch, key_heads, R, n_k]`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, num_keys, head_dim = key.shape
    group = query.shape[1] // heads
    chosen = query[:, :, rows].to(dtype).reshape(batch * heads, group * len(rows), head_dim)
    key = key.flatten(0, 1)
    step = max(1, _CHUNK_BYTES // (16 * chosen.shape[1] * num_keys))
    found = []
    for q, k in zip(chosen.split(step), key.split(step), strict=True):
        with without_autocast(key):
            logits = (scale * q @ k.to(dtype).transpose(-1, -2)).unflatten(1, (group, -1))
        if offset is not None:
            later = torch.arange(num_keys, device=key.device) > (rows + offset).unsqueeze(-1)
            logits = logits.masked_fill(later, float("-inf"))
        found.append(logits.softmax(dim=-1).double().square().sum(dim=1))
    return torch.cat(found).reshape(batch, heads, len(rows), num_keys)
