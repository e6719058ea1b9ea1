"""Several masks over one problem."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import ArgumentError
from .base import HeavyMask, problem_of
from .key_blocks import KeyBlocks

__all__ = ["UnionMask"]


@dataclass(frozen=True, kw_only=True, eq=False)
class UnionMask(HeavyMask):
    """The union of several masks over one problem; made by `mask_a | mask_b`.

    Args:
        members: the masks, none of them a union.
    """

    members: tuple[HeavyMask, ...]

    @classmethod
    def of(cls, *masks: HeavyMask) -> HeavyMask:
        """Return the union of the masks, flattened; a single mask is returned as it is."""
        members = [part for mask in masks for part in mask.parts()]
        first = next((mask for mask in members if mask._has_positions), members[0])
        for other in members:
            if not first._same_problem(other):
                raise ArgumentError(
                    "mask: a union needs masks of one problem, got "
                    f"{problem_of(first)} and {problem_of(other)}; find both with the same query, "
                    "key and is_causal"
                )
        if len(members) == 1:
            return first
        return cls(**problem_of(first), members=tuple(members))

    @property
    def device(self) -> torch.device:
        """Where the members' tensors live."""
        return self.members[0].device

    def validate(self) -> UnionMask:
        """Check the members."""
        for member in self.members:
            member.validate()
        return self

    def parts(self) -> Iterator[HeavyMask]:
        """Yield the members."""
        yield from self.members

    def key_blocks(self) -> KeyBlocks | None:
        """Return the blocks of the first member that has some."""
        found = (member.key_blocks() for member in self.members)
        return next((blocks for blocks in found if blocks is not None), None)

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        dense = self.members[0]._rows(start, stop)
        for member in self.members[1:]:
            dense = dense | member._rows(start, stop)
        return dense
