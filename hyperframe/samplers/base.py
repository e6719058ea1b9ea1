"""What a sampler is: probabilities over the keys. Drawing and weighing is done here, once."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..component import AbstractComponent, check_non_negative_int
from ..randomness import uniform
from ..samples import KeySample

__all__ = ["AbstractSampler"]


@dataclass(frozen=True, kw_only=True)
class AbstractSampler(AbstractComponent):
    """Base of every sampler: a frozen dataclass with one method, `density`.

    Draws are independent, by inversion of the cumulative density, and weighted by
    `-log(m p_j)`: an unbiased estimator of any column sum as long as no density is 0.
    """

    kind: ClassVar[str] = "sampler"

    @abstractmethod
    def density(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor | None:
        """Return how likely each key is to be drawn, up to a factor.

        Args:
            query: `[batch, query_heads, n_q, d]`.
            key: `[batch, key_heads, n_k, d]`.
            value: `[batch, key_heads, n_k, d_v]`.

        Returns:
            Positive, floating point `[batch, key_heads, n_k]`, or None for the uniform density.
            Under a causal mask entry `j` must not depend on later keys or values.
        """

    def sample(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        generator: torch.Generator | None = None,
    ) -> KeySample:  # fmt: skip
        """Draw `num_samples` keys for every key head, with replacement.

        Args:
            query, key, value: as in `density`.
            num_samples: number of draws `m`.
            generator: source of the draws.

        Returns:
            `index` int64 and `log_weight` float32, both `[batch, key_heads, m]`.
        """
        check_non_negative_int(self, "num_samples", num_samples)
        batch, heads, num_keys = key.shape[:3]
        density = self._checked_density(query, key, value)
        draws = uniform((batch, heads, num_samples), key.device, generator)
        if density is None:
            index = (draws * num_keys).long().clamp(max=num_keys - 1)
            weight = torch.full(index.shape, num_keys / max(1, num_samples), device=key.device)
            return KeySample(index=index, log_weight=weight.log())
        cumulative = density.double().cumsum(dim=-1)
        total = cumulative[..., -1:]
        index = torch.searchsorted(cumulative, draws * total, right=True).clamp(max=num_keys - 1)
        chosen = density.double().gather(-1, index)
        log_weight = torch.log(total) - torch.log(chosen * max(1, num_samples))
        return KeySample(index=index, log_weight=log_weight.float())

    def sample_prefixes(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        prefixes: torch.Tensor, generator: torch.Generator | None = None,
    ) -> KeySample:  # fmt: skip
        """Draw a sample of each of several prefixes of the keys.

        A prefix no longer than `num_samples` is taken whole, every key once with weight 1.

        Args:
            query, key, value: as in `density`.
            num_samples: number of draws `m` of each prefix.
            prefixes: int64 `[tiles]`, lengths.
            generator: source of the draws.

        Returns:
            `index` int64 and `log_weight` float32, both `[batch, key_heads, tiles, m]`.
        """
        check_non_negative_int(self, "num_samples", num_samples)
        batch, heads, num_keys = key.shape[:3]
        density = self._checked_density(query, key, value)
        shape = (batch, heads, len(prefixes), num_samples)
        draws = uniform(shape, key.device, generator)
        length = prefixes.clamp(min=1, max=num_keys).unsqueeze(-1)  # [T, 1]
        if density is None:
            index = torch.minimum((draws * length).long(), length - 1)
            log_weight = torch.log(length / max(1, num_samples)).expand(shape)
        else:
            cumulative = density.double().cumsum(dim=-1)
            total = cumulative[..., length.squeeze(-1) - 1].unsqueeze(-1)  # [B, H, T, 1]
            index = torch.searchsorted(cumulative, (draws * total).flatten(2), right=True)
            index = torch.minimum(index.view(shape), length - 1)
            chosen = density.double().gather(-1, index.flatten(2)).view(shape)
            log_weight = torch.log(total) - torch.log(chosen * max(1, num_samples))
        slot = torch.arange(num_samples, device=key.device)
        is_whole = prefixes.unsqueeze(-1) <= num_samples
        whole_weight = torch.where(slot < prefixes.unsqueeze(-1), 0.0, float("-inf"))
        index = torch.where(is_whole, slot.clamp(max=num_keys - 1), index)
        log_weight = torch.where(is_whole, whole_weight, log_weight.float())
        return KeySample(index=index, log_weight=log_weight)

    def _checked_density(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor | None:
        with torch.no_grad():
            return self.density(query, key, value)
