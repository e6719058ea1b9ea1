"""What options of several commands have in common."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..errors import ArgumentError

__all__ = ["DTYPES", "check_out", "check_out_folder", "check_plot", "device_of", "integers"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What models of commands are loaded in, by name."""

_PICTURES = (".png", ".svg", ".pdf", ".jpg")


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
    try:
        torch.zeros(1, device=where).tolist()
    except Exception as error:  # every kind of device lacks in its own way
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArgumentError(
            f"--device {where}: torch cannot compute there ({line:.120}); use --device cpu"
        ) from error
    return where


def check_out(path: Path, *, option: str = "--out") -> None:
    """Check that a file can be written there, before time is spent on what it will hold."""
    if path.is_dir():
        raise ArgumentError(f"{option} {path}: is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            f"{option} {path}: its folder cannot be made ({error.strerror}); name another one"
        ) from error
    if not os.access(path.parent, os.W_OK):
        raise ArgumentError(f"{option} {path}: its folder may not be written to; name another one")


def check_out_folder(path: Path) -> None:
    """Check that files can be written into a folder. It is not made: nothing may come of it."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir():
        raise ArgumentError(f"--out {path}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK):
        raise ArgumentError(f"--out {path}: {there} may not be written to; name another folder")


def check_plot(path: Path) -> None:
    """Check that a picture can be written there, in the form that its name says."""
    check_out(path, option="--plot")
    if path.suffix.lower() not in _PICTURES:
        raise ArgumentError(
            f"--plot {path}: is no picture by its name; let it end in one of {', '.join(_PICTURES)}"
        )
