"""Auto: centroids where making them is cheap beside what they save, uniform draws beyond."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..component import check_choice, check_non_negative_int
from ..samples import KeySample, SampleDraw
from .base import AbstractSampler
from .centroid import Centroid
from .uniform import Uniform

__all__ = ["Auto"]


@dataclass(frozen=True, kw_only=True)
class Auto(AbstractSampler):
    """Centroids up to `longest` keys, uniform draws from there on.

    Groups of similar keys halve the error of as many draws on real heads, but sorting the keys into
    groups takes longer than attending does, from some length on. What `sampler="auto"` means beside
    the detector `auto`.

    Args:
        longest: keys up to which centroids are taken.
        metric: as in `centroid`.

    Cost: that of the one taken.
    Source: docs/how-to-choose.md.

    Example:
        >>> Auto(longest=4).chosen(8).name
        'uniform'
    """

    takes_stream: ClassVar[bool] = True
    draws_keys: ClassVar[bool] = False

    longest: int = 16384
    metric: str = "query"

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_non_negative_int(self, "longest", self.longest)
        check_choice(self, "metric", self.metric, ("query", "key"))
        object.__setattr__(self, "uses_queries", self.metric == "query")

    def chosen(self, num_keys: int) -> AbstractSampler:
        """Return the sampler for a number of keys."""
        return Centroid(metric=self.metric) if num_keys <= self.longest else Uniform()

    def density(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        scale: float | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Return None: every key of a group, or every key, is equally likely."""
        return None

    def sample(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        generator: torch.Generator | None = None, scale: float | None = None,
    ) -> KeySample:  # fmt: skip
        """Draw as the chosen one does."""
        check_non_negative_int(self, "num_samples", num_samples)
        return self.chosen(key.shape[2]).sample(
            query, key, value, num_samples=num_samples, generator=generator, scale=scale
        )

    def sample_prefixes(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        prefixes: torch.Tensor, generator: torch.Generator | None = None,
        scale: float | None = None,
    ) -> KeySample:  # fmt: skip
        """Draw uniformly from prefixes; attention asks `draws`, which takes centroids."""
        check_non_negative_int(self, "num_samples", num_samples)
        return Uniform().sample_prefixes(
            query, key, value, num_samples=num_samples, prefixes=prefixes, generator=generator,
            scale=scale,
        )  # fmt: skip

    def draws(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        generator: torch.Generator | None = None, scale: float | None = None,
    ) -> SampleDraw | None:  # fmt: skip
        """Return what the chosen one draws by."""
        check_non_negative_int(self, "num_samples", num_samples)
        return self.chosen(key.shape[2]).draws(
            query, key, value, num_samples=num_samples, generator=generator, scale=scale
        )
