"""Samplers that are wrong in one way each, beside one that is not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from hyperframe.randomness import uniform
from hyperframe.samplers.base import AbstractSampler
from hyperframe.samples import KeySample
from tests.testing.wrong_detectors import rounded_in_place

INF = float("inf")


@dataclass(frozen=True, kw_only=True)
class ByNorm(AbstractSampler):
    """Draws by the norms of values: what a sampler has to say."""

    def density(self, query, key, value):  # type: ignore[no-untyped-def]
        return 0.1 + value.float().norm(dim=-1)


@dataclass(frozen=True, kw_only=True)
class NarrowIndex(ByNorm):
    """An int32 index."""

    def sample(self, *args: Any, **options: Any) -> Any:
        sample = super().sample(*args, **options)
        return replace(sample, index=sample.index.int())


@dataclass(frozen=True, kw_only=True)
class DoubleWeights(ByNorm):
    """Weights that are twice as large as they should be."""

    def sample(self, *args: Any, **options: Any) -> Any:
        sample = super().sample(*args, **options)
        return replace(sample, log_weight=sample.log_weight + math.log(2))


@dataclass(frozen=True, kw_only=True)
class UniformWeights(ByNorm):
    """Draws by norms and weighs as if the draws were uniform: the sum of the weights is right."""

    def sample(self, *args: Any, **options: Any) -> Any:
        sample = super().sample(*args, **options)
        weight = math.log(args[1].shape[2] / max(1, sample.num_samples))
        return replace(sample, log_weight=torch.full_like(sample.log_weight, weight))


@dataclass(frozen=True, kw_only=True)
class NoisyWeights(ByNorm):
    """Weights times noise whose mean is not 1."""

    def sample(self, *args: Any, **options: Any) -> Any:
        sample = super().sample(*args, **options)
        noise = (7 * sample.index.cumsum(dim=-1)).double().sin().float()  # no draws of its own
        return replace(sample, log_weight=sample.log_weight + 0.6 + noise)


@dataclass(frozen=True, kw_only=True)
class HeavyPrefixes(ByNorm):
    """Too large weights, but only in prefixes."""

    def sample_prefixes(self, *args: Any, **options: Any) -> Any:
        sample = super().sample_prefixes(*args, **options)
        off = torch.where(sample.log_weight == 0, 0.0, 0.3)
        return replace(sample, log_weight=sample.log_weight + off)


@dataclass(frozen=True, kw_only=True)
class NanOfZeros(ByNorm):
    """A density that is not a number where all values are zero."""

    def density(self, query, key, value):  # type: ignore[no-untyped-def]
        norm = value.float().norm(dim=-1)
        return 0.1 + norm / norm.sum(dim=-1, keepdim=True)

    def prefix_density(self, query, key, value):  # type: ignore[no-untyped-def]
        return 0.1 + value.float().norm(dim=-1)


@dataclass(frozen=True, kw_only=True)
class NanWeights(ByNorm):
    """A slot whose weight is not a number."""

    def sample_prefixes(self, *args: Any, **options: Any) -> Any:
        sample = super().sample_prefixes(*args, **options)
        weight = sample.log_weight.clone()
        weight[:, :, :1, 8:] = torch.nan  # of at least nine slots
        return replace(sample, log_weight=weight)


@dataclass(frozen=True, kw_only=True)
class AlwaysTheSame(ByNorm):
    """Draws by a seed of its own."""

    def sample(self, *args: Any, generator: Any = None, **options: Any) -> Any:
        return super().sample(*args, generator=torch.Generator().manual_seed(3), **options)


@dataclass(frozen=True, kw_only=True)
class OneHeadForAll(AbstractSampler):
    """Draws for one head, and lets all have it."""

    def density(self, query, key, value):  # type: ignore[no-untyped-def]
        return None

    def sample(self, *args: Any, **options: Any) -> Any:
        sample = super().sample(*args, **options)
        return replace(sample, index=sample.index[:1, :1].expand_as(sample.index))


@dataclass(frozen=True, kw_only=True)
class MixesHeads(ByNorm):
    """A density that is the mean over heads."""

    def density(self, query, key, value):  # type: ignore[no-untyped-def]
        norm = 0.1 + value.float().norm(dim=-1)
        return norm.mean(dim=1, keepdim=True).expand_as(norm)


@dataclass(frozen=True, kw_only=True)
class LooksAhead(ByNorm):
    """Entries of the density that depend on later values."""

    def density(self, query, key, value):  # type: ignore[no-untyped-def]
        norm = value.float().norm(dim=-1)
        return norm + norm.mean(dim=-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class AsksQueries(ByNorm):
    """Looks at queries and does not say so."""

    def density(self, query, key, value):  # type: ignore[no-untyped-def]
        norm = value.float().norm(dim=-1)
        own = query.float()[:, :: query.shape[1] // key.shape[1], :1].norm(dim=-1)
        return norm + own


@dataclass(frozen=True, kw_only=True)
class LeavesPrefixes(ByNorm):
    """Draws the key behind the one it drew."""

    def sample_prefixes(self, query, key, value, *, prefixes, **options):  # type: ignore[no-untyped-def]
        sample = super().sample_prefixes(query, key, value, prefixes=prefixes, **options)
        is_last = sample.index == prefixes.unsqueeze(-1) - 1
        next_key = (sample.index + is_last.long()).clamp(max=key.shape[2] - 1)
        is_drawn = (sample.log_weight != 0) & (sample.log_weight > -INF)
        return replace(sample, index=torch.where(is_drawn, next_key, sample.index))


@dataclass(frozen=True, kw_only=True)
class TakesShortPrefixesTwice(ByNorm):
    """Draws from short prefixes as from others."""

    def sample_prefixes(self, *args: Any, **options: Any) -> Any:
        sample = super().sample_prefixes(*args, **options)
        is_used = sample.log_weight > -INF
        first = torch.where(is_used, sample.index[..., :1], sample.index)
        whole = (sample.log_weight == 0).any(dim=-1, keepdim=True)
        return replace(sample, index=torch.where(whole, first, sample.index))


@dataclass(frozen=True, kw_only=True)
class LosesRectangles(ByNorm):
    """Forgets where the keys of a rectangle begin."""

    def sample_rectangles(self, query, key, value, *, num_samples, rectangles, **options):  # type: ignore[no-untyped-def]
        samples = [
            self.sample(query, key[:, :, a:b], value[:, :, a:b], num_samples=num_samples)
            for _, _, a, b in rectangles
        ]
        return replace(
            samples[0], index=torch.stack([s.index for s in samples], dim=2),
            log_weight=torch.stack([s.log_weight for s in samples], dim=2),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ChangesItsValues(ByNorm):
    """Rounds in place; a second call sees the same."""

    def density(self, query, key, value):  # type: ignore[no-untyped-def]
        return super().density(query, key, rounded_in_place(value))


@dataclass(frozen=True, kw_only=True)
class KeepsGradients(ByNorm):
    """Weights that carry a gradient."""

    def sample(self, query, key, value, **options):  # type: ignore[no-untyped-def]
        sample = super().sample(query, key, value, **options)
        return replace(sample, log_weight=sample.log_weight + 0 * value.float().sum())


@dataclass(frozen=True, kw_only=True)
class CountsAllKeysTwice(ByNorm):
    """Where all keys fit, takes them with a weight of two."""

    def draws(self, query, key, value, *, num_samples, **options):  # type: ignore[no-untyped-def]
        draw = super().draws(query, key, value, num_samples=num_samples, **options)
        if draw is None or num_samples < key.shape[2]:
            return draw

        def twice(prefixes: Any) -> Any:
            sample = draw(prefixes)
            return replace(sample, log_weight=sample.log_weight + math.log(2))

        return twice


@dataclass(frozen=True, kw_only=True)
class CannotBeCompiled(ByNorm):
    """Says that it takes a stream, and reads a value."""

    takes_stream = True

    def density(self, query, key, value):  # type: ignore[no-untyped-def]
        norm = 0.1 + value.float().norm(dim=-1)
        return norm if norm.sum().item() > 0 else norm + 1


@dataclass(frozen=True, kw_only=True)
class ForAllBesideAMask(ByNorm):
    """Draws the keys that no mask holds whole, and weighs as if they were all keys."""

    takes_stream = True

    def draws_for(self, mask, query, key, value, *, num_samples, generator=None):  # type: ignore[no-untyped-def]
        draw = self.draws(query, key, value, num_samples=num_samples, generator=generator)
        if draw is None or mask.is_causal or num_samples >= key.shape[2]:
            return draw
        held = mask.to_dense().all(dim=2).unflatten(1, (key.shape[1], -1)).all(dim=2)
        rest, order = (~held).sum(dim=-1, keepdim=True), held.long().argsort(dim=-1, stable=True)

        def of_rest(prefixes: Any) -> KeySample:
            place = uniform((*key.shape[:2], num_samples), key.device, generator)
            index = order.gather(-1, (place * rest).long())
            weight = torch.full(index.shape, math.log(key.shape[2] / num_samples))
            return KeySample(index=index, log_weight=weight)

        return of_rest


@dataclass(frozen=True, kw_only=True)
class NotAllBesideAMask(ByNorm):
    """Right on average, but never all keys."""

    takes_stream = True

    def draws_for(self, mask, query, key, value, *, num_samples, generator=None):  # type: ignore[no-untyped-def]
        if mask.is_causal or num_samples == 0:
            return self.draws(query, key, value, num_samples=num_samples, generator=generator)

        def of_all(prefixes: Any) -> KeySample:
            place = uniform((*key.shape[:2], num_samples), key.device, generator)
            weight = torch.full(place.shape, math.log(key.shape[2] / num_samples))
            return KeySample(index=(place * key.shape[2]).long(), log_weight=weight)

        return of_all


GROUPS = "groups_of_heads_are_independent"
BESIDE = "draws_beside_a_mask_are_true"
DEGENERATE = "degenerate_inputs_have_weights"

CASES: dict[AbstractSampler, set[str]] = {
    NarrowIndex(): {"samples_have_an_index_and_a_weight", DEGENERATE},
    DoubleWeights(): {"weights_are_true"},
    UniformWeights(): {"weights_are_true"},
    NoisyWeights(): {"weights_are_true"},
    HeavyPrefixes(): {"weights_of_prefixes_are_true"},
    NanOfZeros(): {DEGENERATE},
    # refused by name in every call that draws prefixes of nine samples or more
    NanWeights(): {
        "prefixes_are_kept",
        DEGENERATE,
        "as_many_samples_as_keys_are_exact",
        "generator_decides",
        GROUPS,
        "inputs_and_component_stay_as_they_are",
        "later_tokens_move_no_earlier_weight",
        "queries_count_only_where_declared",
        "strides_and_gradients_do_not_matter",
    },
    AlwaysTheSame(): {"generator_decides"},
    OneHeadForAll(): {"different_heads_draw_differently", "weights_are_true"},
    MixesHeads(): {GROUPS},
    LooksAhead(): {"later_tokens_move_no_earlier_weight"},
    AsksQueries(): {"queries_count_only_where_declared"},
    LeavesPrefixes(): {"prefixes_are_kept", "weights_of_prefixes_are_true"},
    TakesShortPrefixesTwice(): {"prefixes_are_kept", "as_many_samples_as_keys_are_exact"},
    LosesRectangles(): {"rectangles_are_kept"},
    ChangesItsValues(): {"inputs_and_component_stay_as_they_are"},
    KeepsGradients(): {"strides_and_gradients_do_not_matter"},
    CountsAllKeysTwice(): {"as_many_samples_as_keys_are_exact"},
    CannotBeCompiled(): {"compiles_to_one_graph"},
    ForAllBesideAMask(): {BESIDE},
    NotAllBesideAMask(): {BESIDE, "as_many_samples_as_keys_are_exact"},
}
"""Each wrong sampler with the checks that it has to fail, and no other."""
