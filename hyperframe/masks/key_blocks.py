"""Key blocks: the groups into which a detector put the keys before it chose among them."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["KeyBlocks"]


class KeyBlocks(NamedTuple):
    """A partition of the keys into blocks, block after block.

    Attributes:
        order: integer `[batch, key_heads, n_k]`, the key at each place.
        edge: int64 `[blocks + 1]`, ascending from 0 to `n_k`: block `b` has the places from
            `edge[b]` up to `edge[b + 1]`, in every head.
    """

    order: torch.Tensor
    edge: torch.Tensor

    @classmethod
    def of_lists(cls, keys: torch.Tensor, sizes: torch.Tensor, num_keys: int) -> KeyBlocks:
        """Return the blocks of padded lists.

        Args:
            keys: integer `[batch, key_heads, blocks, longest]`, the keys of each block.
            sizes: int64 `[blocks]`, how many of them there are.
            num_keys: in all blocks together.

        Example:
            >>> keys = torch.tensor([[4, 1, 1], [0, 2, 3]]).view(1, 1, 2, 3)
            >>> KeyBlocks.of_lists(keys, torch.tensor([2, 3]), 5).order.tolist()
            [[[4, 1, 0, 2, 3]]]
        """
        longest = keys.shape[-1]
        edge = torch.nn.functional.pad(sizes.cumsum(dim=0), (1, 0))
        if longest * len(sizes) == num_keys:  # no list is padded
            return cls(keys.flatten(2), edge)
        place = torch.arange(num_keys, device=keys.device)
        block = torch.searchsorted(edge, place, right=True) - 1
        return cls(keys.flatten(2)[..., block * longest + place - edge[block]], edge)
