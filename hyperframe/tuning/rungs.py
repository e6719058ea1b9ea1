"""Rungs: the attentions that a tuner may choose from, beside the exact one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..attention import HyperAttention, check_options
from ..errors import ArgumentError
from ..evaluation.settings import options_of

__all__ = ["DEFAULT_LADDER", "Rung", "ladder", "parse_rung"]

DEFAULT_LADDER = (
    "sliding_window(width=128, num_sinks=64); num_samples=0",
    "heavy_columns(num_columns=128); causal=recursive; num_samples=128",
    "heavy_columns(num_columns=256); causal=recursive",
    "heavy_columns(num_columns=256); causal=recursive; min_seq_len=1024",
    "sliding_window(width=128, num_sinks=64) | quest",
    "fast",
    "balanced",
    "accurate",
)
"""What is tried unless told otherwise. What does not pay on a device is left out after one call, so
that a long list costs little: the first ones are for CPUs, the last ones for GPUs."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One attention to choose.

    Args:
        label: what it is called in tables: its spec.
        options: arguments of `HyperAttention`, values of JSON; what a policy file holds of it.
    """

    label: str
    options: dict[str, Any] = field(hash=False)

    def attention(self, seed: int) -> HyperAttention:
        """Return the attention, with a seed."""
        return HyperAttention(**self.options, seed=seed)

    def is_exact(self, length: int) -> bool:
        """Whether so many keys are few enough to be answered by exact attention."""
        shortest = self.options.get("min_seq_len")
        return shortest is not None and length <= shortest


def parse_rung(spec: str) -> Rung:
    """Return the rung of `"detector; option=value; ..."`, as `hyperframe eval` reads it.

    Args:
        spec: see `hyperframe.evaluation.settings.options_of`.

    Raises:
        ArgumentError: it does not parse, or `HyperAttention` refuses it.

    Example:
        >>> parse_rung("fast; num_samples=64").options
        {'detector': 'fast', 'num_samples': 64, 'min_seq_len': 0}
    """
    options = options_of(spec)
    if "seed" in [entry.partition("=")[0].strip() for entry in spec.split(";")]:
        raise ArgumentError(f"--spec {spec!r}: holds a seed; --seed is for all rungs")
    del options["seed"]
    check_options(options, owner=f"--spec {spec!r}")
    rung = Rung(label=spec, options=options)
    rung.attention(0)
    return rung


def ladder(specs: Sequence[str]) -> tuple[Rung, ...]:
    """Return the rungs of some specs.

    Raises:
        ArgumentError: there is none, or one twice.
    """
    if not specs or len(set(specs)) < len(specs):
        raise ArgumentError(f"--spec {', '.join(specs)}: name one at least, and each once")
    return tuple(parse_rung(spec) for spec in specs)
