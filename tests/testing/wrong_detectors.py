"""Detectors that are wrong in one way each, beside one that is not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from hyperframe.detectors.base import AbstractDetector, default_scale
from hyperframe.masks import HeavyMask, ListMask

INF = float("inf")


def rounded_in_place(tensor: torch.Tensor) -> torch.Tensor:
    """Round single precision to seven bits, where it is stored."""
    if not tensor.is_contiguous() or tensor.dtype != torch.float32:
        return tensor
    with torch.no_grad():
        return tensor.copy_(tensor.bfloat16())


@dataclass(frozen=True, kw_only=True)
class Honest(AbstractDetector):
    """The best keys of each row. What is wrong below is wrong in one of these methods."""

    is_row_local: ClassVar[bool] = True
    row_budget: ClassVar[str | None] = "budget"

    budget: int = 4

    def find(self, query, key, *, scale=None, is_causal=False, generator=None):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            logits = self.logits(query, self.spread(key, query.shape[1]), scale)
            dense = self.chosen(logits, is_causal, generator)
        return self.mask(dense, is_causal)

    def spread(self, key: torch.Tensor, heads: int) -> torch.Tensor:
        return key.repeat_interleave(heads // key.shape[1], dim=1)

    def logits(self, query: torch.Tensor, key: torch.Tensor, scale: float | None) -> torch.Tensor:
        return default_scale(query, scale) * query.float() @ key.float().mT

    def chosen(self, logits: torch.Tensor, is_causal: bool, generator: Any) -> torch.Tensor:
        if is_causal:
            logits = logits.masked_fill(~self.visible(logits), -INF)
        return self.best(logits, self.budget) & (logits > -INF)

    def best(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        index = logits.topk(min(count, logits.shape[-1]), dim=-1).indices
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, index, True)

    def visible(self, logits: torch.Tensor) -> torch.Tensor:
        rows, keys = logits.shape[-2:]
        return torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)

    def mask(self, dense: torch.Tensor, is_causal: bool) -> HeavyMask:
        return ListMask.from_dense(dense, is_causal=is_causal)


@dataclass(frozen=True, kw_only=True)
class LooksAtLaterKeys(Honest):
    """Chooses among all keys and drops the later ones afterwards."""

    is_row_local: ClassVar[bool] = False

    def chosen(self, logits, is_causal, generator):  # type: ignore[no-untyped-def]
        return self.best(logits, self.budget) & (self.visible(logits) | (not is_causal))


@dataclass(frozen=True, kw_only=True)
class PoolsAllQueries(Honest):
    """Says that rows are local, and lets all rows vote."""

    def logits(self, query, key, scale):  # type: ignore[no-untyped-def]
        return super().logits(query + query.mean(dim=2, keepdim=True), key, scale)


@dataclass(frozen=True, kw_only=True)
class StrictInNameOnly(PoolsAllQueries):
    """Says nothing of rows, but has a strict form in which all rows vote."""

    is_row_local: ClassVar[bool] = False

    def find_strict(self, query, key, *, earlier_query=None, **options):  # type: ignore[no-untyped-def]
        return self.find(query, key, **options)


@dataclass(frozen=True, kw_only=True)
class ChangesItsKeys(Honest):
    """Rounds in place; a second call sees the same."""

    def spread(self, key, heads):  # type: ignore[no-untyped-def]
        return super().spread(rounded_in_place(key), heads)


@dataclass(frozen=True, kw_only=True)
class RemembersItsCalls(Honest):
    """Keeps the logits of the last call."""

    def best(self, logits, count):  # type: ignore[no-untyped-def]
        object.__setattr__(self, "last", logits)
        return super().best(logits, count)


@dataclass(frozen=True, kw_only=True)
class DrawsFromElsewhere(Honest):
    """Random, but not by the generator it is given."""

    def logits(self, query, key, scale):  # type: ignore[no-untyped-def]
        own = torch.Generator().manual_seed(torch.initial_seed())
        return super().logits(query, key, scale) + torch.rand(key.shape[2], generator=own)


@dataclass(frozen=True, kw_only=True)
class IgnoresTheGenerator(Honest):
    """The same draws in every call, whatever it is given."""

    def logits(self, query, key, scale):  # type: ignore[no-untyped-def]
        own = torch.Generator().manual_seed(0)
        return super().logits(query, key, scale) + torch.rand(key.shape[2], generator=own)


@dataclass(frozen=True, kw_only=True)
class SeedsFromTheGenerator(Honest):
    """Right: its own generator begins with a draw of the one it is given."""

    def chosen(self, logits, is_causal, generator):  # type: ignore[no-untyped-def]
        seed = int(torch.randint(1 << 30, (), generator=generator))
        own = torch.Generator().manual_seed(seed)
        noise = torch.rand(logits.shape[3], generator=own)
        return super().chosen(logits + noise, is_causal, generator)


@dataclass(frozen=True, kw_only=True)
class HasASeed(IgnoresTheGenerator):
    """Right: its draws are those of a parameter."""

    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RaisesBeforeAnything(Honest):
    """Looks for a head that is not there, by a function of torch."""

    def logits(self, query, key, scale):  # type: ignore[no-untyped-def]
        return super().logits(torch.select(query, 1, query.shape[1]), key, scale)


@dataclass(frozen=True, kw_only=True)
class UsesUpGlobalDraws(Honest):
    """Moves torch's global generator, for nothing."""

    def best(self, logits, count):  # type: ignore[no-untyped-def]
        torch.rand(1)
        return super().best(logits, count)


@dataclass(frozen=True, kw_only=True)
class MixesHeads(Honest):
    """Adds the mean over heads."""

    def logits(self, query, key, scale):  # type: ignore[no-untyped-def]
        logits = super().logits(query, key, scale)
        return logits + logits.mean(dim=1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class MixesBatchItems(Honest):
    """Adds the mean over the batch."""

    def logits(self, query, key, scale):  # type: ignore[no-untyped-def]
        logits = super().logits(query, key, scale)
        return logits + logits.mean(dim=0, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class IgnoresGroups(Honest):
    """Query head h looks at key head h % Hkv, which is right only without groups."""

    def spread(self, key, heads):  # type: ignore[no-untyped-def]
        return key.repeat(1, heads // key.shape[1], 1, 1)


class _CountsSlots(ListMask):
    def nnz(self) -> torch.Tensor:
        return super().nnz() + 1


@dataclass(frozen=True, kw_only=True)
class Miscounts(Honest):
    """Its mask counts one entry too many."""

    def mask(self, dense, is_causal):  # type: ignore[no-untyped-def]
        return _CountsSlots.from_dense(dense, is_causal=is_causal)


class _HidesAKey(ListMask):
    def _rows(self, start: int, stop: int) -> torch.Tensor:
        dense = super()._rows(start, stop)
        dense[..., 3:4] = False
        return dense


@dataclass(frozen=True, kw_only=True)
class HoldsMoreThanItShows(Honest):
    """Its mask has a key in its lists that its dense form has not."""

    def mask(self, dense, is_causal):  # type: ignore[no-untyped-def]
        return _HidesAKey.from_dense(dense, is_causal=is_causal)


class _UnitesWithNothing(ListMask):
    def __or__(self, other: HeavyMask) -> HeavyMask:
        return self


@dataclass(frozen=True, kw_only=True)
class BreaksUnions(Honest):
    """Its mask united with another is itself."""

    def mask(self, dense, is_causal):  # type: ignore[no-untyped-def]
        return _UnitesWithNothing.from_dense(dense, is_causal=is_causal)


@dataclass(frozen=True, kw_only=True)
class ExceedsItsBudget(Honest):
    """Holds one key more than it says."""

    def best(self, logits, count):  # type: ignore[no-untyped-def]
        return super().best(logits, count + 1)


@dataclass(frozen=True, kw_only=True)
class HasNoSpec(Honest):
    """A parameter that is no literal: a spec string cannot say it."""

    dtype: Any = torch.float32


@dataclass(frozen=True, kw_only=True)
class ForgetsAParameter(Honest):
    """A field that is no parameter."""

    extra: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", self.budget + 1)


class Undecorated(Honest):
    """Not a dataclass of its own."""

    step: int = 3


@dataclass(frozen=True, kw_only=True)
class ReadsStorage(Honest):
    """Takes for granted how keys are laid out."""

    def spread(self, key, heads):  # type: ignore[no-untyped-def]
        wide = torch.as_strided(
            key.float() if key.is_contiguous() else key.detach(), key.shape,
            torch.empty(key.shape).stride(),
        ) if key.shape[-1] == 8 and key.stride(-1) > 1 else key  # fmt: skip
        return super().spread(wide, heads)


@dataclass(frozen=True, kw_only=True)
class KnowsOnlyWideTypes(Honest):
    """Goes through NumPy, which has no bfloat16."""

    def spread(self, key, heads):  # type: ignore[no-untyped-def]
        return super().spread(torch.from_numpy(key.detach().numpy()), heads)


@dataclass(frozen=True, kw_only=True)
class NeedsManyKeys(Honest):
    """Asks for more keys than there may be."""

    def best(self, logits, count):  # type: ignore[no-untyped-def]
        index = logits.topk(count, dim=-1).indices
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, index, True)


@dataclass(frozen=True, kw_only=True)
class DividesByNorms(Honest):
    """Has no answer where a norm is 0."""

    def logits(self, query, key, scale):  # type: ignore[no-untyped-def]
        logits = super().logits(query, key / key.norm(dim=-1, keepdim=True), scale)
        int(logits.max())  # NaN has no integer
        return logits


@dataclass(frozen=True, kw_only=True)
class FindsTheLightest(Honest):
    """Claims columns and holds the smallest entries."""

    finds: ClassVar[tuple[str, ...]] = ("columns",)

    def logits(self, query, key, scale):  # type: ignore[no-untyped-def]
        return -super().logits(query, key, scale)


@dataclass(frozen=True, kw_only=True)
class HasAnotherDefault(Honest):
    """Takes scale=None for 1, and goes by the size of logits."""

    def logits(self, query, key, scale):  # type: ignore[no-untyped-def]
        return super().logits(query, key, 1.0 if scale is None else scale)

    def best(self, logits, count):  # type: ignore[no-untyped-def]
        return super().best(logits, count) & (logits > 1)


@dataclass(frozen=True, kw_only=True)
class CannotBeCompiled(Honest):
    """Says that it takes a stream, and reads a value."""

    takes_stream: ClassVar[bool] = True

    def find(self, query, key, *, scale=None, is_causal=False, generator=None):  # type: ignore[no-untyped-def]
        if not bool((query == query).all()):
            return None
        return super().find(query, key, scale=scale, is_causal=is_causal, generator=generator)


@dataclass(frozen=True, kw_only=True)
class LosesRowsBesidePadding(Honest):
    """Holds less when it is told where it is."""

    def find_within(self, query, key, *, is_causal=False, **options):  # type: ignore[no-untyped-def]
        return self.replace(budget=1).find(query, key, is_causal=is_causal)


@dataclass(frozen=True, kw_only=True)
class LosesItsRectangles(Honest):
    """Answers a rectangle with the causal mask of it."""

    def find_rectangle(self, query, key, *, strict=False, **options):  # type: ignore[no-untyped-def]
        return self.find(query, key, is_causal=True)


@dataclass(frozen=True, kw_only=True)
class AnswersToNothing(Honest):
    """Goes past the checks of arguments."""


# set after the class is made, so that nothing wraps it
AnswersToNothing.find = Honest.find.__wrapped__  # type: ignore[attr-defined, method-assign]


def not_importable() -> AbstractDetector:
    """Return a detector of a class that pickle cannot find."""

    @dataclass(frozen=True, kw_only=True)
    class Local(Honest):
        pass

    return Local()


LATER = "later_keys_move_no_earlier_row"
STRICT = "later_tokens_move_no_row_of_the_strict_form"
STRICT_RECTANGLES = "strict_rectangles_ignore_later_queries"
GROUPS = "groups_of_heads_are_independent"

CASES: dict[AbstractDetector, set[str]] = {
    LooksAtLaterKeys(): {LATER},
    PoolsAllQueries(): {"rows_are_local_where_declared", STRICT, STRICT_RECTANGLES},
    StrictInNameOnly(): {STRICT, STRICT_RECTANGLES},
    ChangesItsKeys(): {"inputs_and_component_stay_as_they_are"},
    RemembersItsCalls(): {"inputs_and_component_stay_as_they_are"},
    DrawsFromElsewhere(): {"generator_decides"},
    IgnoresTheGenerator(): {"generator_decides"},
    UsesUpGlobalDraws(): {"generator_decides"},
    MixesHeads(): {"heads_are_independent", GROUPS},
    MixesBatchItems(): {"batch_items_are_independent"},
    IgnoresGroups(): {GROUPS},
    Miscounts(): {"dense_rows_and_nnz_agree"},
    HoldsMoreThanItShows(): {"plan_means_the_mask"},
    BreaksUnions(): {"unions_obey_their_laws"},
    ExceedsItsBudget(): {"budget_is_kept"},
    HasNoSpec(dtype=torch.float64): {"spec_round_trip"},
    ForgetsAParameter(): {"is_a_frozen_value", "spec_round_trip"},
    Undecorated(): {"is_a_frozen_value", "spec_round_trip"},
    not_importable(): {"copies_and_pickles_are_equal"},
    ReadsStorage(): {"strides_do_not_matter"},
    KnowsOnlyWideTypes(): {"every_dtype_is_taken"},
    NeedsManyKeys(): {"every_length_has_a_mask"},
    DividesByNorms(): {"degenerate_inputs_have_masks"},
    FindsTheLightest(): {"finds_what_it_says"},
    HasAnotherDefault(): {"scale_has_its_default"},
    CannotBeCompiled(): {"compiles_to_one_graph"},
    LosesRowsBesidePadding(): {"the_whole_call_is_a_part_of_itself"},
    AnswersToNothing(): {"empty_inputs_are_refused"},
    LosesItsRectangles(): {"rectangles_have_masks", STRICT_RECTANGLES},
}
"""Each wrong detector with the checks that it has to fail, and no other."""
