"""Small tables that follow from sizes alone: made once, then kept on their device.

Index arithmetic over a handful of rectangles or tiles would cost a GPU launch an operation, in
every call of every layer. A table of it is made on the host, copied once, and used again.

While a CUDA graph is captured, nothing new is kept: what the graph writes is not there before it
runs, and its memory is the graph's. What is there already is kept for good, since every replay will
read it. For the same reason tables on a GPU are made in a thread of their own: compilers that are
about to capture compiled code let all that a thread allocates be the graph's.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["consecutive", "int_table", "kept", "kept_few", "maker_device", "spaced"]

_KEPT_TABLES = 256  # of each function; a model asks for a few per sequence length
_LARGE_TABLES = 8

_Sizes = ParamSpec("_Sizes")
_Table = TypeVar("_Table")

_READ_BY_GRAPHS: dict[int, Any] = {}


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class _NotKeptError(Exception):
    """There is no such table yet, and none can be kept now."""


def kept(make: Callable[_Sizes, _Table]) -> Callable[_Sizes, _Table]:
    """Keep what a function returns, by its (hashable) arguments; nobody may write into it.

    Under `torch.compile` the function runs as it is: a tensor made there belongs to that graph.
    """
    return _kept(make, _KEPT_TABLES)


def kept_few(make: Callable[_Sizes, _Table]) -> Callable[_Sizes, _Table]:
    """Do what `kept` does for larger tables, of which only the latest ones stay."""
    return _kept(make, _LARGE_TABLES)


def _kept(make: Callable[_Sizes, _Table], most: int) -> Callable[_Sizes, _Table]:
    @functools.lru_cache(maxsize=most)
    def look_up(*args: _Sizes.args, **options: _Sizes.kwargs) -> _Table:
        if _is_capturing():
            raise _NotKeptError
        if torch.cuda.is_initialized():
            devices = [x for x in (*args, *options.values()) if isinstance(x, torch.device)]
            return _made_apart(lambda: make(*args, **options), devices)
        # a tensor born in inference mode could not be saved for a backward later on
        with torch.inference_mode(False):
            return make(*args, **options)

    @functools.wraps(make)
    def made_once(*args: _Sizes.args, **options: _Sizes.kwargs) -> _Table:
        if torch.compiler.is_compiling():
            return make(*args, **options)
        if not _is_capturing():
            return look_up(*args, **options)  # type: ignore[arg-type]
        try:
            table = look_up(*args, **options)  # type: ignore[arg-type]
        except _NotKeptError:
            return make(*args, **options)
        _READ_BY_GRAPHS[id(table)] = table
        return table

    return made_once


def _made_apart(make: Callable[[], _Table], devices: Sequence[torch.device] = ()) -> _Table:
    """Run a function in a thread of its own, which has no modes, and wait for its GPUs."""
    made: list[_Table] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            made.append(make())
            for device in devices:
                if device.type == "cuda":  # other streams will read the table
                    torch.cuda.synchronize(device)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def maker_device(device: torch.device) -> torch.device:
    """Return where a table for a device is to be made, before `.to(device)`.

    The host, whose copy every stream sees; or the device itself, in code that is compiled, and in a
    graph that is captured, which would refuse the copy.
    """
    if torch.compiler.is_compiling() or _is_capturing():
        return device
    return torch.device("cpu")


def int_table(rows: Sequence[Sequence[int]], width: int, device: torch.device) -> torch.Tensor:
    """Return an int32 tensor `[rows, width]` on a device; `rows` may be empty."""
    return torch.tensor(rows, dtype=torch.int32).view(-1, width).to(device)


@kept
def spaced(
    count: int, step: int, first: int, device: torch.device, *, low: int | None = None,
    high: int | None = None, dtype: torch.dtype = torch.int64,
) -> torch.Tensor:  # fmt: skip
    """Return `first + i * step` for `i` below `count`, held between `low` and `high`; kept.

    What follows from the positions of tiles is of that kind: `[count]`; not to be written to.

    Example:
        >>> spaced(4, 2, -3, torch.device("cpu"), low=0).tolist()
        [0, 0, 1, 3]
    """
    numbers = torch.arange(count, device=maker_device(device)) * step + first
    if low is not None or high is not None:
        numbers = numbers.clamp(min=low, max=high)
    return numbers.to(dtype).to(device)


@kept_few
def consecutive(first: int, stop: int, device: torch.device) -> torch.Tensor:
    """Return the numbers from `first` to `stop`, int32; kept, not to be written to."""
    numbers = torch.arange(first, stop, dtype=torch.int32, device=maker_device(device))
    return numbers.to(device)
