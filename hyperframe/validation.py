"""Checks of tensor arguments: one clear sentence for each way in which they cannot work."""

from __future__ import annotations

import math
import os

import torch

from .errors import ArgumentError, ArgumentTypeError

__all__ = ["check_inputs", "check_padding_mask", "check_scale", "is_debugging", "may_look_at"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def check_inputs(
    query: object, key: object, value: object, *, check_finite: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check query, key and value against each other and return them.

    Args:
        query: expected `[batch, query_heads, n_q, d]`.
        key: expected `[batch, key_heads, n_k, d]`.
        value: expected `[batch, key_heads, n_k, d_v]`.
        check_finite: also look for NaN and infinities (reads the device).

    Raises:
        ArgumentTypeError: no tensors, or a dtype that is not floating point.
        ArgumentError: shapes, devices or dtypes that do not fit, a length of 0, a head dimension
            above 256, or values that are not finite.
    """
    if not check_finite and _fit(query, key, value):
        return query, key, value  # type: ignore[return-value]
    tensors = []
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentTypeError(
                f"{name}: expected a torch tensor [batch, heads, length, dim], got "
                f"{type(tensor).__name__}; convert it with torch.as_tensor"
            )
        if tensor.dim() != 4:
            raise ArgumentError(
                f"{name}: expected 4 dimensions [batch, heads, length, dim], got shape "
                f"{tuple(tensor.shape)}; add or split dimensions with unsqueeze or unflatten"
            )
        if tensor.dtype not in _DTYPES:
            raise ArgumentTypeError(
                f"{name}: dtype {tensor.dtype} is not supported; use float32, bfloat16 or float16 "
                "(float64 for reference runs)"
            )
        tensors.append(tensor)
    q, k, v = tensors
    for name, tensor in (("key", k), ("value", v)):
        if tensor.device != q.device:
            raise ArgumentError(
                f"{name}: is on {tensor.device}, but query is on {q.device}; move all three to "
                "one device with .to"
            )
        if tensor.dtype != q.dtype:
            raise ArgumentError(
                f"{name}: has dtype {tensor.dtype}, but query has {q.dtype}; convert all three to "
                "one dtype"
            )
        if tensor.shape[0] != q.shape[0]:
            raise ArgumentError(
                f"{name}: has batch size {tensor.shape[0]}, but query has {q.shape[0]}; shapes "
                f"are {tuple(tensor.shape)} and {tuple(q.shape)}; expand the smaller one"
            )
    _check_shapes(q, k, v)
    if check_finite:
        for name, tensor in (("query", q), ("key", k), ("value", v)):
            if not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise ArgumentError(
                    f"{name}: {bad} of its {tensor.numel()} values are NaN or infinite; find out "
                    "where they come from, or clamp them first"
                )
    return q, k, v


def _fit(q: object, k: object, v: object) -> bool:
    """Whether there is nothing to refuse: a call looks at the same tensors several times."""
    if torch.compiler.is_compiling() or not (
        isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)
    ):
        return False
    of_query, of_key, of_value = q.shape, k.shape, v.shape
    return (
        len(of_query) == len(of_key) == len(of_value) == 4
        and q.dtype in _DTYPES
        and q.dtype == k.dtype == v.dtype
        and q.device == k.device == v.device
        and of_query[0] == of_key[0]
        and of_key[:3] == of_value[:3]
        and of_query[3] == of_key[3] <= MAX_HEAD_DIM
        and of_value[3] <= MAX_HEAD_DIM
        and 0 not in of_query
        and 0 not in of_value
        and of_query[1] % of_key[1] == 0
    )


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if k.shape[:3] != v.shape[:3]:
        raise ArgumentError(
            f"value: shape {tuple(v.shape)} does not match key {tuple(k.shape)} in batch, heads "
            "and length; every key needs one value"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ArgumentError(
            f"key: head dimension {k.shape[-1]} differs from the query's {q.shape[-1]}; their "
            "products need equal ones"
        )
    for name, tensor in (("query", q), ("key", k), ("value", v)):
        if not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM:
            raise ArgumentError(
                f"{name}: head dimension {tensor.shape[-1]} is outside 1..{MAX_HEAD_DIM}; split "
                "it into more heads"
            )
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ArgumentError(
            f"query: its {q.shape[1]} heads are no multiple of the {k.shape[1]} key heads; "
            "grouped-query attention needs query_heads % key_heads == 0; repeat or drop heads"
        )
    for name, tensor, axis, what in (
        ("query", q, 0, "batch items"), ("query", q, 2, "positions"), ("key", k, 2, "positions"),
    ):  # fmt: skip
        if tensor.shape[axis] == 0:
            raise ArgumentError(
                f"{name}: has 0 {what} (shape {tuple(tensor.shape)}); attention over nothing is "
                "not defined, leave out the call"
            )


def is_debugging() -> bool:
    """Whether values are checked wherever they are: the environment has HYPERFRAME_DEBUG=1."""
    return os.environ.get("HYPERFRAME_DEBUG", "0") not in ("", "0")


def may_look_at(where: torch.Tensor | torch.device) -> bool:
    """Whether the values of what a component returned may be read, to check them.

    On the CPU that is cheap. Elsewhere every call would wait for the device, so that it is done
    while debugging only; and in a graph that is being traced it would be a break.

    Args:
        where: a tensor, or the device it is on.
    """
    if torch.compiler.is_compiling():
        return False
    device = where.device if isinstance(where, torch.Tensor) else where
    return device.type == "cpu" or is_debugging()


def check_scale(scale: object, head_dim: int) -> float:
    """Return the factor of the logits; None is `1 / sqrt(head_dim)`."""
    if scale is None:
        return float(head_dim**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ArgumentTypeError(
            f"scale={scale!r}: has type {type(scale).__name__}; pass a Python float, or None for "
            "1/sqrt(head_dim)"
        )
    if not -math.inf < scale < math.inf:  # unlike math.isfinite, this can be compiled
        raise ArgumentError(f"scale={scale!r}: is not finite; pass a finite float, or None")
    return float(scale)


def check_padding_mask(mask: object, key: torch.Tensor) -> torch.Tensor:
    """Check a key padding mask, bool `[batch, n_k]`, True for real keys; and return it."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ArgumentTypeError(
            f"key_padding_mask: expected a bool tensor [batch, n_k], got {found}; True marks a "
            "real key; convert a 0/1 mask with `.bool()`"
        )
    expected = (key.shape[0], key.shape[2])
    if tuple(mask.shape) != expected:
        raise ArgumentError(
            f"key_padding_mask: shape {tuple(mask.shape)} does not match [batch, n_k] = "
            f"{expected}; give it one entry for every key"
        )
    if mask.device != key.device:
        raise ArgumentError(
            f"key_padding_mask: is on {mask.device}, but key is on {key.device}; move it with .to"
        )
    return mask
