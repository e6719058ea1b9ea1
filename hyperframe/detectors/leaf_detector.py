"""Base of detectors that put keys into leaves, and choose leaves for tiles of rows."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch.nn.functional import pad

from ..budget import resolve_budget
from ..clustering.metric import in_metric_of
from ..clustering.pca_tree import num_equal_runs
from ..clustering.runs import equal_runs, gather_runs
from ..component import check_positive_int
from ..errors import ArgumentError
from ..kernels.leaves import leaf_means
from ..masks import HeavyMask, ListMask, UnionMask
from ..masks.base import Problem
from ..tables import kept_few, maker_device, spaced
from .base import AbstractDetector, default_scale
from .leaves import Leaves, SeenLeaves, best_leaves, lists_of_leaves, tile_voters

__all__ = ["AbstractLeafDetector", "Blocks"]


class Blocks(NamedTuple):
    """Blocks of consecutive keys of one size, whose keys are ordered together."""

    start: int
    size: int
    step: int  # from one block to the next: its size, or twice that
    blocks: int


@dataclass(frozen=True, kw_only=True)
class AbstractLeafDetector(AbstractDetector):
    """Base of detectors that put keys into leaves, and choose leaves for tiles of rows.

    A subclass says how many keys a leaf has and how many leaves a tile holds (`_sizes`), and orders
    points so that equal runs of them are leaves (`_order`).

    The points are keys times `(E q q^T)^(1/2)`, so that distances are those of logits. Query heads
    that share a key head share its leaves, by the queries of all of them. The means of `num_means`
    runs of a tile's queries give each leaf a score by its mean key (see `leaves.leaf_scores`), and
    the tile holds the best leaves. On CUDA with Triton the scores come from products of pairs of
    bfloat16, right to about 1e-5 of the logits: there, near-ties may fall differently.

    Under `is_causal` leaves are made in blocks of consecutive keys: in all chunks of `chunk_size`
    keys, and in every even block of `tile_size`, `2 tile_size`, ... `chunk_size / 2` keys. The keys
    before a tile are cut into such blocks, as many chunks as there are, then one block of a size at
    most; the tile chooses among all of their leaves, and holds its own keys. (Where `n_k - n_q` is
    no multiple of `tile_size`, it also holds the rest of that division: the first keys.) A block
    depends on no key outside, so that no key moves the choice of an earlier row.

    In the strict form the runs are those of the tile before, and the tile's own first row votes,
    too. The metric is that of queries before all rows that use a leaf; where there are none, points
    are keys as they are.
    """

    takes_stream: ClassVar[bool] = True

    tile_size: int = 64
    num_means: int = 4
    chunk_size: int = 1024

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_positive_int(self, "tile_size", self.tile_size)
        check_positive_int(self, "num_means", self.num_means)
        check_positive_int(self, "chunk_size", self.chunk_size)
        times, rest = divmod(self.chunk_size, self.tile_size)
        if rest or times & (times - 1):
            raise ArgumentError(
                f"{self.name}: chunk_size={self.chunk_size} is not tile_size={self.tile_size} "
                f"times a power of two; pass such a number, for example {self.tile_size * 16}"
            )

    @abstractmethod
    def _sizes(self) -> tuple[int, int | float]:
        """Return how many keys a leaf has, at most, and how many leaves a tile holds.

        The latter as a number, or a float for a fraction of the leaves of all keys.
        """

    @abstractmethod
    def _order(self, points: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Order points `[batch, key_heads, blocks, n, d]`: int64, one dimension less.

        Equal runs of the order are the leaves (`clustering.equal_runs`). No block reads another.
        """

    def _pool_step(self) -> int:
        """Return every how manyth row of a run, and key of a leaf, its mean is of."""
        return 1

    def _points(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Return what is ordered, `[batch, key_heads, n_k, d]`, in the metric of the queries."""
        return in_metric_of(query, key)

    def _largest_chunk(self) -> int:
        """Return how many keys are ordered together under a causal mask, at most."""
        return self.chunk_size

    def _longest_block(self, num_keys: int) -> int:
        """Return how many keys are ordered together where all rows see all keys."""
        return num_keys

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the leaves of every tile; see the class and `AbstractDetector.find`."""
        if is_causal:
            return self._causal(query, key, scale, generator, strict=False)
        return self._whole(query, key, scale, generator, None, strict=False)

    def find_strict(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
        earlier_query: torch.Tensor | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return leaves chosen by earlier rows and the first one of each tile."""
        if is_causal:
            return self._causal(query, key, scale, generator, strict=True)
        return self._whole(query, key, scale, generator, earlier_query, strict=True)

    def _whole(
        self, query: torch.Tensor, key: torch.Tensor, scale: float | None,
        generator: torch.Generator | None, earlier_query: torch.Tensor | None, *, strict: bool,
    ) -> ListMask:  # fmt: skip
        """Leaves of all keys, for all tiles."""
        num_queries, num_keys = query.shape[2], key.shape[2]
        size = min(self.tile_size, num_queries)
        with torch.no_grad():
            block = self._longest_block(num_keys)
            whole, rest = num_keys // block, num_keys % block
            blocks = [Blocks(0, block, block, whole), Blocks(num_keys - rest, rest, rest, 1)]
            blocks = [run for run in blocks if run.blocks and run.size]
            early = query[:, :, :0] if earlier_query is None else earlier_query
            points = self._points(early if strict else query, key)
            leaves = self._leaves(key, points, blocks, generator)
            num_leaves = leaves.mean.shape[2]
            far = spaced(-(-num_queries // size), 0, num_leaves, query.device)
            none = far.new_zeros((len(far), 0))
            seen = SeenLeaves(num_leaves, far, none, none.bool(), far)
            index, count = self._choose(
                query, key, leaves, seen, scale, earlier_query, strict=strict
            )
        every = leaves.keys, leaves.sizes
        return _mask(query, key, index, count, size, is_causal=False, blocks=every)

    def _causal(
        self, query: torch.Tensor, key: torch.Tensor, scale: float | None,
        generator: torch.Generator | None, *, strict: bool,
    ) -> HeavyMask:  # fmt: skip
        """Leaves of blocks before every tile, and its own keys."""
        num_queries, num_keys = query.shape[2], key.shape[2]
        offset = num_keys - num_queries
        unit, size = self.tile_size, min(self.tile_size, num_queries)
        num_tiles = -(-num_queries // size)
        # a tile begins behind `first` keys and whole units
        units_before, first = offset // unit, offset % unit
        last_begin = (num_tiles - 1) * size + offset
        masks = []
        with torch.no_grad():
            blocks = self._causal_blocks(first, (last_begin - first) // unit)
            if blocks:
                # no row that uses a block is among them
                early = query[:, :, : max(0, first + unit - offset)]
                points = self._points(early if strict else query, key)
                leaves = self._leaves(key, points, blocks, generator)
                longest, _ = self._sizes()
                seen = _seen_leaves(
                    num_tiles, units_before, tuple(blocks), unit, longest, query.device
                )
                chosen = self._choose(query, key, leaves, seen, scale, None, strict=strict)
                masks.append(_mask(query, key, *chosen, size, is_causal=True))
            if first and last_begin >= 0:
                head = torch.arange(first, dtype=torch.int32, device=key.device)
                begin = spaced(num_tiles, size, offset, query.device)
                count = torch.where(begin >= 0, first, 0)
                shape = (*query.shape[:2], num_tiles)
                lists = head.expand(*shape, -1), count.expand(shape)
                masks.append(_mask(query, key, *lists, size, is_causal=True))
            own = ListMask.own_keys(_problem(query, key, True), tile_size=size, device=key.device)
        return UnionMask.of(*masks, own)

    def _choose(
        self, query: torch.Tensor, key: torch.Tensor, leaves: Leaves, seen: SeenLeaves,
        scale: float | None, earlier_query: torch.Tensor | None, *, strict: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Return the lists of the best leaves, and their counts."""
        size, step = min(self.tile_size, query.shape[2]), self._pool_step()
        if step > 1:
            query = query[:, :, ::step]
            if earlier_query is not None:
                earlier_query = earlier_query[:, :, -size:][:, :, ::step]
        voters, votes = tile_voters(
            query, tile_size=-(-size // step), num_means=self.num_means, strict=strict,
            earlier_query=earlier_query,
        )  # fmt: skip
        longest, wanted = self._sizes()
        chosen = best_leaves(
            voters, votes, leaves, seen, scale=default_scale(query, scale),
            num_leaves=resolve_budget(wanted, num_equal_runs(key.shape[2], longest)),
        )  # fmt: skip
        return lists_of_leaves(chosen, leaves, seen)

    def _causal_blocks(self, first: int, units: int) -> list[Blocks]:
        """Return the chunks behind the first keys, then the even blocks of each smaller size.

        Those that some tile uses, if there are `units` tiles of keys before the last one.
        """
        size = self._largest_chunk()
        blocks = [Blocks(first, size, size, max(0, units * self.tile_size // size))]
        while size > self.tile_size:
            size //= 2
            count = (units * self.tile_size // size + 1) // 2
            blocks.append(Blocks(first, size, 2 * size, max(0, count)))
        return [run for run in blocks if run.blocks]

    def _leaves(
        self, key: torch.Tensor, points: torch.Tensor, blocks: list[Blocks],
        generator: torch.Generator | None,
    ) -> Leaves:  # fmt: skip
        """Put the keys of each block into leaves by their points."""
        longest, _ = self._sizes()
        indices, sizes, is_even = [], [], True
        for run in blocks:
            every = run.step // run.size  # 2 leaves out the odd blocks
            num_blocks = every * (run.blocks - 1) + 1
            stop = run.start + num_blocks * run.size
            chosen = points[:, :, run.start : stop].unflatten(2, (num_blocks, run.size))
            order = self._order(chosen[:, :, ::every], generator)
            first = torch.arange(run.blocks, device=key.device) * run.step + run.start
            runs = equal_runs(run.size, num_equal_runs(run.size, longest), key.device)
            index = gather_runs(order + first.unsqueeze(-1), runs).flatten(2, 3)
            indices.append(index)
            sizes.append(runs.sizes.repeat(run.blocks))
            is_even = is_even and runs.is_even and runs.longest == indices[0].shape[-1]
        widest = max(index.shape[-1] for index in indices)
        padded = [pad(index, (0, widest - index.shape[-1])) for index in indices]
        index, size = torch.cat(padded, dim=2), torch.cat(sizes)
        pooled, step = (index, size), self._pool_step()
        if step > 1:
            pooled = index[..., ::step], -(-size // step)
        return Leaves(index, size, leaf_means(key, *pooled), is_even)


def _mask(
    query: torch.Tensor, key: torch.Tensor, index: torch.Tensor, count: torch.Tensor,
    tile_size: int, *, is_causal: bool, blocks: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> ListMask:  # fmt: skip
    return ListMask(
        **_problem(query, key, is_causal), key_index=index, key_count=count, tile_size=tile_size,
        blocks=blocks,
    )  # fmt: skip


def _problem(query: torch.Tensor, key: torch.Tensor, is_causal: bool) -> Problem:
    return Problem(
        batch_size=query.shape[0], num_query_heads=query.shape[1], num_queries=query.shape[2],
        num_keys=key.shape[2], is_causal=is_causal, query_offset=None,
    )  # fmt: skip


@kept_few
def _seen_leaves(
    num_tiles: int, units_before: int, blocks: tuple[Blocks, ...], unit: int, longest: int,
    device: torch.device,
) -> SeenLeaves:  # fmt: skip
    """Return the leaves of the blocks that cover the units of keys before each tile.

    Args:
        num_tiles: tiles of rows.
        units_before: units of keys before the first tile, or less than 0.
        blocks: the blocks.
        unit: keys of a unit.
        longest: keys of a leaf, at most.
        device: where the tables are used.
    """
    before = torch.arange(num_tiles, device=maker_device(device)) + units_before
    before = before.clamp(min=0)
    num_far, far, total = 0, torch.zeros_like(before), 0
    near = [before.new_zeros((num_tiles, 0))]
    is_near = [near[0].bool()]
    for run in blocks:
        units, per_block = run.size // unit, num_equal_runs(run.size, longest)
        if run.step == run.size:
            num_far, far = run.blocks * per_block, before // units * per_block
        else:
            number = (before // (2 * units)).clamp(max=run.blocks - 1).unsqueeze(-1)
            leaf = torch.arange(per_block, device=before.device)
            near.append(total + number * per_block + leaf)
            is_near.append((before // units % 2 > 0).unsqueeze(-1).expand(-1, per_block))
        total += run.blocks * per_block
    tables = (far, torch.cat(near, dim=1), torch.cat(is_near, dim=1))
    num_seen = far + tables[2].sum(dim=-1)
    return SeenLeaves(num_far, *(table.to(device) for table in (*tables, num_seen)))
