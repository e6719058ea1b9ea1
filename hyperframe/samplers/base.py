"""What a sampler is: probabilities over the keys. Drawing and weighing is done here, once."""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..component import AbstractComponent, check_non_negative_int
from ..errors import ArgumentError, ArgumentTypeError
from ..masks import HeavyMask
from ..plugins import described, is_built_in
from ..randomness import (
    check_generator,
    draws_in_prefixes,
    draws_in_ranges,
    uniform,
    with_generator,
)
from ..rectangles import Places
from ..samples import KeySample, SampleDraw
from ..validation import check_inputs, may_look_at
from .answers import with_checked_answer
from .distinct import distinct_in_prefixes, distinct_places, distinct_sample
from .independent import SMALLEST_SHARE, independent_in_prefixes, independent_sample
from .places import rectangle_table, uniform_weight, whole_where_short

__all__ = ["AbstractSampler"]


@dataclass(frozen=True, kw_only=True)
class AbstractSampler(AbstractComponent):
    """Base of every sampler: a frozen dataclass with one method, `density`.

    Every method is called with `scale`, the factor of the logits. A method that was written without
    such an argument is called without.

    Draws are independent, by inversion of the cumulative density, and weighted by
    `-log(m p_j)`. So that every column can be drawn and no weight is far above `100 n / m`,
    densities below one hundredth of their mean count as that much; draws from a prefix mix in one
    hundredth of the uniform density instead. The estimator of any column sum is then unbiased.

    A subclass with a field `replacement` draws no key twice where that is False, and weighs by
    `1 / pi_j`, the inverse of the probability that a key is among the drawn ones: see `distinct`.

    Attributes:
        uses_queries: the density looks at queries; refused under `strict_causal=True`, where
            later queries must not move the draws of earlier rows.
        takes_stream: `generator` may be a `Stream`; see `AbstractDetector`. Of no concern to a
            sampler that has a density and draws as this class does.
        draws_keys: what attention gets are keys; False where it gets groups of keys instead.
    """

    kind: ClassVar[str] = "sampler"
    uses_queries: ClassVar[bool] = False
    takes_stream: ClassVar[bool] = True
    draws_keys: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """See to scale and source of draws where a subclass draws in a way of its own."""
        super().__init_subclass__(**kwargs)
        for name in {"density", "prefix_density"} & cls.__dict__.keys():
            setattr(cls, name, _with_scale(cls.__dict__[name]))
        if "density" in cls.__dict__ and "prefix_density" not in cls.__dict__:
            # what a parent says of prefixes is not this class's density
            cls.prefix_density = AbstractSampler.prefix_density  # type: ignore[method-assign]
        for name in ("sample", "sample_prefixes", "sample_rectangles", "draws", "draws_for"):
            method = cls.__dict__.get(name)
            if method is not None:
                method = _with_scale(method)
                if not is_built_in(cls):
                    method = with_checked_answer(name, method)
                setattr(cls, name, with_generator(method))
                cls.takes_stream = cls.__dict__.get("takes_stream", False)
        own = {"density", "sample", "draws", "draws_for"} & cls.__dict__.keys()
        if own and "sample_rectangles" not in cls.__dict__:
            # what a parent draws for all rectangles is not what this class draws for one
            cls.sample_rectangles = AbstractSampler.sample_rectangles  # type: ignore[method-assign]

    @abstractmethod
    def density(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        scale: float | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Return how likely each key is to be drawn, up to a factor.

        Args:
            query: `[batch, query_heads, n_q, d]`.
            key: `[batch, key_heads, n_k, d]`.
            value: `[batch, key_heads, n_k, d_v]`.
            scale: factor of the logits; None is `1 / sqrt(d)`.

        Returns:
            Not negative, finite, floating point `[batch, key_heads, n_k]`, or None for the
            uniform density. Entry `j` must not depend on keys or values after `j`, unless the
            sampler has a `prefix_density` or a `sample_prefixes` of its own.
        """

    def prefix_density(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        scale: float | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Return the density by which prefixes are sampled: `density`, unless it is overridden.

        Entry `j` must not depend on keys or values after `j`.
        """
        return self.density(query, key, value, scale=scale)

    def sample(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        generator: torch.Generator | None = None, scale: float | None = None,
    ) -> KeySample:  # fmt: skip
        """Draw `num_samples` keys for every key head.

        Args:
            query: as in `density`.
            key: as in `density`.
            value: as in `density`.
            num_samples: number of draws `m`.
            generator: source of the draws.
            scale: as in `density`.

        Returns:
            `index` int64 and `log_weight` float32, both `[batch, key_heads, m]`. Without
            replacement, of at most `m` keys each is taken once, and slots left over weigh nothing.
        """
        check_non_negative_int(self, "num_samples", num_samples)
        check_inputs(query, key, value)
        check_generator(generator)
        batch, heads, num_keys = key.shape[:3]
        density = self._checked_density(self.density, query, key, value, scale)
        if density is not None:
            floor = SMALLEST_SHARE * density.mean(dim=-1, keepdim=True)
            density = torch.maximum(density, floor)
            density = torch.where(density.amax(dim=-1, keepdim=True) > 0, density, 1.0)
        if not self._may_repeat:
            shape = (batch, heads, num_keys)
            return distinct_sample(density, shape, num_samples, key.device, generator)
        draws = uniform((batch, heads, num_samples), key.device, generator)
        if density is None:
            # below num_keys: rounding never takes the product of a draw of 53 bits up to it
            index = (draws * num_keys).long()
            weight = uniform_weight(num_keys, num_samples, key.device)
            return KeySample(index=index, log_weight=weight.expand(index.shape))
        return independent_sample(density, draws)

    def sample_prefixes(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        prefixes: torch.Tensor, generator: torch.Generator | None = None,
        scale: float | None = None,
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
            prefixes: int64 `[tiles]`, ascending lengths, not to be written to; the rows of a tile
                see more keys than the prefix of the tile before it (of the first tile: than
                `n_k - n_q`).
            generator: source of the draws.
            scale: as in `density`.

        Returns:
            `index` int64 and `log_weight` float32, both `[batch, key_heads, tiles, m]`.
        """
        check_non_negative_int(self, "num_samples", num_samples)
        check_inputs(query, key, value)
        check_generator(generator)
        batch, heads, num_keys = key.shape[:3]
        density = self._checked_density(self.prefix_density, query, key, value, scale)
        shape = (batch, heads, len(prefixes), num_samples)
        if density is None and self._may_repeat:
            index, log_weight = draws_in_prefixes(prefixes, shape, num_keys, generator)
            return KeySample(index=index, log_weight=log_weight.expand(shape))
        length = prefixes.clamp(min=1, max=num_keys).unsqueeze(-1)  # [T, 1]
        if density is None:
            draws = uniform(shape, key.device, generator)
            index = torch.minimum(distinct_places(draws, length), length - 1)
            log_weight = torch.log(length / max(1, num_samples))
            return whole_where_short(index, log_weight, prefixes, num_keys)
        before = prefixes.new_full((1,), max(0, num_keys - query.shape[2]))
        seen = torch.cat([before, prefixes[:-1]]).unsqueeze(-1).minimum(length)  # [T, 1]
        if self._may_repeat:
            draws = uniform(shape, key.device, generator)
            sample = independent_in_prefixes(density, length, seen, draws)
        else:
            start = uniform((*shape[:3], 1), key.device, generator)
            sample = distinct_in_prefixes(density, length, seen, start, num_samples)
        return whole_where_short(sample.index, sample.log_weight, prefixes, num_keys)

    def sample_rectangles(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        rectangles: tuple[Places, ...], generator: torch.Generator | None = None,
        scale: float | None = None,
    ) -> KeySample | None:  # fmt: skip
        """Draw a sample of the keys of each of several rectangles, if they are drawn uniformly.

        A sampler that can draw for all rectangles at once in a way of its own overrides this; the
        causal recursion then attends in all levels at once where the detector can, too. A rectangle
        of at most `num_samples` keys is taken whole, every key once with weight 1.

        Args:
            query: as in `density`.
            key: as in `density`.
            value: as in `density`.
            num_samples: number of draws `m` for each rectangle, at least 1.
            rectangles: `(query_start, query_stop, key_start, key_stop)` positions of each.
            generator: source of the draws.
            scale: as in `density`.

        Returns:
            `index` int64 and `log_weight` float32, both `[batch, key_heads, rectangles, m]`; None
            for a sampler that has a density or draws in a way of its own. (A class that overrides
            `density`, `sample`, `draws` or `draws_for` does not inherit the method of its parent.)
        """
        this, base = type(self), AbstractSampler
        own = (this.sample, this.draws, this.draws_for)
        if own != (base.sample, base.draws, base.draws_for):
            return None
        if self._checked_density(self.density, query, key, value, scale) is not None:
            return None
        table = rectangle_table(rectangles, num_samples, key.device)
        shape = (*key.shape[:2], len(rectangles), num_samples)
        if self._may_repeat:
            found = draws_in_ranges(table.start, table.length, shape, generator)
            if found is not None:
                return KeySample(index=found, log_weight=table.log_weight.expand(shape))
        draws = uniform(shape, key.device, generator)
        if self._may_repeat:
            index = (draws * table.length).long() + table.start
        else:
            index = distinct_places(draws, table.length) + table.start
        if table.is_whole is not None and table.whole is not None:
            index = torch.where(table.is_whole, table.whole, index)
        return KeySample(index=index, log_weight=table.log_weight.expand(shape))

    @property
    def needs_mask(self) -> bool:
        """Whether what is drawn depends on the mask, so that only `draws_for` can be asked."""
        return False

    @property
    def _may_repeat(self) -> bool:
        return bool(getattr(self, "replacement", True))

    def _checked_density(
        self, of: Callable[..., torch.Tensor | None], query: torch.Tensor, key: torch.Tensor,
        value: torch.Tensor, scale: float | None,
    ) -> torch.Tensor | None:  # fmt: skip
        with torch.no_grad():
            density = of(query, key, value, scale=scale)
        if density is None:
            return None
        given: object = density
        if not isinstance(given, torch.Tensor):
            raise ArgumentTypeError(
                f"{described(self)}: its density is a {type(given).__name__}; return a tensor "
                "[batch, key_heads, n_k], or None for the uniform density"
            )
        if density.shape != key.shape[:3] or not density.is_floating_point():
            raise ArgumentError(
                f"{described(self)}: its density has shape {tuple(density.shape)} and dtype "
                f"{density.dtype}; it must be floating point [batch, key_heads, n_k] = "
                f"{tuple(key.shape[:3])}"
            )
        if _can_look_at(density) and not bool((density >= 0).all() & density.isfinite().all()):
            raise ArgumentError(
                f"{described(self)}: its density is negative or not finite somewhere (smallest "
                f"value {float(density.min())}, largest {float(density.max())}); look for NaN in "
                "the inputs, or clamp it"
            )
        return density.double()

    def draws(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        generator: torch.Generator | None = None, scale: float | None = None,
    ) -> SampleDraw | None:  # fmt: skip
        """Return the function by which `build_plans` draws the residual; None for no samples.

        Where there are no more keys than samples, all of them are taken once with weight 1.

        Args:
            query: as in `density`.
            key: as in `density`.
            value: as in `density`.
            num_samples: number of draws `m`.
            generator: source of the draws.
            scale: as in `density`.
        """
        if num_samples == 0:
            return None
        num_keys = key.shape[2]

        def draw(prefixes: torch.Tensor | None) -> KeySample:
            if prefixes is not None:
                sample = self.sample_prefixes(
                    query, key, value, num_samples=num_samples, prefixes=prefixes,
                    generator=generator, scale=scale,
                )  # fmt: skip
            elif num_samples >= num_keys:
                index = torch.arange(num_keys, device=key.device).expand(*key.shape[:2], -1)
                sample = KeySample(index=index, log_weight=torch.zeros_like(index).float())
            else:
                sample = self.sample(
                    query, key, value, num_samples=num_samples, generator=generator, scale=scale
                )
            index = sample.index
            if _can_look_at(index) and bool(((index < 0) | (index >= num_keys)).any()):
                raise ArgumentError(
                    f"{self.name}: it drew a key outside 0..{num_keys - 1} (largest index "
                    f"{int(index.max())}); clamp what it returns"
                )
            return sample

        return draw

    def draws_for(
        self, mask: HeavyMask, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        num_samples: int, generator: torch.Generator | None = None, scale: float | None = None,
    ) -> SampleDraw | None:  # fmt: skip
        """Return the function by which attention draws beside a mask: `draws`, unless overridden.

        Args:
            mask: what the detector found, for the same query and key.
            query: as in `density`.
            key: as in `density`.
            value: as in `density`.
            num_samples: number of draws `m`.
            generator: source of the draws.
            scale: as in `density`.
        """
        return self.draws(
            query, key, value, num_samples=num_samples, generator=generator, scale=scale
        )


def _with_scale(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method be called with `scale=` that was written without such an argument."""
    parameters = inspect.signature(method).parameters.values()
    if any(x.name == "scale" or x.kind is x.VAR_KEYWORD for x in parameters):
        return method

    @functools.wraps(method)
    def called(*args: Any, scale: float | None = None, **options: Any) -> Any:
        return method(*args, **options)

    return called


def _can_look_at(tensor: torch.Tensor) -> bool:
    """Whether values may be read: on other devices every call would wait, a graph would break."""
    return may_look_at(tensor)
