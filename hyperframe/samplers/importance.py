"""Importance sampling: keys drawn by the attention that pooled queries pay to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..component import check_fraction, check_non_negative_int, check_positive_int
from ..detectors.base import default_scale
from ..randomness import check_generator, uniform
from ..samples import KeySample
from ..validation import check_inputs
from .base import AbstractSampler
from .places import whole_where_short
from .pooled import pooled_mass, pooled_queries
from .prefix_mass import PrefixMass, prefix_mass

__all__ = ["Importance"]

_BELOW_ONE = 1 - 2**-53


@dataclass(frozen=True, kw_only=True)
class Importance(AbstractSampler):
    """Keys drawn with probability `p_j = (1 - floor) s_j + floor / n`, independently.

    `s_j` is the mean softmax mass of key `j` over pooled queries: the means of `num_queries` equal
    runs of the query rows, of every query head of the key head's group. Nothing changes when all
    keys move together. The floor keeps every weight `1 / (m p_j)` below `n / (floor m)`, wherever
    the pooled queries do not look; beneath it lies the hundredth of `AbstractSampler`.

    In a single causal pass no key may move the weights of a row that does not see it, and a softmax
    over all keys would. So the masses are those of the rectangles of Algorithm 4: keys of a run of
    `tile_size * 2^l` positions, by the pooled queries of the run after it. The keys before a tile
    are cut into such rectangles, one of each size at most, whose keys all rows of the tile see.
    Each gets the share that the tile's own pooled queries give it (the softmax, over the tile's
    rectangles, of the log normalisers of the pooled query that holds the tile's first row; its
    mean over the group). Of `c` such keys in a prefix of `L`,

        p_j = c / L ((1 - floor) share_r s_rj + floor / c),    r the rectangle of key j,

    and the `L - c` others, about as many as the tile has rows, have `1 / L` each. Queries of later
    rows take part: `strict_causal=True` refuses this sampler.

    A sampler does not know the mask. Draws of keys that the mask holds weigh nothing, and where the
    mask holds the keys that the pooled queries look at, up to `1 - floor` of the draws are lost:
    behind a detector that finds most of the mass, uniform samples can be the better ones.

    Args:
        num_queries: pooled queries of each query head, for each problem or rectangle.
        floor: share of the draws that is uniform; 1 is uniform sampling.
        tile_size: keys of the smallest rectangles of the single causal pass.

    Cost: O(num_queries n d) time and O(n) memory for a query head beside chunks of 64 MiB; in the
    single causal pass `log2(n / tile_size)` times that. Random. No gradient.
    Source: importance sampling of the columns in place of HyperAttention, Algorithm 2, line 4.

    Example:
        >>> q, k = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
        >>> k[:, :, 2] = 9.0  # holds nearly all of the mass
        >>> [round(p, 3) for p in Importance().density(q, k, k)[0, 0].tolist()]
        [0.125, 0.125, 0.625, 0.125]
    """

    uses_queries: ClassVar[bool] = True
    takes_stream: ClassVar[bool] = True

    num_queries: int = 32
    floor: float = 0.5
    tile_size: int = 64

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_positive_int(self, "num_queries", self.num_queries)
        check_fraction(self, "floor", self.floor)
        check_positive_int(self, "tile_size", self.tile_size)

    def density(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        scale: float | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Return the probabilities where all rows see all keys: float64, they add up to 1."""
        batch, key_heads, num_keys = key.shape[:3]
        rows = torch.full((1,), query.shape[2], device=key.device)
        voters = pooled_queries(query.unsqueeze(2), rows, self.num_queries)  # [B, H, 1, P, d]
        voters = voters.reshape(batch * key_heads, -1, key.shape[3])  # a group's side by side
        votes = torch.ones_like(voters[..., 0], dtype=torch.bool)
        mass, _ = pooled_mass(voters, key.flatten(0, 1), votes, scale=default_scale(query, scale))
        mass = mass.double().view(batch, key_heads, num_keys)
        return (1 - self.floor) * mass / mass.sum(dim=-1, keepdim=True) + self.floor / num_keys

    def sample_prefixes(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        prefixes: torch.Tensor, generator: torch.Generator | None = None,
        scale: float | None = None,
    ) -> KeySample:  # fmt: skip
        """Draw from the prefix of each tile; see the class and `AbstractSampler`."""
        check_non_negative_int(self, "num_samples", num_samples)
        check_inputs(query, key, value)
        check_generator(generator)
        num_keys = key.shape[2]
        draws = uniform((*key.shape[:2], len(prefixes), num_samples), key.device, generator)
        length = prefixes.clamp(min=1, max=num_keys).unsqueeze(-1)  # [T, 1]
        place = draws * length
        index = torch.minimum(place.long(), length - 1)
        log_weight = torch.log(length / max(1, num_samples))
        with torch.no_grad():
            mass = prefix_mass(
                query, key, prefixes, num_runs=self.num_queries, size=self.tile_size,
                scale=default_scale(query, scale),
            )  # fmt: skip
        if mass is None:
            log_weight = log_weight.expand(draws.shape)
        else:
            # [0, length) is cut into: covered keys by mass | covered keys uniformly | the others
            covered = mass.covered
            inside = place / covered.clamp(min=1)
            by_mass = _draw_by_mass(mass, inside / max(1 - self.floor, 1e-300))
            rest = (inside - (1 - self.floor)) / self.floor * covered
            drawn = torch.where(inside < 1 - self.floor, by_mass, rest.long())
            drawn = torch.minimum(drawn, covered - 1).clamp(min=0)
            index = torch.where(place < covered, drawn, index)
            # times length: how much likelier than uniform the key is drawn
            gain = (1 - self.floor) * covered * _mass_at(mass, index) + self.floor
            log_weight = log_weight - torch.log(torch.where(index < covered, gain, 1.0))
        return whole_where_short(index, log_weight, prefixes, num_keys)


def _draw_by_mass(mass: PrefixMass, draws: torch.Tensor) -> torch.Tensor:
    """Return a covered key for each draw `[B, H, T, m]` from [0, 1), by inversion."""
    share = mass.share
    cumulative = share.cumsum(dim=-1)
    target = draws.clamp(max=_BELOW_ONE) * cumulative[..., -1:]
    piece = torch.searchsorted(cumulative, target.contiguous(), right=True)
    piece = piece.clamp(max=share.shape[-1] - 1)
    before = (cumulative - share).gather(-1, piece)
    within = (target - before) / share.gather(-1, piece).clamp(min=1e-300)
    number, start, first, length = (_take(x, piece) for x in mass.pieces)
    slot = torch.searchsorted(
        mass.cumulative, (number + within.clamp(0, _BELOW_ONE)).flatten(2), right=True
    )
    inside = (slot.view(draws.shape) - first).clamp(min=0)
    return start + torch.minimum(inside, (length - 1).clamp(min=0))


def _mass_at(mass: PrefixMass, index: torch.Tensor) -> torch.Tensor:
    """Return the probability by mass of covered keys `[B, H, T, m]`; of others anything finite."""
    ends = mass.pieces.length.cumsum(dim=-1)  # the pieces lie one behind the other
    tiles = index.transpose(0, 2).flatten(1).contiguous()  # [T, H * B * m]
    piece = torch.searchsorted(ends, tiles, right=True).clamp(max=ends.shape[-1] - 1)
    swapped = index.transpose(0, 2).shape
    piece = piece.view(swapped).transpose(0, 2)
    _, start, first, length = (_take(x, piece) for x in mass.pieces)
    inside = torch.minimum((index - start).clamp(min=0), (length - 1).clamp(min=0))
    density = mass.density.gather(-1, (first + inside).flatten(2)).view(index.shape)
    return density * mass.share.gather(-1, piece)


def _take(table: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
    """Return the entries of a table `[T, K]` at `[B, H, T, m]`."""
    return table.expand(*piece.shape[:2], -1, -1).gather(-1, piece)
