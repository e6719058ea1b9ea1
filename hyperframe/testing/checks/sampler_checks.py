"""Checks of samplers: what a sample is, of all keys, of prefixes and of rectangles."""

from __future__ import annotations

from typing import Any

import torch

from ...attention import HyperAttention
from ...randomness import Stream
from ...samplers import AbstractSampler
from ...samples import KeySample
from ..oracles import dense_attention
from .problem import (
    DTYPES,
    CheckSkippedError,
    Inputs,
    as_one_graph,
    device,
    fail,
    generator,
    inputs,
    same_bits,
)

__all__ = [
    "PREFIXES",
    "check_as_many_samples_as_keys_are_exact",
    "check_compiles_to_one_graph",
    "check_degenerate_inputs_have_weights",
    "check_prefixes_are_kept",
    "check_rectangles_are_kept",
    "check_samples_have_an_index_and_a_weight",
    "draw_prefixes",
    "draw_sample",
    "form_of",
]

PREFIXES = (14, 22, 40)
"""Lengths of the prefixes that `draw_prefixes` samples."""


def draw_sample(sampler: AbstractSampler, x: Inputs, *, seed: int = 1, num: int = 12) -> KeySample:
    """Return a sample of all keys, drawn with a fresh generator."""
    return sampler.sample(*x, num_samples=num, generator=generator(seed))


def draw_prefixes(sampler: AbstractSampler, x: Inputs, *, seed: int = 1, num: int = 9) -> KeySample:
    """Return samples of the prefixes `PREFIXES`, drawn with a fresh generator."""
    prefixes = torch.tensor(PREFIXES, device=device())
    return sampler.sample_prefixes(
        *x, num_samples=num, prefixes=prefixes, generator=generator(seed)
    )


def form_of(
    sampler: AbstractSampler, sample: KeySample, shape: tuple[int, ...], num_keys: int, asked: str
) -> None:
    """Fail unless shape, dtypes and range are right, and weights are numbers."""
    index, weight = sample.index, sample.log_weight
    if index.shape != shape or weight.shape != shape:
        found = f"index {tuple(index.shape)}, log_weight {tuple(weight.shape)}"
        fail(sampler, f"{asked} for {shape}", found, "draw for every key head")
    if index.dtype != torch.int64 or not weight.is_floating_point():
        found = f"index {index.dtype}, log_weight {weight.dtype}"
        fail(sampler, f"{asked} for int64 and floating point", found, "convert with .long()")
    if index.device != device() and index.device.type != device().type:
        fail(sampler, f"{asked} on {device()}", f"{index.device}", "use device=key.device")
    if bool(((index < 0) | (index >= num_keys)).any()):
        found = f"keys {int(index.min())}..{int(index.max())}"
        fail(sampler, f"{asked} for keys in 0..{num_keys - 1}", found, "clamp, unused slots too")
    if bool(weight.isnan().any()) or bool((weight == torch.inf).any()):
        remedy = "keep probabilities away from 0; -inf is for slots that are not used"
        fail(sampler, f"{asked} for weights", "NaN or infinite ones", remedy)


def check_samples_have_an_index_and_a_weight(sampler: AbstractSampler) -> None:
    """For any length, dtype and number of samples: index int64 and log weight `[B, Hkv, m]`."""
    for num_queries, num_keys in ((40, 40), (29, 40), (40, 29), (1, 1)):
        for num in (0, 1, 7, 100):
            x = inputs(num_queries=num_queries, num_keys=num_keys)
            asked = f"num_samples={num}, n_q={num_queries}, n_k={num_keys}"
            form_of(sampler, draw_sample(sampler, x, num=num), (2, 2, num), num_keys, asked)
    for dtype in DTYPES:
        sample = draw_sample(sampler, inputs(dtype=dtype))
        form_of(sampler, sample, (2, 2, 12), 40, f"inputs in {dtype}")


def check_prefixes_are_kept(sampler: AbstractSampler) -> None:
    """No draw leaves its prefix, and one no longer than the sample is taken whole, once."""
    for num_queries, num_keys, tile in ((40, 40, 8), (29, 40, 8), (40, 29, 9), (33, 33, 7)):
        ends = [*range(tile, num_queries, tile), num_queries]
        lengths = [min(max(end + num_keys - num_queries, 0), num_keys) for end in ends]
        prefixes = torch.tensor(lengths, device=device())
        x = inputs(num_queries=num_queries, num_keys=num_keys)
        for num in (0, 5, 12, 100):
            sample = sampler.sample_prefixes(
                *x, num_samples=num, prefixes=prefixes, generator=generator()
            )
            asked = f"num_samples={num} of prefixes {lengths}"
            form_of(sampler, sample, (2, 2, len(lengths), num), num_keys, asked)
            used = sample.log_weight > -torch.inf
            if bool((used & (sample.index >= prefixes[:, None])).any()):
                fail(sampler, asked, "keys after their prefix", "draw below prefixes[t]")
            for t, length in enumerate(lengths):
                if length > num:
                    continue
                index, weight = sample.index[:, :, t], sample.log_weight[:, :, t]
                counted = index.masked_fill(~used[:, :, t], num_keys).sort(dim=-1).values
                whole = torch.arange(length, device=device()).expand(2, 2, length)
                once = same_bits(counted[..., :length], whole)
                if not once or bool((weight[used[:, :, t]] != 0).any()):
                    remedy = "take short prefixes whole: every key once, log weight 0"
                    fail(sampler, asked, f"prefix {length} taken in another way", remedy)


def check_rectangles_are_kept(sampler: AbstractSampler) -> None:
    """Draws for all rectangles at once stay among the keys of each."""
    rectangles = ((20, 30, 0, 20), (30, 40, 20, 30))
    sample = sampler.sample_rectangles(
        *inputs(), num_samples=6, rectangles=rectangles, generator=generator()
    )
    if sample is None:
        raise CheckSkippedError("sample_rectangles returns None: rectangles are drawn singly")
    form_of(sampler, sample, (2, 2, 2, 6), 40, f"rectangles {rectangles}")
    for r, (_, _, start, stop) in enumerate(rectangles):
        index = sample.index[:, :, r]
        if bool(((index < start) | (index >= stop)).any()):
            found = f"keys {int(index.min())}..{int(index.max())}"
            fail(sampler, f"keys {start}..{stop - 1}", found, "add key_start of the rectangle")


def check_degenerate_inputs_have_weights(sampler: AbstractSampler) -> None:
    """Zeros, equal vectors and huge numbers have weights, and samples that are not empty."""
    x = inputs()
    zero = Inputs(*(torch.zeros_like(t) for t in x))
    some = x._replace(value=x.value.index_fill(2, torch.arange(7, 30, device=device()), 0))
    equal = Inputs(*(t[:, :, :1].expand_as(t) for t in x))
    huge = Inputs(*(1e4 * t for t in x))
    for name, case in (
        ("zeros", zero), ("values of zero", some), ("equal vectors", equal), ("norms of 1e4", huge),
    ):  # fmt: skip
        form_of(sampler, draw_sample(sampler, case), (2, 2, 12), 40, name)
        sample = draw_prefixes(sampler, case)
        form_of(sampler, sample, (2, 2, 3, 9), 40, f"{name}, prefixes")
        # draws without replacement may leave slots unused
        if not bool((sample.log_weight > -torch.inf).any(dim=-1).all()):
            remedy = "mix in some of the uniform density"
            fail(sampler, f"{name}, 9 of prefixes {PREFIXES}", "no used slot", remedy)


def check_as_many_samples_as_keys_are_exact(sampler: AbstractSampler) -> None:
    """With as many samples as keys, attention is exact attention, and counts nothing twice."""
    x = inputs(dtype=torch.float64)
    for causal, is_causal in (("single_pass", False), ("single_pass", True), ("recursive", True)):
        attention = HyperAttention(
            detector="sliding_window(width=3)", sampler=sampler, num_samples=40, causal=causal,
            min_seq_len=0 if causal == "single_pass" else 5,
        )  # fmt: skip
        out, lse = attention(*x, is_causal=is_causal, return_lse=True)
        exact = dense_attention(*x, is_causal=is_causal)
        for name, got, want in (("out", out, exact.out), ("lse", lse, exact.lse)):
            if not torch.allclose(got, want, rtol=1e-5, atol=1e-5):
                asked = f"all keys of a {causal} call, is_causal={is_causal}"
                found = f"{name} off by {float((got - want).abs().max()):.2g}"
                fail(sampler, asked, found, "take keys once with log weight 0 where all fit")


def check_compiles_to_one_graph(sampler: AbstractSampler) -> None:
    """Where `takes_stream` says so, `sample` compiles to one graph and draws the same."""
    if not sampler.takes_stream:
        raise CheckSkippedError("takes_stream is False: a torch.Generator cannot be compiled")

    def called(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seed: torch.Tensor) -> Any:
        stream: Any = Stream(seed)
        sample = sampler.sample(q, k, v, num_samples=12, generator=stream)
        return sample.index, sample.log_weight

    as_one_graph(sampler, called, *inputs(dtype=torch.float64), torch.tensor(5, device=device()))
