"""Triton's interpreter without what it does again for every operation.

It runs a kernel in numpy, one operation at a time, and most of its time goes elsewhere: a table of
all dtypes is built to look one up; types and shapes are wrapped and checked again for each result;
every call of a device function goes through all members of `triton.language`, none of which is left
to be patched inside a launch; reductions and scans by a function of one's own go one element at a
time. Here a type is looked up once, what is patched is left alone, and such functions get whole
blocks: pairs of neighbours, first one first, as on a GPU.

Everything else stays as it is: `test_quick_interpreter.py` compares the two.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["REPLACED", "install"]

REPLACED: list[tuple[Any, str, Any]] = []
"""What `install` replaced: owner, name and what stood there."""


def install() -> None:
    """Replace the slow parts of the interpreter; does nothing where Triton is not installed."""
    if REPLACED or importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    core = interpreter.tl.core
    quick: list[tuple[Any, str, Any]] = [
        (core.block_type, "__init__", quick_blocks(core.block_type.__init__)),
        (core.tensor, "__init__", quick_tensors(core.tensor.__init__)),
        (interpreter, "_get_np_dtype", quick_dtypes(interpreter)),
        (interpreter, "_patch_lang", quick_patches(interpreter)),
        (interpreter.ReduceOps, "generic_reduce", reduced_by_pairs),
        (interpreter.ScanOps, "generic_scan", scanned_by_doubling),
    ]
    for owner, name, replacement in quick:
        REPLACED.append((owner, name, getattr(owner, name)))
        setattr(owner, name, replacement)


def quick_dtypes(interpreter: ModuleType) -> Any:
    """The function that gives the numpy dtype of a type, with a memory."""
    tl = interpreter.tl
    look_up = functools.cache(interpreter._get_np_dtype)

    def np_dtype(kind: Any) -> Any:
        scalar = kind.scalar  # of a block its elements' type, else the type itself
        return look_up(tl.uint64 if isinstance(scalar, tl.pointer_type) else scalar)

    return np_dtype


def quick_blocks(make: Any) -> Any:
    """What sets up a block's type: every shape of a type is checked and named once."""
    known: dict[Any, Any] = {}

    def set_up(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(x, "value", x) for x in shape))
        if key in known:
            vars(self).update(vars(known[key]))
        else:
            make(self, element_ty, shape)
            known[key] = self

    return set_up


def quick_tensors(make: Any) -> Any:
    """What sets up a tensor: all but its data follows from the type, which remembers it."""

    def set_up(self: Any, handle: Any, type: Any) -> None:
        follows = vars(type).get("_of_tensors")
        if follows is None:
            make(self, handle, type)
            type._of_tensors = {name: x for name, x in vars(self).items() if name != "handle"}
        else:
            vars(self).update(follows, handle=handle)

    return set_up


def quick_patches(interpreter: ModuleType) -> Any:
    """The function that patches the language a kernel sees, which stops where all is patched."""
    tl, patch = interpreter.tl, interpreter._patch_lang
    first = {
        part: next(n for n, x in inspect.getmembers(part) if tl.core.is_builtin(x))
        for part in (tl, tl.core, tl.tensor)
    }

    @functools.cache
    def seen_by(function: Any) -> list[Any]:
        return [x for x in (tl, tl.core) if any(x is y for y in function.__globals__.values())]

    def patch_lang(function: Any) -> Any:
        parts = [*seen_by(function), tl.tensor]
        if any(tl.core.is_builtin(getattr(part, first[part])) for part in parts):
            return patch(function)
        return interpreter._LangPatchScope()

    return patch_lang


def _combined(operation: Any, left: list[Any], right: list[Any], kinds: list[Any]) -> list[Any]:
    """What the operation's function makes of two arrays for each of its values."""
    given = [operation.to_tensor(x, kind) for x, kind in zip(left + right, 2 * kinds, strict=True)]
    made = operation.combine_fn.fn(*given)
    made = made if isinstance(made, tuple) else (made,)
    shape = left[0].shape
    arrays = [getattr(getattr(x, "handle", None), "data", x) for x in made]
    return [np.broadcast_to(x, shape).astype(y.dtype) for x, y in zip(arrays, left, strict=True)]


def reduced_by_pairs(operation: Any, values: Any) -> list[Any]:
    """Reduce a tuple of tensors along an axis, neighbours first: log2(length) calls."""
    given, axis = operation.unravel(values, operation.axis)
    kinds, dims = [x.dtype for x in given], len(values[0].handle.data.shape)
    left = [np.moveaxis(x.handle.data, axis, 0) for x in given]
    while len(left[0]) > 1:
        left = _combined(operation, [x[::2] for x in left], [x[1::2] for x in left], kinds)
    results = [x[0] for x in left]
    if operation.keep_dims:
        at = tuple(range(dims)) if operation.axis is None else axis
        results = [np.expand_dims(x, at) for x in results]
    return [operation.to_tensor(x, kind) for x, kind in zip(results, kinds, strict=True)]


def scanned_by_doubling(operation: Any, values: Any) -> list[Any]:
    """Scan a tuple of tensors along an axis: log2(length) calls with the whole of it."""
    kinds = [x.dtype for x in values]
    done = [np.moveaxis(x.handle.data, operation.axis, 0).copy() for x in values]
    step, length = 1, len(done[0])
    while step < length:
        earlier = [np.concatenate([x[:step], x[:-step]]) for x in done]
        both = _combined(operation, earlier, done, kinds)
        done = [np.concatenate([x[:step], y[step:]]) for x, y in zip(done, both, strict=True)]
        step *= 2
    results = [np.moveaxis(x, 0, operation.axis) for x in done]
    return [operation.to_tensor(x, kind) for x, kind in zip(results, kinds, strict=True)]
