"""What an estimator is: how the row sums `D~` come from a mask and a sample (ApproxD)."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..component import AbstractComponent, check_non_negative_int
from ..errors import ArgumentError
from ..masks import HeavyMask, check_mask_type
from ..plugins import is_built_in
from ..randomness import check_generator, with_generator
from ..rowsums import RowSumRule, RowSums
from ..samplers import AbstractSampler
from ..validation import check_inputs, check_scale
from .answers import with_checked_answer

__all__ = ["AbstractEstimator"]


def _checked(row_sums: Callable[..., RowSums]) -> Callable[..., RowSums]:
    """Check the arguments of a `row_sums` method against each other."""
    row_sums = with_generator(row_sums)

    @functools.wraps(row_sums)
    def checked(
        self: AbstractEstimator, query: torch.Tensor, key: torch.Tensor, mask: HeavyMask,
        **options: Any,
    ) -> RowSums:  # fmt: skip
        check_inputs(query, key, key)
        check_scale(options.get("scale"), query.shape[-1])
        check_generator(options.get("generator"))
        check_non_negative_int(self, "num_samples", options.get("num_samples", 256))
        check_mask_type("mask", mask)
        expected = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        found = (mask.batch_size, mask.num_query_heads, mask.num_queries, mask.num_keys)
        if expected != found:
            raise ArgumentError(
                f"mask: it is over [batch, query_heads, n_q, n_k] = {found}, but query and key "
                f"have {expected}; find the mask with the same query and key"
            )
        return row_sums(self, query, key, mask, **options)

    return checked


@dataclass(frozen=True, kw_only=True)
class AbstractEstimator(AbstractComponent):
    """Base of every estimator: a frozen dataclass with two methods.

    `row_sums` is the estimate by itself; `rule` is what the attention of the same mask needs to
    know so that its normaliser is that estimate. By default the estimate replaces the normaliser;
    an estimator that can be made with the columns which the attention samples anyway says so.

    Attributes:
        takes_stream: `generator` may be a `Stream`; see `AbstractDetector`.
        is_unbiased: the mean of `D~` over the draws is `D`. Not inherited by a class with a
            `row_sums` of its own.
    """

    kind: ClassVar[str] = "estimator"
    takes_stream: ClassVar[bool] = False
    is_unbiased: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Wrap `row_sums` with checks of its arguments, and see to the source of draws."""
        super().__init_subclass__(**kwargs)
        for name, wrap, answer in (
            ("row_sums", _checked, RowSums), ("rule", with_generator, RowSumRule),
        ):  # fmt: skip
            method = cls.__dict__.get(name)
            if method is not None and not getattr(method, "__isabstractmethod__", False):
                if not is_built_in(cls):
                    method = with_checked_answer(method, answer)
                setattr(cls, name, wrap(method))
                cls.takes_stream = cls.__dict__.get("takes_stream", False)
                if name == "row_sums":
                    cls.is_unbiased = cls.__dict__.get("is_unbiased", False)

    @property
    def columns(self) -> AbstractSampler | None:
        """The sampler whose columns make this estimate by themselves, or None.

        It is what `sampler="auto"` takes beside the estimator; and an attention with an equal
        sampler is normalised by its own columns, not by a second draw of such.
        """
        return None

    @abstractmethod
    def row_sums(
        self, query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, *,
        scale: float | None = None, num_samples: int = 256,
        generator: torch.Generator | None = None,
    ) -> RowSums:  # fmt: skip
        """Estimate the row sums of `A = exp(scale * Q K^T)` under the mask's causality.

        Args:
            query: `[batch, query_heads, n_q, d]`.
            key: `[batch, key_heads, n_k, d]`.
            mask: the entries computed exactly.
            scale: factor of the logits; None is `1 / sqrt(d)`.
            num_samples: columns sampled for the rest.
            generator: source of the draws.

        Returns:
            `log_sum` `[batch, query_heads, n_q]`, natural logarithm.
        """

    def rule(
        self, query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, *, scale: float,
        num_samples: int, generator: torch.Generator | None = None,
    ) -> RowSumRule:  # fmt: skip
        """Return how the attention normalises; by default with `row_sums`."""
        sums = self.row_sums(
            query, key, mask, scale=scale, num_samples=num_samples, generator=generator
        )
        return RowSumRule(log_sum=sums.log_sum)
