"""Errors that say that memory ran out."""

from __future__ import annotations

import torch

__all__ = ["out_of_memory"]

_SAYINGS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> str | None:
    r"""Return one line of an error that says that memory ran out; None of any other error.

    Args:
        error: what was raised. On the CPU, and by some libraries of a GPU, it is a `RuntimeError`
            that is told by its message.

    Example:
        >>> out_of_memory(torch.OutOfMemoryError("CUDA out of memory.\nMore of it."))
        'CUDA out of memory.'
        >>> out_of_memory(RuntimeError("sizes do not match")) is None
        True
    """
    said = str(error).strip()
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(saying in said for saying in _SAYINGS)
    )
    return next(iter(said.splitlines()), type(error).__name__) if known else None
