"""What a detector is: a function from queries and keys to a `HeavyMask`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..component import AbstractComponent
from ..errors import UnsupportedError
from ..masks import HeavyMask

__all__ = ["AbstractDetector", "default_scale"]


def default_scale(query: torch.Tensor, scale: float | None) -> float:
    """Return `scale`, or `1 / sqrt(head_dim)` for None."""
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


@dataclass(frozen=True, kw_only=True)
class AbstractDetector(AbstractComponent):
    """Base of every detector: a frozen dataclass with one method, `find`.

    A minimal detector (every row holds the first key):

        >>> from dataclasses import dataclass
        >>> import torch
        >>> from hyperframe.detectors import AbstractDetector
        >>> from hyperframe.masks import ListMask
        >>> @dataclass(frozen=True, kw_only=True)
        ... class FirstKey(AbstractDetector):
        ...     def find(self, query, key, *, scale=None, is_causal=False, generator=None):
        ...         index = torch.zeros(key.shape[0], key.shape[1], 1, dtype=torch.int64)
        ...         return ListMask.columns(
        ...             index, num_query_heads=query.shape[1], num_queries=query.shape[2],
        ...             num_keys=key.shape[2], is_causal=is_causal)

    Attributes:
        is_positional: the mask depends on positions and not on the content of queries and keys;
            such a detector is asked for every rectangle of the causal recursion by itself.
        is_row_local: a row's entries depend on no other query, so that `find` is strictly causal
            as it is.
    """

    kind: ClassVar[str] = "detector"
    is_positional: ClassVar[bool] = False
    is_row_local: ClassVar[bool] = False

    @abstractmethod
    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the heavy entries.

        Under `is_causal` no key may influence the entries of an earlier row, other than being in
        them or not; queries may (see `find_strict`).

        Args:
            query: `[batch, query_heads, n_q, d]`.
            key: `[batch, key_heads, n_k, d]`.
            scale: factor of the logits; None is `1 / sqrt(d)`.
            is_causal: whether rows hold only keys at or before their own position.
            generator: source of all randomness.

        Returns:
            The mask.
        """

    def find_strict(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
        earlier_query: torch.Tensor | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return heavy entries in which a row depends on no later query.

        Args:
            query: as in `find`; under `is_causal=False` all keys come before all queries (a
                rectangle of the causal recursion).
            key: as in `find`.
            scale: as in `find`.
            is_causal: as in `find`.
            generator: as in `find`.
            earlier_query: queries that come before all of `query`, or None if there are none.

        Raises:
            UnsupportedError: the detector has no such form.
        """
        if self.is_row_local:
            return self.find(query, key, scale=scale, is_causal=is_causal, generator=generator)
        raise UnsupportedError(
            f"strict_causal=True: the detector {self.name} chooses entries with the help of later "
            "queries and has no strictly causal form; use strict_causal=False, or another detector"
        )

    def find_rectangle(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        generator: torch.Generator | None = None, query_start: int = 0, key_start: int = 0,
        first_row: int = 0, earlier_query: torch.Tensor | None = None, strict: bool = False,
    ) -> HeavyMask:  # fmt: skip
        """Return the heavy entries of a rectangle below the diagonal: all keys before all queries.

        Args:
            query: as in `find`.
            key: as in `find`.
            scale: as in `find`.
            generator: as in `find`.
            query_start: position of the first query; used by positional detectors.
            key_start: position of the first key.
            first_row: row of the first query in the whole call (its position, less `n_k - n_q`).
            earlier_query: see `find_strict`.
            strict: whether later queries may not help to choose.
        """
        if strict:
            return self.find_strict(
                query, key, scale=scale, generator=generator, earlier_query=earlier_query
            )
        return self.find(query, key, scale=scale, generator=generator)
