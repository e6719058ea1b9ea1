"""Detectors that are a hash function of queries and keys."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...budget import check_budget, resolve_budget
from ...component import check_positive_int
from ...errors import ArgumentError
from ...masks import HeavyMask
from ...precision import without_autocast
from ..base import AbstractDetector
from ..hash_rounds import mask_of_rounds, placed_rounds
from .functions import asks_for, can_look_at, detector_of, grouped

__all__ = ["AbstractCodes", "from_codes"]


@dataclass(frozen=True, kw_only=True)
class AbstractCodes(AbstractDetector):
    """Base of detectors that hold the entries whose query and key have like codes.

    The forms are those of `sort_lsh` for these codes. Without a mask queries and keys are sorted by
    code and cut into blocks of equal rank; a row holds the keys of its block. Under `is_causal` it
    holds its own key and the last ones of its own bucket; neighbouring codes are joined until a
    bucket has about a block of keys. The strict form of a rectangle places each query among the
    sorted keys by its own code. So no later key or query moves a choice, as long as the code of a
    vector looks at no other vector.

    Args:
        num_keys: keys held by a row, at most, shared equally by the rounds; a float is a fraction
            of all keys.
        num_bits: codes are in `[0, 2^num_bits)`, 1 to 62 bits. Codes that are neighbours should
            be of vectors that are near each other.
        num_rounds: how often vectors are hashed; a row holds the union of what the rounds find.

    Cost: that of the codes, and O(rounds n log n) time, O(rounds n) memory. No gradient.
    """

    row_budget: ClassVar[str | None] = "num_keys"

    num_keys: int | float = 256
    num_bits: int = 7
    num_rounds: int = 1

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self, "num_keys", self.num_keys)
        check_positive_int(self, "num_rounds", self.num_rounds)
        check_positive_int(self, "num_bits", self.num_bits)
        if self.num_bits > 62:
            raise ArgumentError(
                f"{self.name}: num_bits={self.num_bits} does not fit a 64-bit code; pass at most 62"
            )
        if isinstance(self.num_keys, int) and self.num_keys < self.num_rounds:
            raise ArgumentError(
                f"{self.name}: num_keys={self.num_keys} is no key for each of "
                f"num_rounds={self.num_rounds} rounds; pass at least as many keys as rounds"
            )

    def with_budget(self, keys: int) -> AbstractCodes:
        """Return the detector that holds about so many keys."""
        return self.replace(num_keys=keys)

    @abstractmethod
    def _codes(
        self, query: torch.Tensor, key: torch.Tensor, *, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes of one round.

        Args:
            query: `[batch, heads, rows, d]`: the rows of all query heads that share a key head.
            key: `[batch, heads, n_k, d]`.
            generator: source of the draws; what is drawn must serve queries and keys alike.

        Returns:
            int64 `[batch, heads, rows]` and `[batch, heads, n_k]`, in `[0, 2^num_bits)`.
        """

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return one mask for each round; see the class and `AbstractDetector.find`."""
        return mask_of_rounds(
            self._rounds(query, key, generator), num_queries=query.shape[2],
            num_keys=key.shape[2], block_size=self._block_size(key), num_bits=self.num_bits,
            is_causal=is_causal,
        )  # fmt: skip

    def find_strict(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
        earlier_query: torch.Tensor | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return masks in which a row's keys depend on its own query alone."""
        if is_causal:
            return self.find(query, key, is_causal=True, generator=generator)
        rounds = self._rounds(query, key, generator)
        return placed_rounds(rounds, block_size=self._block_size(key))

    def _block_size(self, key: torch.Tensor) -> int:
        return max(1, resolve_budget(self.num_keys, key.shape[2]) // self.num_rounds)

    def _rounds(
        self, query: torch.Tensor, key: torch.Tensor, generator: torch.Generator | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Codes of queries `[B, Hq, n_q]` and keys `[B, Hkv, n_k]`, a pair for each round."""
        rows, found = grouped(query, key.shape[1]), []
        with torch.no_grad(), without_autocast(key):
            for _ in range(self.num_rounds):
                pair: Any = self._codes(rows, key, generator=generator)
                if not isinstance(pair, tuple) or len(pair) != 2:
                    raise ArgumentError(
                        f"{self.name}: its codes are a {type(pair).__name__}; return a pair, the "
                        "codes of queries and those of keys"
                    )
                for what, codes, of in zip(("query", "key"), pair, (rows, key), strict=True):
                    self._check(what, codes, tuple(of.shape[:3]))
                found.append((pair[0].long().reshape(query.shape[:3]), pair[1].long()))
        return found

    def _check(self, what: str, codes: Any, shape: tuple[int, ...]) -> None:
        is_integer = isinstance(codes, torch.Tensor) and codes.dtype in (torch.int32, torch.int64)
        if not is_integer or tuple(codes.shape) != shape:
            found = f"a {type(codes).__name__}"
            if isinstance(codes, torch.Tensor):
                found = f"{codes.dtype} {tuple(codes.shape)}"
            raise ArgumentError(
                f"{self.name}: the {what} codes are {found}; return int64 [batch, heads, rows] = "
                f"{shape}"
            )
        if codes.numel() and can_look_at(codes):
            least, most = int(codes.min()), int(codes.max())
            if least < 0 or most >= 1 << self.num_bits:
                raise ArgumentError(
                    f"{self.name}: the {what} codes lie in {least}..{most}, outside "
                    f"0..{(1 << self.num_bits) - 1}; use num_bits={self.num_bits} bits, or change "
                    "that parameter"
                )


def from_codes(
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> type[AbstractCodes]:
    """Make a detector of a function that gives queries and keys hash codes.

    Args:
        function: `function(query, key, *, ...)`, see `AbstractCodes` for what it gets and returns.
            By keyword it may ask for `generator`, for `num_keys`, `num_bits` and `num_rounds`, and
            for parameters of its own, with defaults.

    Returns:
        A detector class of the function's name. One that asks for `generator` gets a
        `torch.Generator`: set the attribute `takes_stream = True` where all draws go through
        `hyperframe.randomness`.

    Example:
        >>> @from_codes
        ... def first_sign(query, key, *, num_bits: int = 1):
        ...     '''Queries and keys whose first coordinates have one sign.'''
        ...     return (query[..., 0] > 0).long(), (key[..., 0] > 0).long()
        >>> q = k = torch.tensor([1.0, -1.0, -1.0, 1.0]).view(1, 1, 4, 1)
        >>> first_sign(num_keys=2).find(q, k).to_dense()[0, 0].int().tolist()
        [[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]]
    """
    return detector_of(
        function, AbstractCodes, maker="from_codes", method="_codes",
        tensors={("query", "key")}, given={"generator"},
        attributes={"takes_stream": not asks_for(function, "generator")},
    )  # fmt: skip
