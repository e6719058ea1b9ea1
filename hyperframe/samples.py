"""Weighted samples of keys: what a sampler hands to the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["KeySample", "SampleDraw", "Summaries"]


@dataclass(frozen=True, kw_only=True)
class Summaries:
    """Groups of keys, each with one pseudo-key that stands for those that are not held exactly.

    Without `unit` there is one level, whose groups are made of all keys. With it, groups of level
    `l` are made inside of runs of `unit * 2^l` positions, and the keys before a tile are cut into
    such runs, one of a level at most (Algorithm 4's rectangles).

    Args:
        key: `[batch, key_heads, E, d]`, means of the keys of each group.
        value: `[batch, key_heads, E, d_v]`, means of their values.
        slot: integer `[batch, key_heads, levels, n_k]`, which group of its run a key is in.
        size: integer `[tiles, m]`, keys of the groups that a tile lists; 0 in unused slots, which
            are the last ones.
        count: integer `[tiles]`, slots that are used.
        stop: integer `[tiles]`, keys before this position are in groups.
        first_slot: integer `[tiles, levels]`, where the groups of a level begin in a tile's list.
        unit: positions of the smallest runs; None for one level.
    """

    key: torch.Tensor
    value: torch.Tensor
    slot: torch.Tensor
    size: torch.Tensor
    count: torch.Tensor
    stop: torch.Tensor
    first_slot: torch.Tensor
    unit: int | None = None

    def slots_of(self, index: torch.Tensor) -> torch.Tensor:
        """Return which slot of its tile's list counts a key; -1 for keys in no group.

        Args:
            index: integer `[batch, heads, tiles, L]`, keys; `heads` a multiple of the key heads.
                Slots that are not used may hold anything, and get anything.

        Returns:
            int64, the same shape.
        """
        batch, heads, tiles, _ = index.shape
        index = index.long()
        stop, num_keys = self.stop.view(-1, 1), self.slot.shape[3]
        level = torch.zeros_like(index)
        if self.unit is not None:
            # the run of a key is named by the highest bit in which its place and the stop differ
            differ = (index // self.unit) ^ (stop // self.unit)
            level = torch.frexp(differ.clamp(min=1).double()).exponent.long() - 1
            level = level.clamp(max=self.slot.shape[2] - 1)
        place = (level * num_keys + index.clamp(0, max(0, num_keys - 1))).view(
            batch, self.slot.shape[1], -1
        )
        within = self.slot.flatten(2).gather(-1, place).view(index.shape)
        first = self.first_slot.expand(batch, heads, tiles, -1).gather(-1, level)
        return torch.where(index < stop, first + within, -1)


@dataclass(frozen=True, kw_only=True)
class KeySample:
    """Columns drawn to stand for all columns, with their importance weights.

    A sample is a Horvitz-Thompson estimator of a column sum: for every function `f` of a key,
    `E[sum_s exp(log_weight_s) * f(index_s)] = sum_j f(j)`, the expectation taken over the
    generator. `log_weight = -log(m * p_j)` for `m` independent draws with probabilities `p`.

    Args:
        index: int64 `[batch, key_heads, m]`; `[batch, key_heads, tiles, m]` when every tile of
            query rows has a sample of its own prefix of the keys.
        log_weight: floating point, the same shape; natural logarithm; `-inf` marks an unused slot.
        summaries: None; or groups of keys: then index `n_k + e` names the pseudo-key of group `e`,
            and the weights are those of whole groups.
    """

    index: torch.Tensor
    log_weight: torch.Tensor
    summaries: Summaries | None = None

    @property
    def num_samples(self) -> int:
        """Slots per list, used or not."""
        return self.index.shape[-1]


SampleDraw = Callable[["torch.Tensor | None"], KeySample]
"""Draws the residual: of all keys (None), or of the prefix of each tile (int64 `[tiles]`)."""
