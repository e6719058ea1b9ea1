"""Centroids: groups of similar keys, each by one mean key and one mean value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..clustering.dyadic import group_counts, num_levels
from ..clustering.metric import in_metric_of
from ..clustering.pca_tree import pca_order, pca_orders
from ..clustering.runs import equal_runs, gather_runs, run_means
from ..component import check_choice, check_non_negative_int, check_positive_int
from ..randomness import check_generator, uniform
from ..samples import KeySample, SampleDraw, Summaries
from ..validation import check_inputs
from .base import AbstractSampler

__all__ = ["Centroid"]

_TOGETHER_BYTES = 256 << 20  # of the points of all levels


@dataclass(frozen=True, kw_only=True)
class Centroid(AbstractSampler):
    """The keys that are not held exactly, by groups: `sum exp(q k_j) v_j ~ c exp(q mean k) mean v`.

    `num_samples` groups are the leaves of a balanced tree over the keys, split along the leading
    direction of `(E q q^T)^(1/2) k` (`clustering.pca_tree`). A group counts its keys that no exact
    slot of the tile holds; its mean key and mean value are those of all of its keys, so that tiles
    share them. The rest is approximated deterministically: nothing is drawn, row sums are not
    unbiased but too small (by Jensen's inequality, for the keys of a group), and much closer than
    samples where keys come in clusters.

    There is no first-order term. In the sum of weights it is zero by the definition of a mean; in
    that of values it would be a `d_v x d` matrix for each group, `d` times what a group takes now.

    In a single causal pass the keys before a tile are cut into runs of `unit * 2^l` positions, one
    of a size at most; each has leaves of its own, so that no later key moves a row. A tile lists
    `num_samples` leaves in all, at most. It holds its own keys exactly, and those of a window for
    all of its rows. In the recursion every rectangle has its own tree.

    `sample` by itself draws one key of each group, uniformly, with the size of the group as its
    weight: an unbiased sample. Attention uses the means.

    Needs a detector that lists keys by tiles or holds bands.

    Args:
        metric: `"query"`, or `"key"`: the tree is made from the keys as they are, and
            `strict_causal=True` is possible.
        unit: positions of the smallest runs of the causal pass.

    Cost: O(n d log(num_samples)) time as batched products and sorts, in the single causal pass
    `log2(n / unit)` times that; memory O(n log(n / unit)). Gradients flow through the means.
    Source: the residual of clustered attention; groups by trees, counts by tiles: this library.

    Example:
        >>> k = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 4, 1)
        >>> sample = Centroid().sample(k, k, k, num_samples=2)
        >>> sample.log_weight.exp().tolist()
        [[[2.0, 2.0]]]
    """

    takes_stream: ClassVar[bool] = True
    draws_keys: ClassVar[bool] = False

    metric: str = "query"
    unit: int = 64

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_choice(self, "metric", self.metric, ("query", "key"))
        check_positive_int(self, "unit", self.unit)
        object.__setattr__(self, "uses_queries", self.metric == "query")

    def density(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        scale: float | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Return None: every key of a group is equally likely."""
        return None

    def sample(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        generator: torch.Generator | None = None, scale: float | None = None,
    ) -> KeySample:  # fmt: skip
        """Draw one key of each group; see the class and `AbstractSampler.sample`."""
        check_non_negative_int(self, "num_samples", num_samples)
        check_inputs(query, key, value)
        check_generator(generator)
        groups = min(num_samples, key.shape[2])
        shape = (*key.shape[:2], num_samples)
        index = torch.zeros(shape, dtype=torch.int64, device=key.device)
        log_weight = torch.full(shape, -torch.inf, device=key.device)
        draws = uniform(shape, key.device, generator)[..., :groups]
        if groups:
            runs = equal_runs(key.shape[2], groups, key.device)
            members = gather_runs(self._order(query, key, groups), runs)  # [B, H, groups, longest]
            drawn = torch.minimum((draws * runs.sizes).long(), runs.sizes - 1)
            index[..., :groups] = members.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            log_weight[..., :groups] = runs.sizes.log()
        return KeySample(index=index, log_weight=log_weight)

    def draws(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        generator: torch.Generator | None = None, scale: float | None = None,
    ) -> SampleDraw | None:  # fmt: skip
        """Return the function that makes the groups; see `AbstractSampler.draws`."""
        if num_samples == 0:
            return None

        def draw(prefixes: torch.Tensor | None) -> KeySample:
            if prefixes is None:
                return self._of_all(query, key, value, min(num_samples, key.shape[2]))
            return self._of_prefixes(query, key, value, num_samples, prefixes)

        return draw

    def _points(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        query = query if self.metric == "query" else query[:, :, :0]
        return in_metric_of(query.detach(), key.detach())

    def _order(self, query: torch.Tensor, key: torch.Tensor, groups: int) -> torch.Tensor:
        """Order all keys so that equal runs are the groups: int64 `[batch, key_heads, n_k]`."""
        # leaves of at most this many keys: at least `groups` of them, and just as many
        order: torch.Tensor = pca_order(
            self._points(query, key), leaf_size=-(-key.shape[2] // groups)
        )
        return order

    def _of_all(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: int
    ) -> KeySample:
        """Groups of all keys, for all tiles."""
        device, num_keys = key.device, key.shape[2]
        order = self._order(query, key, groups)
        runs = equal_runs(num_keys, groups, device)
        members = gather_runs(order, runs)
        place = torch.arange(num_keys, device=device)
        group = (((place + 1) * groups - 1) // max(1, num_keys)).expand(order.shape)
        summaries = Summaries(
            key=run_means(key, members, runs.sizes).to(key.dtype),
            value=run_means(value, members, runs.sizes).to(value.dtype),
            slot=torch.empty_like(order).scatter_(-1, order, group).unsqueeze(2),
            size=runs.sizes.unsqueeze(0),
            count=torch.full((1,), groups, device=device),
            stop=torch.full((1,), num_keys, device=device),
            first_slot=torch.zeros((1, 1), dtype=torch.int64, device=device),
        )
        index = (num_keys + torch.arange(groups, device=device)).expand(*key.shape[:2], -1)
        weight = runs.sizes.log().float().expand(index.shape)
        return KeySample(index=index, log_weight=weight, summaries=summaries)

    def _of_prefixes(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, budget: int,
        prefixes: torch.Tensor,
    ) -> KeySample:  # fmt: skip
        """Groups of runs before each tile."""
        device, num_keys = key.device, key.shape[2]
        before = max(0, num_keys - query.shape[2])
        stop = torch.cat([prefixes.new_full((1,), before), prefixes[:-1]])  # first key of a tile
        stop = stop.clamp(min=0, max=num_keys)
        units = stop // self.unit
        most = num_keys // self.unit  # of units that some tile may have before it
        levels = num_levels(most)
        counts = group_counts(levels, self.unit, max(budget, levels))
        width = sum(counts)
        slot = torch.zeros(
            (*key.shape[:2], max(1, levels), num_keys), dtype=torch.int32, device=device
        )
        index = torch.zeros((len(stop), width + 1), dtype=torch.int64, device=device)
        size = torch.zeros_like(index)
        first_slot = torch.zeros((len(stop), max(1, levels)), dtype=torch.int64, device=device)
        used = torch.zeros_like(stop)
        keys, values, total = [key[:, :, :0]], [value[:, :, :0]], 0
        runs = self._runs(self._points(query, key), most, counts)
        for level, members in zip(reversed(range(levels)), runs, strict=True):
            length, groups, nodes = self.unit << level, counts[level], members.shape[2]
            leaf = torch.arange(length, device=device) * groups // length
            slot[:, :, level].scatter_(
                -1, members.flatten(2), leaf.int().expand_as(members).flatten(2)
            )
            keys.append(_means(key, members, groups))
            values.append(_means(value, members, groups))
            is_used = (units >> level) % 2 == 1
            first_slot[:, level] = used
            target = used.unsqueeze(-1) + torch.arange(groups, device=device)
            target = torch.where(is_used.unsqueeze(-1), target, width)
            node = ((units >> level) - 1).clamp(min=0) // 2
            named = total + node.unsqueeze(-1) * groups + torch.arange(groups, device=device)
            index.scatter_(-1, target, named)
            size.scatter_(-1, target, length // groups)
            used = used + is_used * groups
            total += nodes * groups
        index, size = num_keys + index[:, :-1], size[:, :-1]
        size = torch.where(torch.arange(width, device=device) < used.unsqueeze(-1), size, 0)
        summaries = Summaries(
            key=torch.cat(keys, dim=2), value=torch.cat(values, dim=2), slot=slot, size=size,
            count=used, stop=units * self.unit, first_slot=first_slot, unit=self.unit,
        )  # fmt: skip
        index = torch.where(size > 0, index, 0)
        shape = (*key.shape[:2], *index.shape)
        return KeySample(
            index=index.expand(shape), log_weight=size.log().float().expand(shape),
            summaries=summaries,
        )  # fmt: skip

    def _runs(self, points: torch.Tensor, units: int, counts: list[int]) -> Iterator[torch.Tensor]:
        """Yield the keys of the runs of each level, the longest runs first, in the order of leaves.

        Int64 `[batch, key_heads, runs, length]`. All levels are split together while their points
        are few: then launches are what splits cost.
        """
        sets, sizes = [], []
        for level in reversed(range(len(counts))):
            length = self.unit << level
            runs = ((units >> level) + 1) // 2  # the even ones; odd ones are halves of longer runs
            place = torch.arange(runs, device=points.device).unsqueeze(-1) * (2 * length)
            sets.append(place + torch.arange(length, device=points.device))  # [runs, length]
            sizes.append(length // counts[level])
        lead = points.shape[0] * points.shape[1] * points.shape[3] * points.element_size()
        together = lead * sum(place.numel() for place in sets) <= _TOGETHER_BYTES
        step = len(sets) if together else 1
        for first in range(0, len(sets), max(1, step)):
            now = slice(first, first + step)
            orders = pca_orders([points[:, :, place] for place in sets[now]], sizes[now])
            for place, order in zip(sets[now], orders, strict=True):
                yield order + place[:, :1]


def _means(x: torch.Tensor, members: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the means of equal groups of `members` `[B, H, nodes, n]`: `[B, H, nodes g, d]`."""
    index = members.flatten(2).unflatten(-1, (members.shape[2] * groups, -1))
    sizes = torch.full((index.shape[2],), index.shape[3], device=x.device)
    return run_means(x, index, sizes).to(x.dtype)
