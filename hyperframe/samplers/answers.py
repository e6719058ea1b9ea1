"""Checks of what samplers of others return: one that misbehaves is refused with its owner's name.

Types and shapes are looked at in every call. Values (indices out of range, weights that are NaN)
are looked at on the CPU, and elsewhere with HYPERFRAME_DEBUG=1: see `validation.may_look_at`. What
built-in samplers return is looked at by their tests alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ArgumentError, ArgumentTypeError
from ..plugins import blame, described
from ..samples import KeySample
from ..validation import may_look_at

if TYPE_CHECKING:
    from .base import AbstractSampler

__all__ = ["with_checked_answer"]

# where the keys are among the arguments
_KEY = {"sample": 1, "sample_prefixes": 1, "sample_rectangles": 1, "draws": 1, "draws_for": 2}


def with_checked_answer(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a sampler's method of that name with a check of what it returns.

    Args:
        name: `sample`, `sample_prefixes`, `sample_rectangles`, `draws` or `draws_for`; what the
            function returns that the last two make is checked as well.
        method: the method.
    """

    @functools.wraps(method)
    def checked(self: AbstractSampler, *args: Any, **options: Any) -> Any:
        try:
            found = method(self, *args, **options)
        except (ArgumentError, ArgumentTypeError) as error:
            blame(self, error)
            raise
        if found is None and name != "sample" and name != "sample_prefixes":
            return None
        key = options["key"] if "key" in options else args[_KEY[name]]
        if name not in ("draws", "draws_for"):
            lists = _lists(name, options)
            _check(self, found, key, (*lists, options.get("num_samples", -1)))
            return found
        if not callable(found):
            raise ArgumentTypeError(
                f"{described(self)} returned a value of type {type(found).__name__} from {name}; "
                "return a function that draws for prefixes or None, or None for no samples"
            )

        def draw(prefixes: torch.Tensor | None) -> KeySample:
            try:
                sample: KeySample = found(prefixes)
            except (ArgumentError, ArgumentTypeError) as error:
                blame(self, error)
                raise
            _check(self, sample, key, None if prefixes is None else (len(prefixes), -1))
            return sample

        return draw

    return checked


def _lists(name: str, options: dict[str, Any]) -> tuple[int, ...]:
    """Return the dimension of lists between those of heads and samples, if there is one."""
    if name == "sample_prefixes":
        return (len(options["prefixes"]),)
    return (len(options["rectangles"]),) if name == "sample_rectangles" else ()


def _check(
    sampler: AbstractSampler, sample: Any, key: torch.Tensor, last: tuple[int, ...] | None
) -> None:
    """Check one sample.

    Args:
        sampler: for the message.
        sample: what it returned.
        key: `[batch, key_heads, n_k, d]`.
        last: the dimensions after those of batch and heads, -1 for any size; None for one of any.
    """
    if not isinstance(sample, KeySample):
        raise ArgumentTypeError(
            f"{described(sampler)} returned a value of type {type(sample).__name__}; return a "
            "KeySample(index=..., log_weight=...)"
        )
    index, weight = sample.index, sample.log_weight
    for name, tensor in (("index", index), ("log_weight", weight)):
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentTypeError(
                f"{described(sampler)} returned a KeySample whose {name} has type "
                f"{type(tensor).__name__}; make it a tensor [batch, key_heads, num_samples]"
            )
    if index.dtype not in (torch.int32, torch.int64) or not weight.is_floating_point():
        raise ArgumentTypeError(
            f"{described(sampler)} returned an index of {index.dtype} and a log_weight of "
            f"{weight.dtype}; they are int64 and floating point: convert them"
        )
    _check_shape(sampler, index, weight, key, (-1,) if last is None else last)
    if index.device != key.device or weight.device != key.device:
        raise ArgumentError(
            f"{described(sampler)} returned a sample on {index.device} and {weight.device} of keys "
            f"on {key.device}; make tensors with device=key.device"
        )
    if index.numel() and may_look_at(index):
        _check_values(sampler, sample, key.shape[2])


def _check_shape(
    sampler: AbstractSampler, index: torch.Tensor, weight: torch.Tensor, key: torch.Tensor,
    last: tuple[int, ...],
) -> None:  # fmt: skip
    batch, heads = key.shape[:2]
    fits = (
        index.shape == weight.shape
        and index.dim() == 2 + len(last)
        and index.shape[0] == batch
        and index.shape[1] % heads == 0
        and all(want in (-1, found) for want, found in zip(last, index.shape[2:], strict=True))
    )
    if not fits:
        sizes = ", ".join("num_samples" if size == -1 else str(size) for size in last)
        raise ArgumentError(
            f"{described(sampler)} returned an index of shape {tuple(index.shape)} and a "
            f"log_weight of shape {tuple(weight.shape)}; both are [batch, key_heads, ...] = "
            f"[{batch}, {heads}, {sizes}]: draw for every key head"
        )


def _check_values(sampler: AbstractSampler, sample: KeySample, num_keys: int) -> None:
    """Check that indices are keys and weights are numbers; reads the device."""
    summaries = sample.summaries
    last = num_keys + (0 if summaries is None else summaries.key.shape[2]) - 1
    least, most = (int(end) for end in sample.index.aminmax())
    if least < 0 or most > last:
        raise ArgumentError(
            f"{described(sampler)} drew a key outside 0..{last}: its indices lie in "
            f"{least}..{most}; clamp what it returns, in slots that are not used too"
        )
    weight = sample.log_weight
    wrong = int((weight.isnan() | (weight == torch.inf)).sum())
    if wrong:
        raise ArgumentError(
            f"{described(sampler)} gave {wrong} of {weight.numel()} draws a log_weight that is NaN "
            "or inf; keep probabilities away from 0, and mark slots that are not used by -inf"
        )
