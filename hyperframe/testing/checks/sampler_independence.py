"""Checks of samplers: what draws and weights may depend on."""

from __future__ import annotations

import torch

from ...samplers import AbstractSampler
from ...samples import KeySample
from .problem import (
    CheckSkippedError,
    Inputs,
    changed,
    fail,
    generator,
    global_seed,
    inputs,
    same_bits,
    strided,
)
from .sampler_checks import PREFIXES, draw_prefixes, draw_sample

__all__ = [
    "check_different_heads_draw_differently",
    "check_generator_decides",
    "check_groups_of_heads_are_independent",
    "check_inputs_and_component_stay_as_they_are",
    "check_later_tokens_move_no_earlier_weight",
    "check_queries_count_only_where_declared",
    "check_strides_and_gradients_do_not_matter",
]


def _same(a: KeySample, b: KeySample) -> bool:
    return same_bits(a.index, b.index) and same_bits(a.log_weight, b.log_weight)


def check_generator_decides(sampler: AbstractSampler) -> None:
    """The generator is the only source of draws: its state decides, and moves on."""
    x = inputs()
    draws = {"sample": draw_sample, "sample_prefixes": draw_prefixes}
    for name, draw in draws.items():
        samples = []
        for seed in (3, 4):
            with global_seed(seed):
                samples.append(draw(sampler, x))
        if not _same(*samples):
            remedy = "draw by hyperframe.randomness.uniform and normal with the generator"
            fail(sampler, f"{name} twice with one seed", "two samples", remedy)
        if same_bits(samples[0].index, draw(sampler, x, seed=2).index):
            fail(sampler, f"{name} with another seed", "the same keys", "use the generator")
    g = generator()
    first, second = (sampler.sample(*x, num_samples=12, generator=g) for _ in range(2))
    if same_bits(first.index, second.index):
        remedy = "draw from the generator itself, not from a copy of its state"
        fail(sampler, "twice with one generator", "the same keys", remedy)


def check_different_heads_draw_differently(sampler: AbstractSampler) -> None:
    """Heads and batch items with equal numbers draw on their own."""
    x = Inputs(*(t[:1, :1].expand(2, h, -1, -1) for t, h in zip(inputs(), (4, 2, 2), strict=True)))
    index = draw_sample(sampler, x).index.flatten(0, 1)
    if len({tuple(head.tolist()) for head in index}) < 4:
        remedy = "draw numbers of shape [batch, key_heads, m], not for one head"
        fail(sampler, "four equal heads", "equal draws", remedy)


def check_groups_of_heads_are_independent(sampler: AbstractSampler) -> None:
    """Other numbers in one group of heads, or one batch item, move no other one's draws."""
    x = inputs()
    group = Inputs(*(changed(t, (slice(None), slice(t.shape[1] // 2, None))) for t in x))
    item = Inputs(*(changed(t, slice(1, None)) for t in x))
    for what, y, kept in (
        ("another group", group, (slice(None), slice(0, 1))),
        ("another batch item", item, (slice(0, 1), slice(None))),
    ):
        for draw in (draw_sample, draw_prefixes):
            want, got = (draw(sampler, inputs_) for inputs_ in (x, y))
            if not (
                same_bits(want.index[kept], got.index[kept])
                and same_bits(want.log_weight[kept], got.log_weight[kept])
            ):
                remedy = "let query head h go with key head h // (Hq // Hkv), and items alone"
                fail(sampler, f"other numbers in {what}", "another sample", remedy)


def check_inputs_and_component_stay_as_they_are(sampler: AbstractSampler) -> None:
    """A call changes neither its inputs nor the sampler."""
    for draw in (draw_sample, draw_prefixes):
        sampler = sampler.replace()  # one that was never called
        x, state = inputs(), dict(vars(sampler))
        before = [t.clone() for t in x]
        draw(sampler, x)
        for name, old, new in zip(x._fields, before, x, strict=True):
            if not same_bits(old, new):
                remedy = "clone it first, and use no method that ends in _ on what was given"
                fail(sampler, "for a sample", f"another {name}", remedy)
        if vars(sampler) != state:
            remedy = "compute it anew in every call: a component holds its parameters only"
            fail(sampler, "for a sample", "attributes that changed", remedy)


def check_strides_and_gradients_do_not_matter(sampler: AbstractSampler) -> None:
    """Strided inputs draw the same keys, and weights carry no gradient."""
    x = inputs(dtype=torch.float64)
    other = Inputs(*(strided(t).requires_grad_() for t in x))
    for draw in (draw_sample, draw_prefixes):
        want, got = draw(sampler, x), draw(sampler, other)
        close = torch.allclose(
            want.log_weight.double(), got.log_weight.double(), atol=1e-5, equal_nan=True
        )
        if not same_bits(want.index, got.index) or not close:
            remedy = "use reshape instead of view, and no raw storage"
            fail(sampler, "with equal numbers in another layout", "another sample", remedy)
        if got.log_weight.requires_grad:
            remedy = "compute weights under torch.no_grad()"
            fail(sampler, "with gradients on", "weights that carry one", remedy)


def check_later_tokens_move_no_earlier_weight(sampler: AbstractSampler) -> None:
    """What some row of a tile may not see moves none of the tile's draws and weights."""
    x = inputs(num_queries=32)
    want = draw_prefixes(sampler, x)
    # tiles end at 14, 22, 40: the first rows of them see keys before
    for t, seen in enumerate((9, 15, 23)):
        where = (..., slice(seen, None), slice(None))
        y = x._replace(key=changed(x.key, where), value=changed(x.value, where))
        got = draw_prefixes(sampler, y)
        if not (
            same_bits(want.index[:, :, : t + 1], got.index[:, :, : t + 1])
            and same_bits(want.log_weight[:, :, : t + 1], got.log_weight[:, :, : t + 1])
        ):
            remedy = "let entry j of the density depend on keys and values up to j alone"
            found = f"other draws of the prefix of {PREFIXES[t]}"
            fail(sampler, f"other keys and values from {seen} on", found, remedy)


def check_queries_count_only_where_declared(sampler: AbstractSampler) -> None:
    """A sampler that does not say `uses_queries` draws the same whatever the queries are."""
    if sampler.uses_queries:
        raise CheckSkippedError("uses_queries is True: it is refused under strict_causal=True")
    x = inputs()
    y = x._replace(query=changed(x.query, ...))
    for draw in (draw_sample, draw_prefixes):
        if not _same(draw(sampler, x), draw(sampler, y)):
            remedy = "set uses_queries = True"
            fail(sampler, "with other queries", "another sample", remedy)
