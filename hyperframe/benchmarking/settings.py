"""How a suite is run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ArgumentError

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a suite is run.

    Attributes:
        device: where.
        dtype: of the inputs.
        lengths: `n`; None takes the suite's for the device.
        head_dims: head dimensions; None takes the suite's.
        batch: batch items.
        heads: query heads.
        kv_heads: key and value heads; None is as many as query heads.
        backend: backend of the methods.
        seed: of inputs and draws.
        inputs: kind of inputs; None takes the suite's.
        max_error: relative error above which no speed-up is reported; None takes the bound of the
            kind of inputs, see `ERROR_BOUNDS`.
        forward_only: leave out forward + backward.
        graphs: also time replays of CUDA graphs; None as the suite says.
        stages: time the stages; None as the suite says.
        flush: start every repeat with a cold L2 cache.
        seconds: for the repeats of each timed function.
    """

    device: torch.device
    dtype: torch.dtype
    lengths: tuple[int, ...] | None = None
    head_dims: tuple[int, ...] | None = None
    batch: int = 1
    heads: int = 12
    kv_heads: int | None = None
    backend: str = "auto"
    seed: int = 0
    inputs: str | None = None
    max_error: float | None = None
    forward_only: bool = False
    graphs: bool | None = None
    stages: bool | None = None
    flush: bool = False
    seconds: float = 0.5

    def __post_init__(self) -> None:
        """Check what the tensors would not say clearly."""
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ArgumentError(
                f"bench: kv_heads={self.kv_heads} does not divide heads={self.heads}; query heads "
                "share key heads in equal groups"
            )
        sizes = (*(self.lengths or ()), *(self.head_dims or ()), self.batch, self.heads)
        if any(size < 1 for size in sizes):
            raise ArgumentError("bench: lengths, heads, batch and head dimensions start at 1")
        if not self.seconds > 0:
            raise ArgumentError(f"bench: a budget of {self.seconds} seconds is not above 0")
