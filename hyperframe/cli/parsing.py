"""What options of several commands have in common."""

from __future__ import annotations

import torch

from ..errors import ArgumentError

__all__ = ["device_of", "integers"]


def integers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Return the integers of a list that is separated by commas; None for None."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise ArgumentError(f"{option} {text}: is no list of integers; write 1024,2048") from None


def device_of(name: str | None) -> torch.device:
    """Return the device of that name; for None a GPU if there is one."""
    where = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"--device {where}: torch sees no CUDA device; use --device cpu")
    return where
