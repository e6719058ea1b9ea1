"""Launches beside each other, where a CUDA graph is captured.

A kernel ends with a few programs on an otherwise idle GPU, and the next one starts when the last of
them is done. Two chains of launches that do not depend on one another fill each other's ends. One
by one, the host would only have more to do, and the same is launched in sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Beside"]


class Beside:
    """A second stream, from `here` until `join`.

    What it touches has to exist until `join`, and nothing may be allocated in `here`: the memory of
    a graph belongs to the stream that it was allocated on.

    Args:
        device: where the launches go.
        wanted: False has everything run in sequence.
    """

    def __init__(self, device: torch.device, *, wanted: bool = True) -> None:
        self._other: torch.cuda.Stream | None = None
        self._is_forked = False
        if wanted and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._other = _other_stream(device)

    @property
    def is_used(self) -> bool:
        """Whether there are two streams at all."""
        return self._other is not None

    @contextmanager
    def here(self) -> Iterator[None]:
        """Launch on the second stream, behind all that was launched before."""
        if self._other is None:
            yield
            return
        self._other.wait_stream(torch.cuda.current_stream(self._other.device))
        self._is_forked = True
        with torch.cuda.stream(self._other):
            yield

    def join(self) -> None:
        """Have what follows wait for the second stream."""
        if self._other is not None and self._is_forked:
            torch.cuda.current_stream(self._other.device).wait_stream(self._other)
            self._is_forked = False


@functools.cache
def _other_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
