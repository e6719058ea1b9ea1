"""Measuring one configuration on all layers of a problem."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ...attention import HyperAttention
from ...detectors import AbstractDetector, to_spec
from ...errors import SpecError
from ...masks import HeavyMask
from ...randomness import Stream
from ...trace import tracing
from ..stages import time_stages
from ..timing import Timing
from .configurations import YARDSTICKS, Configuration
from .problem import Problem, Reference

__all__ = ["Cache", "Remembered", "measure"]


@dataclass(frozen=True, kw_only=True)
class Remembered(AbstractDetector):
    """A detector that finds once and answers alike from then on, also in what it leaves to draw."""

    takes_stream: ClassVar[bool] = True

    inner: AbstractDetector
    found: list[tuple[HeavyMask, int]] = field(default_factory=list, compare=False, repr=False)

    def find(self, query: Any, key: Any, *, generator: Any = None, **options: Any) -> HeavyMask:
        """Find, or answer as before."""
        return self._once(self.inner.find, query, key, generator, options)

    def find_strict(
        self, query: Any, key: Any, *, generator: Any = None, **options: Any
    ) -> HeavyMask:
        """Find, or answer as before."""
        return self._once(self.inner.find_strict, query, key, generator, options)

    def _once(
        self, find: Callable[..., HeavyMask], query: Any, key: Any, stream: Stream,
        options: dict[str, Any],
    ) -> HeavyMask:  # fmt: skip
        if not self.found:
            mask = find(query, key, generator=stream, **options)
            self.found.append((mask, stream.num_draws))
        mask, stream.num_draws = self.found[0]
        return mask


@dataclass
class Cache:
    """What was found for the last detector and budget; other samplers need not find it again."""

    key: Any = None
    detectors: list[AbstractDetector] = field(default_factory=list)
    held: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def measure(
    problem: Problem, configuration: Configuration, *, backend: str = "auto", repeats: int = 3,
    cache: Cache | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure one configuration on all layers and heads.

    Args:
        problem: the heads.
        configuration: what to measure.
        backend: of the attention.
        repeats: of each timed stage, on one layer; 0 takes no times. Yardsticks have none.
        cache: shared between calls with one detector and budget after the other; None is none.

    Returns:
        The measured part of a row, see `FRONTIER_KEYS`: `spec`, `detector_spec`, `keys`,
        `sampled_keys`, `density`, `mass`, `recall`, `error`, `lse_error`, `ms`.

    Raises:
        HyperframeError: what cannot be made or measured; whatever a detector raises.
        ArithmeticError: an output is not finite.

    Cost: two attention calls for each layer (with and without samples), exact attention once for
    each layer of the problem, and `repeats + 3` calls for the times. Memory: a few tensors of the
    size of the output.
    """
    cache = Cache() if cache is None else cache
    attention = configuration.attention(backend)
    is_causal = configuration.causal != "none"
    has_one_mask = not (is_causal and attention.causal == "recursive")
    key = (id(problem), attention.replace(sampler="uniform", num_samples=0), is_causal)
    if cache.key != key:
        wrapped = [
            Remembered(inner=attention.detector) if has_one_mask else attention.detector
            for _ in problem.layers
        ]
        cache.held = _held(problem, attention, wrapped, is_causal=is_causal)
        cache.key, cache.detectors = key, wrapped
    errors, distances, keys = [], [], 0.0
    for number, layer in enumerate(problem.layers):
        reference = problem.reference(number, is_causal=is_causal)
        with tracing() as trace:
            out, lse = attention.replace(detector=cache.detectors[number])(
                layer.query, layer.key, layer.value, scale=layer.scale, is_causal=is_causal,
                return_lse=True,
            )  # fmt: skip
        keys += trace.keys_per_query / len(problem.layers)
        difference = (out.to(reference.out.dtype) - reference.out).flatten(2).norm(dim=-1)
        errors.append(difference / reference.out.flatten(2).norm(dim=-1))  # [B, H]
        if not bool(torch.isfinite(errors[-1]).all()):
            raise ArithmeticError(f"the output of layer {layer.layer_idx} is not finite")
        is_seen = torch.isfinite(reference.lse)
        distances.append((lse - reference.lse).abs()[is_seen])
    lse_error = float(torch.cat(distances).median())
    return {
        "spec": repr(attention),
        "detector_spec": _spec_of(configuration),
        **cache.held,
        "sampled_keys": keys - cache.held["keys"],
        "error": _summary(problem, torch.stack(errors).double()),
        "lse_error": lse_error if math.isfinite(lse_error) else None,  # rows without keys
        "ms": _times(problem, attention, is_causal=is_causal, repeats=repeats)
        if configuration.detector not in YARDSTICKS
        else None,
    }


def _held(
    problem: Problem, attention: HyperAttention, found: list[AbstractDetector], *, is_causal: bool
) -> dict[str, Any]:
    """Return what the exact part holds: keys, density, mass and recall."""
    keys, masses, recalls = 0.0, [], []
    for number, layer in enumerate(problem.layers):
        reference = problem.reference(number, is_causal=is_causal)
        call = attention.replace(detector=found[number], num_samples=0)
        with tracing() as trace:
            _, lse = call(
                layer.query, layer.key, layer.value, scale=layer.scale, is_causal=is_causal,
                return_lse=True,
            )  # fmt: skip
        keys += trace.keys_per_query / len(problem.layers)
        # the heavy entries' share of the row sum, without a matrix of them
        is_seen = torch.isfinite(reference.lse)
        masses.append((lse - reference.lse)[is_seen].exp().clamp(max=1).mean())
        remembered = found[number]
        if isinstance(remembered, Remembered) and remembered.found:
            recalls.append(_recall(remembered.found[0][0], reference))
    num_queries, num_keys = problem.layers[0].query.shape[2], problem.length
    visible = float(num_keys)
    if is_causal:
        row = torch.arange(num_queries) + 1 + num_keys - num_queries
        visible = float(row.clamp(0, num_keys).double().mean())
    return {
        "keys": keys, "density": keys / visible, "mass": float(torch.stack(masses).mean()),
        "recall": sum(recalls) / len(recalls) if recalls else None,
    }  # fmt: skip


def _recall(mask: HeavyMask, reference: Reference) -> float:
    """Return the mean share of a row's top keys that the mask holds."""
    shares = []
    slot = torch.arange(reference.top.shape[-1], device=reference.top.device)
    for number, row in enumerate(reference.rows.tolist()):
        count = int(reference.num_top[number])
        if count:
            held = mask.rows(row, row + 1).squeeze(2).gather(-1, reference.top[:, :, number])
            shares.append((held & (slot < count)).sum(dim=-1) / count)
    return float(torch.stack(shares).mean())


def _summary(problem: Problem, errors: torch.Tensor) -> dict[str, Any]:
    """Summarise relative errors `[layers, batch, heads]`."""
    flat = errors.flatten()
    place = int(flat.argmax())
    per_layer = errors[0].numel()
    return {
        "median": float(flat.median()), "mean": float(flat.mean()),
        "p90": float(flat.quantile(0.9)), "worst": float(flat[place]),
        "worst_layer": problem.layers[place // per_layer].layer_idx,
        "worst_head": place % errors.shape[-1],
    }  # fmt: skip


def _times(
    problem: Problem, attention: HyperAttention, *, is_causal: bool, repeats: int
) -> dict[str, Any] | None:
    """Time the stages of one layer, and exact attention beside them."""
    if repeats == 0:
        return None
    layer = problem.layers[problem.timed]
    found = time_stages(
        attention, layer.query, layer.key, layer.value, is_causal=is_causal, seconds=1.0,
        repeats=repeats,
    )  # fmt: skip
    stages = {
        name: time.median_ms if isinstance(time, Timing) else None
        for name, time in found.items()
        if name in ("detect", "plan", "attend")
    }
    exact = problem.exact_time(is_causal=is_causal, repeats=repeats)
    times = [time for time in stages.values() if time is not None]
    total = sum(times) if len(times) == len(stages) else None
    return {
        **stages, "total": total, "exact": exact.median_ms, "layer": layer.layer_idx,
        "repeats": repeats,
    }  # fmt: skip


def _spec_of(configuration: Configuration) -> str | None:
    chosen = configuration.chosen()
    try:
        return None if chosen is None else to_spec(chosen)
    except SpecError:  # it has no name among the registered ones
        return repr(chosen)
