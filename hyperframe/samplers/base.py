"""What a sampler is: probabilities over the keys. Drawing and weighing is done here, once."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..component import AbstractComponent, check_non_negative_int
from ..errors import ArgumentError
from ..randomness import uniform
from ..samples import KeySample, SampleDraw
from ..validation import check_generator, check_inputs

__all__ = ["AbstractSampler"]

_SMALLEST_SHARE = 1e-2


@dataclass(frozen=True, kw_only=True)
class AbstractSampler(AbstractComponent):
    """Base of every sampler: a frozen dataclass with one method, `density`.

    Draws are independent, by inversion of the cumulative density, and weighted by
    `-log(m p_j)`. So that every column can be drawn and no weight is far above `100 n / m`,
    densities below one hundredth of their mean count as that much; draws from a prefix mix in one
    hundredth of the uniform density instead. The estimator of any column sum is then unbiased.

    Attributes:
        uses_queries: the density looks at queries; refused under `strict_causal=True`, where
            later queries must not move the draws of earlier rows.
    """

    kind: ClassVar[str] = "sampler"
    uses_queries: ClassVar[bool] = False

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
            Not negative, finite, floating point `[batch, key_heads, n_k]`, or None for the
            uniform density. Entry `j` must not depend on keys or values after `j`.
        """

    def sample(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        generator: torch.Generator | None = None,
    ) -> KeySample:  # fmt: skip
        """Draw `num_samples` keys for every key head, with replacement.

        Args:
            query: as in `density`.
            key: as in `density`.
            value: as in `density`.
            num_samples: number of draws `m`.
            generator: source of the draws.

        Returns:
            `index` int64 and `log_weight` float32, both `[batch, key_heads, m]`.
        """
        check_non_negative_int(self, "num_samples", num_samples)
        check_inputs(query, key, value)
        check_generator(generator)
        batch, heads, num_keys = key.shape[:3]
        density = self._checked_density(query, key, value)
        draws = uniform((batch, heads, num_samples), key.device, generator)
        if density is None:
            index = (draws * num_keys).long().clamp(max=num_keys - 1)
            weight = torch.full(index.shape, num_keys / max(1, num_samples), device=key.device)
            return KeySample(index=index, log_weight=weight.log())
        density = torch.maximum(density, _SMALLEST_SHARE * density.mean(dim=-1, keepdim=True))
        density = torch.where(density.amax(dim=-1, keepdim=True) > 0, density, 1.0)
        cumulative = density.cumsum(dim=-1)
        total = cumulative[..., -1:]
        index = torch.searchsorted(cumulative, draws * total, right=True).clamp(max=num_keys - 1)
        chosen = density.gather(-1, index)
        log_weight = torch.log(total) - torch.log(chosen * max(1, num_samples))
        return KeySample(index=index, log_weight=log_weight.float())

    def sample_prefixes(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        prefixes: torch.Tensor, generator: torch.Generator | None = None,
    ) -> KeySample:  # fmt: skip
        """Draw a sample of each of several prefixes of the keys.

        A prefix no longer than `num_samples` is taken whole, every key once with weight 1. Of a
        longer one, the keys that all rows of the tile see are drawn by the density. The others,
        about as many as the tile has rows, each get the mean density of those before: the density
        of a key that some row of the tile must not see would move the weights of that row.

        Args:
            query: as in `density`.
            key: as in `density`.
            value: as in `density`.
            num_samples: number of draws `m` of each prefix.
            prefixes: int64 `[tiles]`, ascending lengths; the rows of a tile see more keys than
                the prefix of the tile before it (of the first tile: than `n_k - n_q`).
            generator: source of the draws.

        Returns:
            `index` int64 and `log_weight` float32, both `[batch, key_heads, tiles, m]`.
        """
        check_non_negative_int(self, "num_samples", num_samples)
        check_inputs(query, key, value)
        check_generator(generator)
        batch, heads, num_keys = key.shape[:3]
        density = self._checked_density(query, key, value)
        shape = (batch, heads, len(prefixes), num_samples)
        draws = uniform(shape, key.device, generator)
        length = prefixes.clamp(min=1, max=num_keys).unsqueeze(-1)  # [T, 1]
        if density is None:
            index = torch.minimum((draws * length).long(), length - 1)
            log_weight = torch.log(length / max(1, num_samples)).expand(shape)
        else:
            before = prefixes.new_tensor([max(0, num_keys - query.shape[2])])
            seen = torch.cat([before, prefixes[:-1]]).unsqueeze(-1).minimum(length)  # [T, 1]
            cumulative = density.cumsum(dim=-1)
            total = cumulative[..., seen.squeeze(-1).clamp(min=1) - 1].unsqueeze(-1)  # [B, H, T, 1]
            # [0, length) is cut into: seen keys by density | seen keys uniformly | unseen keys
            place = draws * length
            share = (total > 0).double() * (1 - _SMALLEST_SHARE) * seen
            by_density = place < share
            target = torch.where(by_density, place / share.clamp(min=1e-300) * total, 0.0)
            index = torch.searchsorted(cumulative, target.flatten(2), right=True).view(shape)
            uniformly = (place - share) / (seen - share).clamp(min=1e-300) * seen
            index = torch.where(
                by_density, index, torch.where(place < seen, uniformly, place).long()
            )
            is_seen = place < seen
            index = torch.where(is_seen, torch.minimum(index, seen - 1), index)
            index = torch.minimum(index, length - 1)
            density_at = density.gather(-1, index.flatten(2)).view(shape)
            # times length: how much likelier than uniform the key is drawn
            gain = share * density_at / total.clamp(min=1e-300) + (seen - share) / seen.clamp(min=1)
            gain = torch.where(index < seen, gain, 1.0)
            log_weight = torch.log(length / max(1, num_samples)) - torch.log(gain)
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
            density = self.density(query, key, value)
        if density is None:
            return None
        if density.shape != key.shape[:3] or not density.is_floating_point():
            raise ArgumentError(
                f"{self.name}: its density has shape {tuple(density.shape)} and dtype "
                f"{density.dtype}; it must be floating point [batch, key_heads, n_k] = "
                f"{tuple(key.shape[:3])}"
            )
        # elsewhere than on the CPU, looking at values would make every call wait
        if density.device.type == "cpu" and not bool(
            (density >= 0).all() & density.isfinite().all()
        ):
            raise ArgumentError(
                f"{self.name}: its density is negative or not finite somewhere (smallest value "
                f"{float(density.min())}, largest {float(density.max())}); look for NaN in the "
                "inputs, or clamp it"
            )
        return density.double()

    def draws(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        generator: torch.Generator | None = None,
    ) -> SampleDraw | None:  # fmt: skip
        """Return the function by which `build_plans` draws the residual; None for no samples.

        Where there are no more keys than samples, all of them are taken once with weight 1.

        Args:
            query: as in `density`.
            key: as in `density`.
            value: as in `density`.
            num_samples: number of draws `m`.
            generator: source of the draws.
        """
        if num_samples == 0:
            return None
        num_keys = key.shape[2]

        def draw(prefixes: torch.Tensor | None) -> KeySample:
            if prefixes is not None:
                sample = self.sample_prefixes(
                    query, key, value, num_samples=num_samples, prefixes=prefixes,
                    generator=generator,
                )  # fmt: skip
            elif num_samples >= num_keys:
                index = torch.arange(num_keys, device=key.device).expand(*key.shape[:2], -1)
                sample = KeySample(index=index, log_weight=torch.zeros_like(index).float())
            else:
                sample = self.sample(
                    query, key, value, num_samples=num_samples, generator=generator
                )
            index = sample.index
            if index.device.type == "cpu" and bool(((index < 0) | (index >= num_keys)).any()):
                raise ArgumentError(
                    f"{self.name}: it drew a key outside 0..{num_keys - 1} (largest index "
                    f"{int(index.max())}); clamp what it returns"
                )
            return sample

        return draw
