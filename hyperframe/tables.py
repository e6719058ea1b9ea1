"""Small tables that follow from sizes alone: made once, then kept on their device.

Index arithmetic over a handful of rectangles or tiles would cost a GPU launch an operation, in
every call of every layer. A table of it is made on the host, copied once, and used again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch

__all__ = ["int_table", "kept"]

_KEPT_TABLES = 256  # of each function; a model asks for a few per sequence length

_Sizes = ParamSpec("_Sizes")
_Table = TypeVar("_Table")


def kept(make: Callable[_Sizes, _Table]) -> Callable[_Sizes, _Table]:
    """Keep what a function returns, by its (hashable) arguments; nobody may write into it.

    Under `torch.compile` the function runs as it is: a tensor made there belongs to that graph.
    """
    look_up = functools.lru_cache(maxsize=_KEPT_TABLES)(make)

    @functools.wraps(make)
    def made_once(*args: _Sizes.args, **options: _Sizes.kwargs) -> _Table:
        if torch.compiler.is_compiling():
            return make(*args, **options)
        # a tensor born in inference mode could not be saved for a backward later on
        with torch.inference_mode(False):
            return look_up(*args, **options)  # type: ignore[arg-type]

    return made_once


def int_table(rows: Sequence[Sequence[int]], width: int, device: torch.device) -> torch.Tensor:
    """Return an int32 tensor `[rows, width]` on a device; `rows` may be empty."""
    return torch.tensor(rows, dtype=torch.int32).view(-1, width).to(device)
