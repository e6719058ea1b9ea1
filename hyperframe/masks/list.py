"""Key lists of tiles of consecutive rows: columns, block lists, single entries."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch

from ..errors import ArgumentError, ArgumentTypeError
from ..ragged import keep_in_lists, spread_heads
from ..tables import consecutive, spaced
from .base import HeavyMask, Problem, problem_of
from .key_blocks import KeyBlocks

__all__ = ["ListMask"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ListMask(HeavyMask):
    """Key lists of tiles of consecutive rows.

    Args:
        key_index: integer `[batch, heads, tiles, L]`, distinct keys of each tile, where `heads`
            is the number of query heads or of key heads (a list shared by a group) and `tiles`
            is `ceil(n_q / tile_size)`; expanded (stride 0) dimensions are welcome and kept.
        key_count: integer `[batch, heads, tiles]`; slots from `key_count` on are unused.
        tile_size: rows of a tile; `n_q` or more for one list a head, 1 for one list a row.
        is_ascending: the maker vouches that the used keys of every list ascend, which spares the
            builder a sort on a GPU.
        blocks: where lists consist of blocks of keys, all of those there are: integer `[batch,
            key_heads, blocks, longest]`, and int64 `[blocks]`, how many keys each has.
        is_own: the keys of every tile are those at the positions of its rows.
    """

    key_index: torch.Tensor
    key_count: torch.Tensor
    tile_size: int
    is_ascending: bool = False
    blocks: tuple[torch.Tensor, torch.Tensor] | None = None
    is_own: bool = False

    @property
    def device(self) -> torch.device:
        """Where the mask's tensors live."""
        return self.key_index.device

    @classmethod
    def columns(
        cls, index: torch.Tensor, *, num_query_heads: int, num_queries: int, num_keys: int,
        is_causal: bool = False,
    ) -> ListMask:  # fmt: skip
        """Return the mask of whole columns: `index` is integer `[batch, heads, columns]`."""
        batch_size, heads, count = index.shape
        return cls(
            batch_size=batch_size, num_query_heads=num_query_heads, num_queries=num_queries,
            num_keys=num_keys, is_causal=is_causal, key_index=index.unsqueeze(2),
            key_count=torch.full((batch_size, heads, 1), count, device=index.device),
            tile_size=max(1, num_queries),
        )  # fmt: skip

    @classmethod
    def entries(
        cls, index: torch.Tensor, count: torch.Tensor, *, num_query_heads: int, num_keys: int,
        is_causal: bool = False,
    ) -> ListMask:  # fmt: skip
        """Return the mask of single entries: `index` `[batch, heads, n_q, L]`, `count` one less."""
        return cls(
            batch_size=index.shape[0], num_query_heads=num_query_heads,
            num_queries=index.shape[2], num_keys=num_keys, is_causal=is_causal,
            key_index=index, key_count=count, tile_size=1,
        )  # fmt: skip

    @classmethod
    def own_keys(cls, problem: Problem, *, tile_size: int, device: torch.device) -> ListMask:
        """Return the mask in which every tile holds the keys at the positions of its rows."""
        num_tiles, num_keys = max(1, -(-problem["num_queries"] // tile_size)), problem["num_keys"]
        offset = problem["query_offset"]
        if offset is None:
            offset = num_keys - problem["num_queries"]
        begin = spaced(num_tiles, tile_size, offset, device, low=0)
        if 0 <= offset <= num_keys - num_tiles * tile_size:
            index = consecutive(offset, offset + num_tiles * tile_size, device)
            index = index.view(num_tiles, tile_size)
            count = spaced(1, 0, tile_size, device, dtype=torch.int32).expand(num_tiles)
        else:
            last = spaced(num_tiles, tile_size, offset + tile_size, device, low=0, high=num_keys)
            index = begin.unsqueeze(-1) + torch.arange(tile_size, device=device)
            index = index.clamp(max=max(0, num_keys - 1)).int()
            count = (last - begin).clamp(min=0).int()
        shape = (problem["batch_size"], problem["num_query_heads"], num_tiles)
        return cls(
            **problem, key_index=index.expand(*shape, -1), key_count=count.expand(shape),
            tile_size=tile_size, is_ascending=True, is_own=True,
        )  # fmt: skip

    @classmethod
    def from_dense(cls, dense: torch.Tensor, *, is_causal: bool = False) -> ListMask:
        """Return the mask of a dense bool `[batch, query_heads, n_q, n_k]`; small problems."""
        if dense.dtype != torch.bool or dense.dim() != 4:
            raise ArgumentTypeError(
                "dense: expected a bool tensor [batch, query_heads, n_q, n_k], got "
                f"{dense.dtype} with shape {tuple(dense.shape)}; convert it with `.bool()`"
            )
        if is_causal:
            num_queries, num_keys = dense.shape[-2:]
            dense = dense.tril(num_keys - num_queries)
        count = dense.sum(dim=-1)
        longest = int(count.max()) if count.numel() else 0
        # a stable sort of "absent" puts the present keys first, in increasing order
        index = (~dense).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :longest]
        return cls.entries(
            index, count, num_query_heads=dense.shape[1], num_keys=dense.shape[-1],
            is_causal=is_causal,
        )  # fmt: skip

    def validate(self) -> ListMask:
        """Check that counts and used key indices are in range, and return the mask.

        Raises:
            ArgumentTypeError: tensors that are not integer.
            ArgumentError: an index or count out of range; names the value.
        """
        for name, tensor in (("key_index", self.key_index), ("key_count", self.key_count)):
            if tensor.dtype not in (torch.int32, torch.int64):
                raise ArgumentTypeError(
                    f"mask: {name} has dtype {tensor.dtype}; use int32 or int64, for example "
                    f"{name}.long()"
                )
        # expanded dimensions are stored, and looked at, once
        index, count = (
            tensor[tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())]
            for tensor in (self.key_index, self.key_count)
        )
        slots = torch.arange(index.shape[-1], device=index.device)
        is_used = slots < count.unsqueeze(-1)
        outside = is_used & ((index < 0) | (index >= self.num_keys))
        if bool(outside.any()):
            wrong = int(index.expand(outside.shape)[outside][0])
            raise ArgumentError(
                f"mask: key_index holds {wrong}, outside 0..{self.num_keys - 1} ({self.num_keys} "
                "keys); clamp it, or leave it out and lower key_count"
            )
        if bool(((count < 0) | (count > index.shape[-1])).any()):
            raise ArgumentError(
                f"mask: key_count is outside 0..{index.shape[-1]}, the length of its lists"
            )
        return self

    def key_blocks(self) -> KeyBlocks | None:
        """Return `blocks`, if they are known."""
        return None if self.blocks is None else KeyBlocks.of_lists(*self.blocks, self.num_keys)

    def retile(self, tile_size: int) -> ListMask:
        """Return the same mask over smaller tiles; `tile_size` must divide the present one.

        A list that covers all rows may be cut into tiles of any size, at no memory.
        """
        if tile_size == self.tile_size:
            return self
        num_tiles = max(1, -(-self.num_queries // tile_size))
        if self.tile_size >= self.num_queries:
            index = self.key_index[:, :, :1].expand(-1, -1, num_tiles, -1)
            count = self.key_count[:, :, :1].expand(-1, -1, num_tiles)
        elif self.tile_size % tile_size == 0:
            tile = torch.arange(num_tiles, device=self.device) * tile_size // self.tile_size
            index, count = self.key_index[:, :, tile], self.key_count[:, :, tile]
        else:
            raise ArgumentError(
                f"tile_size: {tile_size} does not divide the mask's tile size {self.tile_size}"
            )
        return ListMask(
            **problem_of(self), key_index=index, key_count=count, tile_size=tile_size,
            is_ascending=self.is_ascending, blocks=self.blocks,
        )  # fmt: skip

    def restricted(self, row_start: int, num_rows: int, key_start: int, num_keys: int) -> ListMask:
        """Return the part of the mask in a rectangle, as a mask over that rectangle, uncausal."""
        if self.tile_size >= self.num_queries:
            # one list for all rows, wherever the rectangle begins
            whole, tile_size, tiles = self, max(1, num_rows), slice(0, 1)
        else:
            tile_size = gcd(self.tile_size, row_start)
            whole = self.retile(tile_size)
            first = row_start // tile_size
            tiles = slice(first, first - (-num_rows // tile_size))
        index = whole.key_index[:, :, tiles].long() - key_start
        index, count = keep_in_lists(
            index, whole.key_count[:, :, tiles], (index >= 0) & (index < num_keys)
        )
        return ListMask(
            batch_size=self.batch_size, num_query_heads=self.num_query_heads,
            num_queries=num_rows, num_keys=num_keys, key_index=index, key_count=count,
            tile_size=tile_size,
        )  # fmt: skip

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        tile = torch.arange(start, stop, device=self.device) // self.tile_size
        index = spread_heads(self.key_index, self.num_query_heads)[:, :, tile].long()
        count = spread_heads(self.key_count, self.num_query_heads)[:, :, tile]
        slots = torch.arange(index.shape[-1], device=self.device)
        # unused slots write to an extra last column
        index = torch.where(slots < count.unsqueeze(-1), index, self.num_keys)
        dense = torch.zeros(
            self.batch_size, self.num_query_heads, stop - start, self.num_keys + 1,
            dtype=torch.bool, device=self.device,
        )  # fmt: skip
        return dense.scatter_(-1, index.expand(self.batch_size, -1, -1, -1), True)[..., :-1]
