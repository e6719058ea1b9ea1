"""Hypothesis strategies for attention problems: inputs, masks, samples and raw plans.

Everything is small, ragged and adversarial. Sizes, forms and features are drawn; numbers come from
a drawn seed, so that an example shrinks in what matters. Strategies without an explicit `problem`
draw one for the whole test: what a test asks for fits together.

    >>> from hypothesis import given
    >>> from hyperframe.testing.strategies import attention_inputs, masks
    >>> @given(attention_inputs(), masks())
    ... def test_a_mask_has_the_shape_of_the_scores(inputs, mask):
    ...     assert mask.to_dense().shape == (inputs.query @ inputs.expanded_key().mT).shape
    >>> test_a_mask_has_the_shape_of_the_scores()

With this module imported, `st.from_type` knows the library's types:

    >>> from hypothesis import strategies as st
    >>> from hyperframe.masks import HeavyMask
    >>> @given(st.from_type(HeavyMask))
    ... def test_entries_are_counted(mask):
    ...     assert mask.nnz().equal(mask.to_dense().sum(dim=(-2, -1)))
    >>> test_entries_are_counted()

Needs the package `hypothesis`, which hyperframe itself does not install.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from ..blockplan import BlockPlan
from ..builder import build_level_plans
from ..errors import MissingDependencyError
from ..masks import (
    BandMask,
    BlockMask,
    EntryMask,
    HeavyMask,
    ListMask,
    RangeMask,
    UnionMask,
)
from ..plan import RankRanges, TilePlan
from ..ragged import spread_heads
from ..rectangles import Places
from ..samples import KeySample

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise MissingDependencyError(
        "hyperframe.testing.strategies needs the package hypothesis, which is not installed; "
        "install it with: python -m pip install hypothesis"
    ) from error

__all__ = [
    "MASK_FORMS",
    "PLAN_FEATURES",
    "STRUCTURES",
    "AttentionInputs",
    "Problem",
    "attention_inputs",
    "block_plans",
    "key_samples",
    "masks",
    "plans",
    "problems",
]

STRUCTURES = ("plain", "ties", "duplicates", "zero_rows", "huge_norms", "planted", "constant")
"""What `attention_inputs` does to normal numbers; see there."""

MASK_FORMS = ("band", "list", "columns", "entries", "range", "range_of_rows", "block", "union")
"""The forms of `masks`."""

PLAN_FEATURES = (
    "order", "weights", "value_weights", "caps", "floor", "summaries", "causal", "band", "excluded",
    "grouped", "shared", "disjoint",
)  # fmt: skip
"""What `plans` may use; a plan without features has exact slots and consecutive tiles."""

_NEG_INF = float("-inf")
_UNUSED_KEY = 1 << 20  # far outside every list: a slot that is not used may hold anything


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes of an attention problem.

    Args:
        batch: number of batch items.
        query_heads: number of query heads, a multiple of `key_heads`.
        key_heads: number of key heads.
        num_queries: `n_q`.
        num_keys: `n_k`.
        head_dim: `d`.
        value_dim: `d_v`.
    """

    batch: int
    query_heads: int
    key_heads: int
    num_queries: int
    num_keys: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True, kw_only=True, repr=False)
class AttentionInputs:
    """Query, key and value; unpacks into the three.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        value: `[batch, key_heads, n_k, d_v]`.
        structure: the member of `STRUCTURES` it was made with.
        seed: the seed of its numbers.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    structure: str
    seed: int

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter((self.query, self.key, self.value))

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{name}={list(tensor.shape)}"
            for name, tensor in (("query", self.query), ("key", self.key), ("value", self.value))
        )
        return (
            f"AttentionInputs({shapes}, {self.query.dtype}, {self.structure!r}, seed={self.seed})"
        )

    def expanded_key(self) -> torch.Tensor:
        """Return the keys repeated for every query head: `[batch, query_heads, n_k, d]`."""
        return spread_heads(self.key, self.query.shape[1])

    def expanded_value(self) -> torch.Tensor:
        """Return the values repeated for every query head: `[batch, query_heads, n_k, d_v]`."""
        return spread_heads(self.value, self.query.shape[1])


_seeds = st.integers(0, 2**16 - 1)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def problems(
    draw: st.DrawFn, *, max_length: int = 17, max_heads: int = 4, max_batch: int = 2,
    max_dim: int = 5, is_square: bool = False,
) -> Problem:  # fmt: skip
    """Draw the sizes of a problem: grouped heads, `n_q != n_k`, `d_v != d`.

    Args:
        draw: given by Hypothesis.
        max_length: the longest `n_q` and `n_k`; lengths start at 1.
        max_heads: the most query heads.
        max_batch: the most batch items.
        max_dim: the largest `d` and `d_v`.
        is_square: draw `n_q == n_k`.

    Example:
        >>> problems(is_square=True).map(lambda problem: problem.num_keys)  # doctest: +ELLIPSIS
        problems(...).map(...)
    """
    key_heads = draw(st.integers(1, max(1, max_heads // 2)))
    num_keys = draw(st.integers(1, max_length))
    return Problem(
        batch=draw(st.integers(1, max_batch)),
        query_heads=key_heads * draw(st.integers(1, max(1, max_heads // key_heads))),
        key_heads=key_heads,
        num_queries=num_keys if is_square else draw(st.integers(1, max_length)),
        num_keys=num_keys,
        head_dim=draw(st.integers(1, max_dim)),
        value_dim=draw(st.integers(1, max_dim)),
    )


# strategies of one test that are not given a problem share this one
_SHARED_PROBLEM = st.shared(problems(), key="hyperframe.testing.strategies")


@st.composite
def attention_inputs(
    draw: st.DrawFn, problem: Problem | None = None, *, dtype: torch.dtype = torch.float64,
    structures: Collection[str] = STRUCTURES,
) -> AttentionInputs:  # fmt: skip
    """Draw query, key and value.

    The structures: `plain` normal numbers; `ties`, small integers, so that many scores are equal;
    `duplicates`, few distinct keys and queries; `zero_rows`, some queries, keys and values 0;
    `huge_norms`, some queries 30 times and some keys 30 times as long, so that scores reach
    thousands; `planted`, each query holds one key of high score; `constant`, all keys equal.

    Args:
        draw: given by Hypothesis.
        problem: the sizes; None draws one for the whole test.
        dtype: dtype of all three.
        structures: the members of `STRUCTURES` to choose from.

    Example:
        >>> from hypothesis import given
        >>> @given(attention_inputs(structures=["zero_rows"]))
        ... def test_scores_are_finite(inputs):
        ...     query, key, value = inputs
        ...     assert torch.isfinite(query @ inputs.expanded_key().mT).all()
        >>> test_scores_are_finite()
    """
    sizes = draw(_SHARED_PROBLEM) if problem is None else problem
    structure = draw(st.sampled_from(sorted(structures, key=STRUCTURES.index)))
    seed = draw(_seeds)
    generator = _generator(seed)

    def normal(heads: int, length: int, dim: int) -> torch.Tensor:
        return torch.randn(
            sizes.batch, heads, length, dim, generator=generator, dtype=torch.float64
        )

    def some(tensor: torch.Tensor) -> torch.Tensor:
        return torch.rand((*tensor.shape[:3], 1), generator=generator) < 0.4

    q = normal(sizes.query_heads, sizes.num_queries, sizes.head_dim)
    k = normal(sizes.key_heads, sizes.num_keys, sizes.head_dim)
    v = normal(sizes.key_heads, sizes.num_keys, sizes.value_dim)
    if structure == "ties":
        q, k, v = q.round(), k.round(), v.round()
    elif structure == "duplicates":
        q = q[:, :, torch.arange(sizes.num_queries) // 3]
        k = k[:, :, torch.arange(sizes.num_keys) % 3 % sizes.num_keys]
    elif structure == "zero_rows":
        q, k, v = (tensor.masked_fill(some(tensor), 0.0) for tensor in (q, k, v))
    elif structure == "huge_norms":
        q, k = (torch.where(some(tensor), 30.0 * tensor, tensor) for tensor in (q, k))
    elif structure == "planted":
        partner = torch.randint(sizes.num_keys, (sizes.num_queries,), generator=generator)
        q = 0.1 * q + 4.0 * spread_heads(k, sizes.query_heads)[:, :, partner]
    elif structure == "constant":
        k = k[:, :, :1].expand(-1, -1, sizes.num_keys, -1)
    q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
    return AttentionInputs(query=q, key=k, value=v, structure=structure, seed=seed)


@st.composite
def masks(
    draw: st.DrawFn, problem: Problem | None = None, *, forms: Collection[str] = MASK_FORMS,
    is_causal: bool | None = None,
) -> HeavyMask:  # fmt: skip
    """Draw a mask of any form: empty, full and everything between.

    The forms: `band` with and without sinks; `list`, tiles of any size, lists by query head or
    shared by a group; `columns`; `entries`, one list a row; `range`, tiles over an order, every row
    in a slot; `range_of_rows`, every row its own range or none; `block`, blocks of rectangles, some
    of which leave rows and keys out; `union` of two or three others.

    Args:
        draw: given by Hypothesis.
        problem: the sizes; None draws one for the whole test.
        forms: the members of `MASK_FORMS` to choose from.
        is_causal: None draws it.

    Example:
        >>> from hypothesis import given
        >>> @given(masks(forms=["band", "columns"]), masks(forms=["entries"]))
        ... def test_a_union_holds_what_either_holds(a, b):
        ...     if a.is_causal == b.is_causal:
        ...         assert torch.equal((a | b).to_dense(), a.to_dense() | b.to_dense())
        >>> test_a_union_holds_what_either_holds()
    """
    sizes = draw(_SHARED_PROBLEM) if problem is None else problem
    causal = draw(st.booleans()) if is_causal is None else is_causal
    form = draw(st.sampled_from(sorted(forms, key=MASK_FORMS.index)))
    if form == "union":
        single = [other for other in MASK_FORMS if other != "union"]
        members = [
            _single_mask(sizes, draw(st.sampled_from(single)), causal, draw)
            for _ in range(draw(st.integers(2, 3)))
        ]
        return UnionMask.of(*members)
    return _single_mask(sizes, form, causal, draw)


def _single_mask(sizes: Problem, form: str, is_causal: bool, draw: st.DrawFn) -> HeavyMask:
    if form == "band":
        return BandMask(
            batch_size=sizes.batch, num_query_heads=sizes.query_heads,
            num_queries=sizes.num_queries, num_keys=sizes.num_keys, is_causal=is_causal,
            left=draw(st.integers(0, sizes.num_keys + 1)),
            right=draw(st.integers(0, sizes.num_keys + 1)),
            num_sinks=draw(st.integers(0, 3)), on_device=torch.device("cpu"),
        )  # fmt: skip
    if form in ("range", "range_of_rows"):
        return _range_mask(sizes, form, is_causal, draw)
    if form == "block":
        return _block_mask(sizes, is_causal, draw)
    heads = draw(st.sampled_from([sizes.key_heads, sizes.query_heads]))
    tile_size = {"columns": sizes.num_queries, "entries": 1}.get(form) or draw(
        st.integers(1, sizes.num_queries + 1)
    )
    tiles = -(-sizes.num_queries // tile_size)
    longest = draw(st.integers(0, sizes.num_keys))
    generator = _generator(draw(_seeds))
    # distinct keys in a random order; slots from the count on hold a key that does not exist
    shape = (sizes.batch, heads, tiles)
    index = torch.rand((*shape, sizes.num_keys), generator=generator).argsort(dim=-1)
    index = index[..., :longest]
    count = torch.randint(longest + 1, shape, generator=generator)
    if form == "columns":
        return ListMask.columns(
            index[:, :, 0], num_query_heads=sizes.query_heads, num_queries=sizes.num_queries,
            num_keys=sizes.num_keys, is_causal=is_causal,
        )  # fmt: skip
    index = torch.where(torch.arange(longest) < count.unsqueeze(-1), index, _UNUSED_KEY)
    if form == "entries":
        return ListMask.entries(
            index, count, num_query_heads=sizes.query_heads, num_keys=sizes.num_keys,
            is_causal=is_causal,
        )  # fmt: skip
    if draw(st.booleans()):
        index = index[:, :, :1].expand(-1, -1, tiles, -1)
        count = count[:, :, :1].expand(-1, -1, tiles)
    return ListMask(
        batch_size=sizes.batch, num_query_heads=sizes.query_heads, num_queries=sizes.num_queries,
        num_keys=sizes.num_keys, is_causal=is_causal, key_index=index, key_count=count,
        tile_size=tile_size,
    )  # fmt: skip


def _range_mask(sizes: Problem, form: str, is_causal: bool, draw: st.DrawFn) -> RangeMask:
    tile_size = draw(st.integers(1, sizes.num_queries + 1))
    tiles = -(-sizes.num_queries // tile_size) + draw(st.integers(0, 1))
    generator = _generator(draw(_seeds))
    rows = (sizes.batch, sizes.query_heads)

    def order(heads: int, length: int) -> torch.Tensor:
        return torch.rand(sizes.batch, heads, length, generator=generator).argsort(dim=-1)

    key_order = order(sizes.key_heads, sizes.num_keys)
    if form == "range_of_rows":
        groups = draw(st.integers(1, sizes.num_keys))
        bounds = torch.randint(sizes.num_keys + 1, (2, *rows, groups), generator=generator)
        # not sorted: about half of the groups stop before they start, and are empty
        group = torch.randint(groups, (*rows, sizes.num_queries), generator=generator)
        start, stop = (bound.gather(-1, group) for bound in bounds)
        return RangeMask.of_rows(
            group, start, stop, key_order, max_keys=sizes.num_keys, max_groups=groups,
            tile_size=tile_size, is_causal=is_causal,
        )  # fmt: skip
    slots = order(sizes.query_heads, tiles * tile_size)
    bounds = torch.randint(sizes.num_keys + 1, (2, *rows, tiles), generator=generator)
    bounds = bounds.sort(dim=0).values
    return RangeMask(
        batch_size=sizes.batch, num_query_heads=sizes.query_heads, num_queries=sizes.num_queries,
        num_keys=sizes.num_keys, is_causal=is_causal, key_order=key_order,
        query_order=torch.where(slots < sizes.num_queries, slots, -1), start=bounds[0],
        stop=bounds[1], tile_size=tile_size, max_keys=sizes.num_keys,
    )  # fmt: skip


def _block_mask(sizes: Problem, is_causal: bool, draw: st.DrawFn) -> BlockMask:
    count = draw(st.integers(1, min(3, sizes.num_queries, sizes.num_keys)))
    whole = count == 1 and draw(st.booleans())

    def runs(length: int) -> list[tuple[int, int]]:
        """Runs of places that do not meet, in any order."""
        if whole:
            return [(0, length)]
        places = st.lists(st.integers(0, length), min_size=count + 1, max_size=2 * count,
                          unique=True)  # fmt: skip
        if length < count + 1:
            places = st.just(list(range(length + 1)))
        bounds = sorted(draw(places))
        return draw(st.permutations(list(pairwise(bounds))))[:count]

    rectangles: tuple[Places, ...] = tuple(
        (*rows, *keys)
        for rows, keys in zip(runs(sizes.num_queries), runs(sizes.num_keys), strict=True)
    )
    generator = _generator(draw(_seeds))

    def order(heads: int, length: int) -> torch.Tensor:
        drawn = torch.rand(sizes.batch, heads, length, generator=generator).argsort(dim=-1)
        return drawn.int()

    key_order = order(sizes.key_heads, sizes.num_keys)
    return BlockMask(
        batch_size=sizes.batch, num_query_heads=sizes.query_heads, num_queries=sizes.num_queries,
        num_keys=sizes.num_keys, is_causal=is_causal, rectangles=rectangles,
        query_order=order(sizes.query_heads, sizes.num_queries), key_order=key_order,
        key_rank=key_order.argsort(dim=-1).int() if draw(st.booleans()) else None,
        block_size=draw(st.integers(1, sizes.num_keys)) if draw(st.booleans()) else sizes.num_keys,
    )  # fmt: skip


@st.composite
def key_samples(
    draw: st.DrawFn, problem: Problem | None = None, *, max_samples: int = 6
) -> KeySample:
    """Draw a sample of keys shared by all rows of a head: repeated keys, unused slots, any weights.

    Args:
        draw: given by Hypothesis.
        problem: the sizes; None draws one for the whole test.
        max_samples: the most slots; 0 is drawn too.

    Example:
        >>> from hypothesis import given
        >>> @given(key_samples())
        ... def test_every_slot_has_a_weight(sample):
        ...     assert sample.index.shape == sample.log_weight.shape
        >>> test_every_slot_has_a_weight()
    """
    sizes = draw(_SHARED_PROBLEM) if problem is None else problem
    shape = (sizes.batch, sizes.key_heads, draw(st.integers(0, max_samples)))
    generator = _generator(draw(_seeds))
    log_weight = torch.randn(shape, generator=generator)
    is_unused = torch.rand(shape, generator=generator) < 0.2
    return KeySample(
        index=torch.randint(sizes.num_keys, shape, generator=generator),
        log_weight=log_weight.masked_fill(is_unused, _NEG_INF),
    )


@st.composite
def block_plans(
    draw: st.DrawFn, problem: Problem | None = None, *, max_samples: int = 6
) -> BlockPlan:
    """Draw a block plan: up to three rectangles, with samples of their own or without.

    Samples repeat, have any weight or none, and are keys of the whole problem.

    Args:
        draw: given by Hypothesis.
        problem: the sizes; None draws one for the whole test.
        max_samples: the most samples of a rectangle.

    Example:
        >>> from hypothesis import given
        >>> @given(block_plans())
        ... def test_the_lists_of_the_tiles_mean_the_same(plan):
        ...     assert plan.to_tile_plan().to_dense().equal(plan.to_dense())
        >>> test_the_lists_of_the_tiles_mean_the_same()
    """
    sizes = draw(_SHARED_PROBLEM) if problem is None else problem
    mask = _block_mask(sizes, False, draw)
    num_samples = draw(st.integers(0, max_samples))
    generator = _generator(draw(_seeds))

    def sample(rectangles: tuple[Places, ...]) -> KeySample:
        shape = (sizes.batch, sizes.key_heads, len(rectangles), num_samples)
        log_weight = torch.randn(shape, generator=generator)
        is_unused = torch.rand(shape, generator=generator) < 0.2
        index = torch.randint(sizes.num_keys, shape, generator=generator)
        return KeySample(index=index, log_weight=log_weight.masked_fill(is_unused, _NEG_INF))

    made = build_level_plans([mask], sample if num_samples else None)
    assert made is not None
    # two rectangles may share a sample here
    return replace(made[0], samples_are_own=False)


@st.composite
def plans(
    draw: st.DrawFn, problem: Problem | None = None, *,
    features: Collection[str] = PLAN_FEATURES, required: Collection[str] = (),
    min_slots: int = 0, max_slots: int = 8, dtype: torch.dtype = torch.float64,
) -> TilePlan:  # fmt: skip
    """Draw a raw plan: random lists with repetitions, slots that are not used, rows without keys.

    Keys repeat within a list and overlap between its banded, exact and sampled slots (unless
    `disjoint`). Slots that are not used hold indices that do not exist and weights that are NaN.

    The features: `order`, tiles of rows in any order, with empty slots and rows that no tile owns;
    `weights` of the sampled slots, some `-inf`; `value_weights` of their own; `caps`; `floor`;
    `summaries`; `causal`, some with a `query_offset`; `band`; `excluded` ranges; `grouped`, tiles
    by key head; `shared`, one list for all tiles, of stride 0; `disjoint`, no key twice.

    Args:
        draw: given by Hypothesis.
        problem: the sizes; None draws one for the whole test.
        features: the members of `PLAN_FEATURES` that may be used; each is then drawn.
        required: those that every plan has.
        min_slots: the shortest list, used slots and others together.
        max_slots: the longest list.
        dtype: dtype of the summaries.

    Example:
        >>> from hypothesis import given
        >>> from hyperframe.kernels import attend
        >>> @given(attention_inputs(), plans())
        ... def test_rows_without_keys_are_zero(inputs, plan):
        ...     state = attend(*inputs, plan, scale=1.0)
        ...     assert (state.out[state.lse == -torch.inf] == 0).all()
        >>> test_rows_without_keys_are_zero()
    """
    sizes = draw(_SHARED_PROBLEM) if problem is None else problem
    allowed = [name for name in PLAN_FEATURES if name in features and name not in required]
    used = set(required)
    if allowed:
        used |= draw(st.sets(st.sampled_from(allowed)))
    generator = _generator(draw(_seeds))
    heads = sizes.key_heads if "grouped" in used else sizes.query_heads
    tile_size = draw(st.integers(1, sizes.num_queries + 1))
    tiles = -(-sizes.num_queries // tile_size)
    if "order" in used:
        # fewer slots than rows, or more
        tiles = max(1, tiles + draw(st.integers(-1, 1)))
    summaries = draw(st.integers(1, 3)) if "summaries" in used else 0
    width = sizes.num_keys + summaries
    lists = (sizes.batch, heads, 1 if "shared" in used else tiles)

    def integers(low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    num_slots = draw(st.integers(min_slots, max_slots))
    if "disjoint" in used:
        num_slots = min(num_slots, width)
        index = torch.rand((*lists, width), generator=generator).argsort(dim=-1)[..., :num_slots]
    else:
        index = integers(0, width - 1, (*lists, num_slots))
    counts = torch.stack([integers(0, num_slots, lists) for _ in range(3)]).sort(dim=0).values
    band_count, heavy_count, key_count = counts.int()
    slot = torch.arange(num_slots)
    is_unused = slot >= key_count.unsqueeze(-1)
    index = torch.where(is_unused, _UNUSED_KEY, index).to(
        torch.int32 if draw(st.booleans()) else torch.int64
    )

    def weights() -> torch.Tensor:
        drawn = normal(*lists, num_slots).float()
        dropped = torch.rand((*lists, num_slots), generator=generator) < 0.15
        drawn = drawn.masked_fill(dropped, _NEG_INF)
        drawn = torch.where(slot < heavy_count.unsqueeze(-1), 0.0, drawn)
        return drawn.masked_fill(is_unused, float("nan"))

    def by_tile(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.expand(-1, -1, tiles, *tensor.shape[3:])

    query_order = None
    if "order" in used:
        places = max(tiles * tile_size, sizes.num_queries)
        order = torch.rand(sizes.batch, heads, places, generator=generator).argsort(dim=-1)
        order = order[..., : tiles * tile_size]
        query_order = torch.where(order < sizes.num_queries, order, -1)
    rows = (sizes.batch, sizes.query_heads, sizes.num_queries)
    excluded = None
    if "excluded" in used:
        rounds = draw(st.integers(1, 2))
        ranges = (sizes.batch, sizes.query_heads, rounds, sizes.num_queries)
        start = integers(0, sizes.num_keys, ranges)
        order = torch.rand(
            sizes.batch, sizes.key_heads, rounds, sizes.num_keys, generator=generator
        )
        excluded = RankRanges(
            key_rank=order.argsort(dim=-1),
            start=start,
            stop=start + integers(0, sizes.num_keys // 2, ranges),
        )
    query_offset = None
    if "causal" in used and draw(st.booleans()):
        query_offset = draw(st.integers(-2, sizes.num_keys))
    return TilePlan(
        key_index=by_tile(index), key_count=by_tile(key_count), heavy_count=by_tile(heavy_count),
        tile_size=tile_size, num_query_heads=sizes.query_heads, num_queries=sizes.num_queries,
        num_keys=sizes.num_keys, query_order=query_order,
        log_weight=by_tile(weights()) if "weights" in used else None,
        value_log_weight=by_tile(weights()) if "value_weights" in used else None,
        log_cap=normal(*rows) if "caps" in used else None,
        log_floor=normal(*rows) if "floor" in used else None,
        summary_key=(
            normal(sizes.batch, sizes.key_heads, summaries, sizes.head_dim).to(dtype)
            if summaries else None
        ),
        summary_value=(
            normal(sizes.batch, sizes.key_heads, summaries, sizes.value_dim).to(dtype)
            if summaries else None
        ),
        is_causal="causal" in used,
        band=(
            (draw(st.integers(0, 4)), draw(st.integers(0, 4))) if "band" in used else None
        ),
        band_count=by_tile(band_count) if "band" in used else None,
        excluded=excluded, disjoint="disjoint" in used, query_offset=query_offset,
    )  # fmt: skip


@st.composite
def _entry_masks(draw: st.DrawFn) -> EntryMask:
    """Draw single entries by tiles; not a form of `masks`: a plan holds more than the mask."""
    sizes = draw(_SHARED_PROBLEM)
    tile_size = draw(st.integers(1, 9))
    longest = draw(st.integers(0, sizes.num_keys))
    heads = draw(st.sampled_from([sizes.key_heads, sizes.query_heads]))
    generator = _generator(draw(_seeds))
    shape = (sizes.batch, heads, -(-sizes.num_queries // tile_size))
    index = torch.rand((*shape, sizes.num_keys), generator=generator).argsort(dim=-1)
    bits = torch.randint(1, 1 << tile_size, (*shape, longest), generator=generator)
    return EntryMask(
        batch_size=sizes.batch, num_query_heads=sizes.query_heads, num_queries=sizes.num_queries,
        num_keys=sizes.num_keys, is_causal=draw(st.booleans()), tile_size=tile_size,
        key_index=index[..., :longest].sort(dim=-1).values, row_bits=bits,
        key_count=torch.randint(longest + 1, shape, generator=generator),
    )  # fmt: skip


# what `st.from_type` draws; types of one test share their problem, as above
for _type, _strategy in (
    (AttentionInputs, attention_inputs()),
    (BandMask, masks(forms=["band"])),
    (BlockMask, masks(forms=["block"])),
    (BlockPlan, block_plans()),
    (EntryMask, _entry_masks()),
    (HeavyMask, masks()),
    (KeySample, key_samples()),
    (ListMask, masks(forms=["list", "columns", "entries"])),
    (Problem, problems()),
    (RangeMask, masks(forms=["range", "range_of_rows"])),
    (TilePlan, plans()),
    (UnionMask, masks(forms=["union"])),
):
    st.register_type_strategy(_type, _strategy)
