"""Checks of what estimators of others return: one that misbehaves is refused with its owner's name.

Types and shapes are looked at in every call. Values (sums that are NaN) are looked at on the CPU,
and elsewhere with HYPERFRAME_DEBUG=1: see `validation.may_look_at`. What built-in estimators
return is looked at by their tests alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..errors import ArgumentError, ArgumentTypeError
from ..plugins import blame, described
from ..rowsums import RowSumRule, RowSums
from ..validation import may_look_at

if TYPE_CHECKING:
    from .base import AbstractEstimator

__all__ = ["with_checked_answer"]

_Answer = TypeVar("_Answer", RowSums, RowSumRule)


def with_checked_answer(
    method: Callable[..., _Answer], expected: type[_Answer]
) -> Callable[..., _Answer]:
    """Return a method of an estimator with a check of what it returns.

    Args:
        method: `row_sums` or `rule`.
        expected: what it has to return.
    """

    @functools.wraps(method)
    def checked(
        self: AbstractEstimator, query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any
    ) -> _Answer:
        try:
            found = method(self, query, key, *args, **options)
        except (ArgumentError, ArgumentTypeError) as error:
            blame(self, error)
            raise
        if not isinstance(found, expected):
            raise ArgumentTypeError(
                f"{described(self)} returned a value of type {type(found).__name__} from "
                f"{method.__name__}; return a {expected.__name__}"
            )
        for field in dataclasses.fields(found):
            rows = getattr(found, field.name)
            if rows is not None or field.default is not None:  # what may be left out is None
                _check_rows(self, field.name, rows, query, key)
        return found

    return checked


def _check_rows(
    estimator: AbstractEstimator, name: str, rows: Any, query: torch.Tensor, key: torch.Tensor
) -> None:
    """Check one tensor of row-wise logarithms."""
    if not isinstance(rows, torch.Tensor) or not rows.is_floating_point():
        found = rows.dtype if isinstance(rows, torch.Tensor) else f"a {type(rows).__name__}"
        raise ArgumentTypeError(
            f"{described(estimator)} returned {name} as {found}; return natural logarithms, a "
            "floating point tensor [batch, query_heads, n_q]"
        )
    shape = query.shape[:3]
    if rows.shape != shape:
        raise ArgumentError(
            f"{described(estimator)} returned {name} of shape {tuple(rows.shape)}; return one "
            f"number for every query head and row, [batch, query_heads, n_q] = {tuple(shape)}"
        )
    if rows.device != query.device:
        raise ArgumentError(
            f"{described(estimator)} returned {name} on {rows.device} of queries on "
            f"{query.device}; make tensors with device=query.device"
        )
    if not may_look_at(rows):
        return
    wrong = rows.isnan() | (rows == torch.inf) if name == "log_sum" else rows.isnan()
    # from NaN comes NaN: that is no fault of the estimator
    if bool(wrong.any()) and bool(query.isfinite().all() & key.isfinite().all()):
        raise ArgumentError(
            f"{described(estimator)} returned {name} with {int(wrong.sum())} of {rows.numel()} "
            "rows NaN or inf, for queries and keys that are finite; compute in logarithms, with "
            "the largest logit taken out"
        )
