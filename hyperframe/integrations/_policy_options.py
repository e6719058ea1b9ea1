"""Arguments of `HyperAttention` as values that JSON has: text, numbers, booleans and None."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from .. import detectors, estimators, samplers
from ..attention import HyperAttention, check_options
from ..component import AbstractComponent
from ..errors import ArgumentError, ArgumentTypeError, did_you_mean

__all__ = ["check_attention", "options_of"]

_REGISTRIES = {"detector": detectors, "sampler": samplers, "estimator": estimators}


def check_attention(attention: Any) -> dict[str, Any] | str:
    """Check how a rule says to attend.

    Args:
        attention: arguments of `HyperAttention`, "exact", or a `HyperAttention`.

    Returns:
        "exact", or the arguments with components as spec strings.

    Raises:
        ArgumentError, ArgumentTypeError: neither, or `HyperAttention` does not take them.
    """
    if attention == "exact":
        return "exact"
    if isinstance(attention, HyperAttention):
        return options_of(attention)
    if isinstance(attention, str):
        raise ArgumentError(
            f"attention={attention!r}: as text there is only 'exact'; write the arguments of "
            f"HyperAttention, for example {{'detector': {attention!r}}}."
            f"{did_you_mean(attention, ['exact'])}"
        )
    if not isinstance(attention, Mapping) or not all(isinstance(name, str) for name in attention):
        raise ArgumentTypeError(
            f"attention is of type {type(attention).__name__}; write the arguments of "
            "HyperAttention by name, {'detector': 'balanced'}, or 'exact'."
        )
    check_options(attention, owner="attention")
    options = {name: _plain(name, value) for name, value in attention.items()}
    HyperAttention(**options)
    return options


def options_of(attention: HyperAttention) -> dict[str, Any]:
    """Return the arguments that make a `HyperAttention` again, as far as they are not defaults.

    Raises:
        SpecError: one of its components has no name in its registry.

    Example:
        >>> from hyperframe.attention import HyperAttention
        >>> options_of(HyperAttention(detector="sort_lsh(block_size=64)", seed=3))
        {'detector': 'sort_lsh(block_size=64)', 'seed': 3}
    """
    default = HyperAttention()
    found = {}
    for field in dataclasses.fields(attention):
        value = getattr(attention, field.name)
        if field.name == "sampler" and attention._goes_with_detector:
            continue  # "auto" chooses the same again
        if value != getattr(default, field.name) or field.name == "sampler":
            found[field.name] = _plain(field.name, value)
    return found


def _plain(name: str, value: Any) -> Any:
    """The value as JSON has it."""
    if isinstance(value, AbstractComponent) and name in _REGISTRIES:
        return _REGISTRIES[name].to_spec(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ArgumentError(f"attention: {name}={value!r} is no finite number; pass one")
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ArgumentTypeError(
        f"attention: {name} is of type {type(value).__name__}; pass text, a number, a boolean or "
        "None"
    )
