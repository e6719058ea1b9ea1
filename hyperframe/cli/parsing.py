"""What options of several commands have in common."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..errors import ArgumentError

__all__ = ["check_out", "device_of", "integers"]


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
    try:
        where = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ArgumentError(f"--device {name}: is no device of torch; write cpu or cuda") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"--device {where}: torch sees no CUDA device; use --device cpu")
    return where


def check_out(path: Path) -> None:
    """Check that a file can be written there, before time is spent on what it will hold."""
    if path.is_dir():
        raise ArgumentError(f"--out {path}: is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            f"--out {path}: its folder cannot be made ({error.strerror}); name another one"
        ) from error
    if not os.access(path.parent, os.W_OK):
        raise ArgumentError(f"--out {path}: its folder may not be written to; name another one")
