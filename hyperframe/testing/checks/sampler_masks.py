"""Checks of samplers that draw beside a mask: `draws_for` with the mask of a detector."""

from __future__ import annotations

import contextlib
import math

import torch

from ...attention import HyperAttention
from ...detectors import create as create_detector
from ...errors import UnsupportedError
from ...masks import HeavyMask
from ...samplers import AbstractSampler
from ...samples import KeySample
from ..oracles import dense_attention
from .problem import CheckSkippedError, Inputs, fail, generator, inputs, same_bits
from .sampler_checks import form_of
from .sampler_statistics import FALSE_ALARM

__all__ = ["check_draws_beside_a_mask_are_true"]

_MASKS = (
    "heavy_columns(num_columns=5, num_queries=5)", "sort_lsh(block_size=6)",
    "pooled_topk(tile_size=8, block_size=4, num_blocks=2)",
)  # fmt: skip
_COPIES, _KEYS, _SAMPLES = 4000, 24, 5


def check_draws_beside_a_mask_are_true(sampler: AbstractSampler) -> None:
    """`draws_for`: a sample is true for the keys that some row of the mask does not hold.

    It has to be for no others, since a sampled key that a row holds counts for nothing there. For
    every such key, and for the sum of all of them, the mean over 8,000 samples of what is counted
    must be 1 and their number, by the empirical Bernstein bound (Maurer and Pontil 2009, theorem
    4) with a union over keys and masks: a sampler that is right fails with probability 1e-6 at
    most, if no sum exceeds twice the largest that was seen, which is an assumption. Beside the same
    masks equal seeds give equal draws, and attention with as many samples as keys is exact.
    """
    is_own = sampler.needs_mask or type(sampler).draws_for is not AbstractSampler.draws_for
    if not is_own or not sampler.draws_keys:
        raise CheckSkippedError("draws_for is not overridden: no mask has a say")
    answered, refusal = 0, "no mask was taken"
    for spec in _MASKS:
        x = inputs(6, batch=1, query_heads=2, key_heads=2, num_queries=_KEYS, num_keys=_KEYS)
        x = Inputs(*(t.expand(_COPIES, -1, -1, -1) for t in x))
        mask = create_detector(spec).find(x.query, x.key, generator=generator(9))
        try:
            sample = _draw(sampler, mask, x)
        except UnsupportedError as error:
            refusal = str(error)
            continue
        answered += 1
        form_of(sampler, sample, (_COPIES, 2, _SAMPLES), _KEYS, f"draws beside {spec}")
        again = _draw(sampler, mask, x)
        if not (
            same_bits(again.index, sample.index) and same_bits(again.log_weight, sample.log_weight)
        ):
            remedy = "draw by hyperframe.randomness with the generator"
            fail(sampler, f"twice with the same seed, beside {spec}", "two samples", remedy)
        _compare(sampler, mask, sample, spec)
        _compare_attention(sampler, spec)
    if not answered:
        raise UnsupportedError(refusal)


def _draw(sampler: AbstractSampler, mask: HeavyMask, x: Inputs) -> KeySample:
    draw = sampler.draws_for(mask, *x, num_samples=_SAMPLES, generator=generator(2))
    if draw is None:
        fail(sampler, f"{_SAMPLES} samples beside a mask", "None", "return a function that draws")
    return draw(None)


def _compare(sampler: AbstractSampler, mask: HeavyMask, sample: KeySample, spec: str) -> None:
    """Compare what samples count with the keys that they stand for."""
    index, weight = (t.flatten(0, 1) for t in (sample.index, sample.log_weight.double().exp()))
    rest = ~mask.to_dense().all(dim=2).flatten(0, 1)  # [copies * heads, n]
    counted = torch.zeros(rest.shape, dtype=torch.float64, device=index.device)
    # what is off for each key, and for all of them, in every copy
    counted = counted.scatter_add_(-1, index, weight) * rest
    off = torch.cat([counted - rest.double(), (counted - rest.double()).sum(-1, True)], dim=-1)
    copies, largest = len(off), off.abs().amax(dim=0)
    limit = math.log(2 * (_KEYS + 1) * len(_MASKS) / FALSE_ALARM)
    radius = (2 * off.var(dim=0) * limit / copies).sqrt()
    radius += 7 * 4 * largest * limit / (3 * (copies - 1))  # from -2 to 2 times the largest
    wrong = off.mean(dim=0).abs() > radius + 1e-4
    if bool(wrong.any()):
        j = int(wrong.nonzero()[-1])  # the sum of all keys, if that is wrong
        what, truth = ("all keys", float(rest.double().sum(-1).mean()))
        if j < _KEYS:
            what, truth = f"key {j}", float(rest[:, j].double().mean())
        found = f"a mean count of {truth + float(off[:, j].mean()):.4g} for {what}"
        asked = f"draws beside {spec}: {truth:.4g} on average"
        fail(sampler, asked, found, "weigh draws of the keys that are not held by 1 / (m p_j)")


def _compare_attention(sampler: AbstractSampler, spec: str) -> None:
    """Compare attention with as many samples as keys with exact attention."""
    x = inputs(dtype=torch.float64)
    attention = HyperAttention(detector=spec, sampler=sampler, num_samples=40, min_seq_len=0)
    for is_causal in (False, True):
        with contextlib.suppress(UnsupportedError):  # a single causal pass may be refused
            out = attention(*x, is_causal=is_causal)
            want = dense_attention(*x, is_causal=is_causal).out
            if not torch.allclose(out, want, rtol=1e-4, atol=1e-4):
                found = f"an output off by {float((out - want).abs().max()):.3g}"
                remedy = "take all keys once, each with weight 1"
                fail(sampler, f"40 samples of 40 keys beside {spec}", found, remedy)
