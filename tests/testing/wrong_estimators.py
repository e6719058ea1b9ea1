"""Estimators that are wrong in one way each, beside one that is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hyperframe.estimators.base import AbstractEstimator
from hyperframe.estimators.uniform import Uniform
from hyperframe.masks import HeavyMask
from hyperframe.rowsums import RowSumRule, RowSums
from tests.testing.wrong_detectors import rounded_in_place


@dataclass(frozen=True, kw_only=True)
class Honest(AbstractEstimator):
    """Uniform columns; `moved` is where the others go wrong."""

    def row_sums(self, query, key, mask, *, scale=None, num_samples=256, generator=None):  # type: ignore[no-untyped-def]
        sums = Uniform().row_sums(
            query, key, mask, scale=scale, num_samples=num_samples,
            generator=self.source(generator),
        ).log_sum  # fmt: skip
        return RowSums(log_sum=self.moved(sums, query, key, mask, num_samples))

    def rule(self, query, key, mask, *, scale, num_samples, generator=None):  # type: ignore[no-untyped-def]
        return RowSumRule()

    def source(self, generator: Any) -> Any:
        return generator

    def moved(
        self, sums: torch.Tensor, query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, num: int
    ) -> torch.Tensor:
        return sums


def is_estimated(mask: HeavyMask, num: int) -> bool:
    """Whether something is left to estimate."""
    rest = mask.num_queries * mask.num_keys
    if mask.is_causal:
        rest = mask.num_queries * (mask.num_queries + 1) // 2
    return num < mask.num_keys and int(mask.nnz().max()) < rest


@dataclass(frozen=True, kw_only=True)
class BelowTheMaskedPart(Honest):
    """A little less than there is."""

    def moved(self, sums, query, key, mask, num):  # type: ignore[no-untyped-def]
        return sums - 0.5 if is_estimated(mask, num) else sums


@dataclass(frozen=True, kw_only=True)
class ThreeTimesTheRest(Honest):
    """Weights that are too large."""

    def moved(self, sums, query, key, mask, num):  # type: ignore[no-untyped-def]
        return sums + 1.1 if is_estimated(mask, num) else sums


@dataclass(frozen=True, kw_only=True)
class CountsTheMaskTwice(Honest):
    """Adds the masked part to sums that have it."""

    def moved(self, sums, query, key, mask, num):  # type: ignore[no-untyped-def]
        generator = torch.Generator()
        held = Uniform().row_sums(query, key, mask, num_samples=0, generator=generator).log_sum
        return torch.logaddexp(sums, held)


@dataclass(frozen=True, kw_only=True)
class DropsTheOverlap(Honest):
    """Forgets some of what was sampled where every key is."""

    def moved(self, sums, query, key, mask, num):  # type: ignore[no-untyped-def]
        is_last = 40 == num == mask.num_keys and int(mask.nnz().max()) < 800
        return sums - 0.01 if is_last else sums


@dataclass(frozen=True, kw_only=True)
class IntegerSums(Honest):
    """Row sums in whole numbers of nats for half precision."""

    def moved(self, sums, query, key, mask, num):  # type: ignore[no-untyped-def]
        return sums.round().int() if query.dtype == torch.float16 else sums


@dataclass(frozen=True, kw_only=True)
class DrawsFromElsewhere(Honest):
    """Random, but not by the generator it is given."""

    def source(self, generator: Any) -> Any:
        return torch.Generator().manual_seed(torch.initial_seed())


@dataclass(frozen=True, kw_only=True)
class IgnoresTheGenerator(Honest):
    """The same draws in every call, whatever it is given."""

    def source(self, generator: Any) -> Any:
        return torch.Generator().manual_seed(0)


@dataclass(frozen=True, kw_only=True)
class ATenthTooMuch(Honest):
    """Says that it is unbiased; what is left to estimate counts for more."""

    is_unbiased = True

    def row_sums(self, query, key, mask, **options):  # type: ignore[no-untyped-def]
        return super().row_sums(query, key, mask, **options)

    def moved(self, sums, query, key, mask, num):  # type: ignore[no-untyped-def]
        return sums + 0.1 if is_estimated(mask, num) else sums


@dataclass(frozen=True, kw_only=True)
class ATenthTooLittle(ATenthTooMuch):
    """The same, too small, but never below the masked part."""

    is_unbiased = True

    def row_sums(self, query, key, mask, **options):  # type: ignore[no-untyped-def]
        return super().row_sums(query, key, mask, **options)

    def moved(self, sums, query, key, mask, num):  # type: ignore[no-untyped-def]
        held = Uniform().row_sums(query, key, mask, num_samples=0).log_sum
        return torch.maximum(sums - 0.1, held) if is_estimated(mask, num) else sums


@dataclass(frozen=True, kw_only=True)
class LooksAtTheLastKey(Honest):
    """The last key moves all rows."""

    def moved(self, sums, query, key, mask, num):  # type: ignore[no-untyped-def]
        last = key[:, :, -1:].abs().sum(dim=-1).repeat_interleave(
            query.shape[1] // key.shape[1], dim=1
        )  # fmt: skip
        return sums + 0.01 * last if is_estimated(mask, num) else sums


@dataclass(frozen=True, kw_only=True)
class LooksAtTheLastQuery(Honest):
    """The last query moves all rows, and nothing says so."""

    def moved(self, sums, query, key, mask, num):  # type: ignore[no-untyped-def]
        last = query[:, :, -1:].abs().sum(dim=-1)
        return sums + 0.01 * last if is_estimated(mask, num) else sums


@dataclass(frozen=True, kw_only=True)
class MixesBatchItems(Honest):
    """Rows that depend on the same row of other batch items."""

    def moved(self, sums, query, key, mask, num):  # type: ignore[no-untyped-def]
        own = query.abs().sum(dim=-1).mean(dim=0, keepdim=True)
        return sums + 0.01 * own if is_estimated(mask, num) else sums


@dataclass(frozen=True, kw_only=True)
class AnotherRule(Honest):
    """A rule that is not what `row_sums` says."""

    def rule(self, query, key, mask, *, scale, num_samples, generator=None):  # type: ignore[no-untyped-def]
        sums = self.row_sums(
            query, key, mask, scale=scale, num_samples=num_samples, generator=generator
        )
        return RowSumRule(log_sum=sums.log_sum + 0.2)


@dataclass(frozen=True, kw_only=True)
class FloorsEverything(Honest):
    """A floor where nothing is sampled."""

    def rule(self, query, key, mask, *, scale, num_samples, generator=None):  # type: ignore[no-untyped-def]
        return RowSumRule(log_floor=torch.full(query.shape[:3], 99.0, dtype=query.dtype))


@dataclass(frozen=True, kw_only=True)
class ChangesItsKeys(Honest):
    """Rounds in place; a second call sees the same."""

    def row_sums(self, query, key, mask, **options):  # type: ignore[no-untyped-def]
        return super().row_sums(query, rounded_in_place(key), mask, **options)


@dataclass(frozen=True, kw_only=True)
class RemembersItsCalls(Honest):
    """Keeps the sums of the last call."""

    def moved(self, sums, query, key, mask, num):  # type: ignore[no-untyped-def]
        object.__setattr__(self, "last", len(sums))
        return sums


@dataclass(frozen=True, kw_only=True)
class GoesByLayout(Honest):
    """Sums that depend on how queries are laid out."""

    def moved(self, sums, query, key, mask, num):  # type: ignore[no-untyped-def]
        return sums if query.is_contiguous() else sums + 0.01


LATER_KEYS = "later_keys_move_no_earlier_row"
LATER_QUERIES = "later_queries_count_only_where_declared"
STAY = "inputs_and_component_stay_as_they_are"
SHARES = "groups_of_heads_are_independent"

CASES: dict[AbstractEstimator, set[str]] = {
    BelowTheMaskedPart(): {"sums_are_not_below_the_masked_part"},
    ThreeTimesTheRest(): {"equal_scores_are_counted"},
    CountsTheMaskTwice(): {"full_mask_is_exact", "every_key_sampled_is_exact"},
    DropsTheOverlap(): {"every_key_sampled_is_exact"},
    IntegerSums(): {"row_sums_have_their_form"},
    DrawsFromElsewhere(): {"generator_decides"},
    IgnoresTheGenerator(): {"generator_decides"},
    ATenthTooMuch(): {"sums_are_right_on_average"},
    ATenthTooLittle(): {"sums_are_right_on_average"},
    LooksAtTheLastKey(): {LATER_KEYS, LATER_QUERIES},
    LooksAtTheLastQuery(): {LATER_QUERIES},
    MixesBatchItems(): {SHARES},
    AnotherRule(): {"rule_normalises_attention"},
    FloorsEverything(): {"rule_normalises_attention"},
    ChangesItsKeys(): {STAY},
    RemembersItsCalls(): {STAY},
    GoesByLayout(): {"strides_do_not_matter"},
}
"""Each wrong estimator with the checks that it has to fail, and no other."""
