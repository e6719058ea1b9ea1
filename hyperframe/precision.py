"""Autocast: what promises float32 arithmetic runs outside of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["without_autocast"]


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context in which operations on the tensor's device keep the dtypes they are given.

    `torch.autocast` casts the arguments of matrix products to half precision, whatever they are:
    hash codes would flip, scores would tie, and results would not fit the buffers made for them.
    """
    kind = tensor.device.type
    # the question whether a device has autocast breaks the graph of torch.compile in some versions
    if kind not in ("cpu", "cuda") and not torch.amp.is_autocast_available(kind):
        return nullcontext()
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
