"""Union: several detectors side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import ArgumentError, ArgumentTypeError
from ..masks import HeavyMask, UnionMask
from .base import AbstractDetector

__all__ = ["Union"]


@dataclass(frozen=True, kw_only=True)
class Union(AbstractDetector):
    """The union of the entries that several detectors find; no entry counts twice.

    Written `"sliding_window(width=128) | heavy_columns"` in a spec string.

    Args:
        detectors: the detectors, each an instance, a name or a spec string.

    Cost: the sum of the members' costs, and a merge for every member with an order of its own.

    Example:
        >>> q = k = torch.zeros(1, 1, 8, 4)
        >>> both = Union(detectors=("sliding_window(width=1, num_sinks=1)", "oracle(budget=1)"))
        >>> bool(both.find(q, k, is_causal=True).to_dense().diagonal(dim1=-2, dim2=-1).all())
        True
    """

    takes_stream: ClassVar[bool] = True  # every member is asked by itself

    detectors: tuple[Any, ...] = ("sliding_window", "heavy_columns")

    def __post_init__(self) -> None:
        """Create the members and flatten nested unions."""
        from . import create

        if isinstance(self.detectors, (str, AbstractDetector)) or not hasattr(
            self.detectors, "__iter__"
        ):
            raise ArgumentTypeError(
                f"union: detectors={self.detectors!r} is one object; pass a tuple of detectors, "
                'or write "a | b"'
            )
        members: list[AbstractDetector] = []
        for entry in self.detectors:
            member = create(entry)
            members += member.detectors if isinstance(member, Union) else [member]
        if not members:
            raise ArgumentError("union: detectors=() is empty; name at least one detector")
        object.__setattr__(self, "detectors", tuple(members))
        # positional members must be told where they are; no field, so it takes no part in equality
        is_positional = any(member.is_positional for member in members)
        object.__setattr__(self, "is_positional", is_positional)

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the union of the members' masks."""
        return self._united(
            "find", query, key, scale=scale, is_causal=is_causal, generator=generator
        )

    def find_strict(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
        earlier_query: torch.Tensor | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the union of the members' strict masks."""
        return self._united(
            "find_strict", query, key, scale=scale, is_causal=is_causal, generator=generator,
            earlier_query=earlier_query,
        )  # fmt: skip

    def find_within(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None, strict: bool = False,
        query_start: int, key_start: int, first_row: int, num_queries: int, num_keys: int,
    ) -> HeavyMask:  # fmt: skip
        """Return the union of the members' masks of these rows and keys of the call."""
        return self._united(
            "find_within", query, key, scale=scale, is_causal=is_causal, generator=generator,
            strict=strict, query_start=query_start, key_start=key_start, first_row=first_row,
            num_queries=num_queries, num_keys=num_keys,
        )  # fmt: skip

    def find_rectangle(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        generator: torch.Generator | None = None, query_start: int = 0, key_start: int = 0,
        first_row: int = 0, first_key: int = 0, earlier_query: torch.Tensor | None = None,
        strict: bool = False,
    ) -> HeavyMask:  # fmt: skip
        """Return the union of the members' masks of a rectangle."""
        return self._united(
            "find_rectangle", query, key, scale=scale, generator=generator,
            query_start=query_start, key_start=key_start, first_row=first_row,
            first_key=first_key, earlier_query=earlier_query, strict=strict,
        )  # fmt: skip

    def _united(self, method: str, *args: Any, **kwargs: Any) -> HeavyMask:
        return UnionMask.of(
            *(getattr(detector, method)(*args, **kwargs) for detector in self.detectors)
        )
