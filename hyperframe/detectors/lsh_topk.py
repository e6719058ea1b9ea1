"""LSH top-k: for every row the best keys of its hash bucket, after the means are taken away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import pad

from ..budget import check_budget, resolve_budget
from ..component import check_non_negative_int, check_positive_int
from ..errors import ArgumentError
from ..kernels.bucket_votes import bucket_votes
from ..kernels.buckets import bucket_codes, bucket_order, bucket_ranges, bucket_topk
from ..kernels.hashing import rounded_planes
from ..kernels.lists import best_distinct
from ..masks import HeavyMask, ListMask
from ..precision import without_autocast
from ..ragged import concatenate_lists
from ..randomness import normal
from .base import AbstractDetector, default_scale
from .blocks import delayed

__all__ = ["LSHTopK"]

_KEYS_PER_BUCKET, _FEWEST_DIRECTIONS = 128, 8
_RUN_OF_ROWS = 64  # rows centred together, where a tile is one row
_ALL_ROWS, _STEP = 16384, 8  # of more rows runs are longer, and fewer of a run are in a mean


@dataclass(frozen=True, kw_only=True)
class LSHTopK(AbstractDetector):
    """Keys that single rows of a tile attend to sharply, found by hashing centred vectors.

    In each round queries and keys are rotated at random after their mean was taken away, and the
    bucket of a vector is the largest coordinate of `[y R; -y R]`; more than `2 d` buckets (of a
    number that 4 divides) are pairs of such coordinates, for two rotations. A row scores some keys
    of its bucket exactly and keeps the best. Of what its rows keep in all rounds a tile holds the
    `num_keys` keys with the largest softmax mass, summed over rows; the normaliser of a row is made
    of the keys that it found and of some that are evenly spread.

    The softmax is blind to the mean key, and the ranking of keys to the mean query. On heads of
    language models both means are long, and hide which key is at a small angle to a query.

    Under `is_causal` only keys before the tile are found, a row looks at the last `reach` of its
    bucket, and the tile holds its own keys as well. Rows and keys are centred in runs of
    `tile_size`, by the mean of all runs before, so that nothing later moves a bucket; those of the
    first run stay as they are. Without a mask the means are those of all rows and keys, and a row
    looks at the `reach` places of its bucket around the one where a key at its own position (row
    `i` is at `i + n_k - n_q`) would stand. Of more than 16,384 rows or keys runs are 8 times as
    long, and every eighth one (of a run) is in a mean.

    In the strict form the `tile_size` rows that end with the tile's first one find its keys, each
    those before itself under `is_causal`, and queries are centred by earlier ones in either case.

    With `tile_size=1` every row keeps the keys that it found itself, those with the largest logits,
    and is centred in runs of 64. Under `is_causal` that is strict as it is. Beside a detector of
    tiles such lists cost little more than their keys (`hyperframe.row_plans`).

    Args:
        num_rounds: independent rotations.
        keep: keys that a row keeps of a round.
        num_keys: keys held by a tile, beside its own under `is_causal`; a float is a fraction of
            all keys.
        num_buckets: buckets of a round, an even number. None: about one for 64 keys, at least 16,
            and at most `2 d`. Fewer find more of what is near, as a row then shares its bucket with
            more of the keys before it; with more, `reach` looks back for longer.
        reach: keys of its bucket that a row scores in a round, at most.
        min_offset: under `is_causal`, keys nearer than this before a row (or before its tile, where
            the tile's own rows choose) are not looked at: for use beside a window.
        tile_size: rows of a tile.
        votes: keys that a row votes for, of those that it found in all rounds: the ones with the
            largest shares of its softmax. None: all. Fewer make a tile's choice cheaper. Single
            rows keep what they found in any case.

    Cost: O(rounds n d (num_buckets + reach)) time, and O(rounds n_q keep) memory beside bounded
    chunks. Random; no gradient.
    Source: the buckets of cross-polytope LSH (Andoni et al. 2015, arXiv 1509.02897), used for
    attention by Reformer; centring and the exact choice inside of buckets are this library's.

    Example:
        >>> q, k = (torch.randn(1, 1, 256, 32, generator=torch.Generator().manual_seed(s))
        ...         for s in (0, 1))
        >>> k[:, :, 100] = q[:, :, 200]
        >>> mask = LSHTopK(num_keys=16).find(
        ...     q, k + 9, is_causal=True, generator=torch.Generator().manual_seed(0))
        >>> mask.to_dense()[0, 0, 200, 100].item()
        True
    """

    registry_name: ClassVar[str | None] = "lsh_topk"
    takes_stream: ClassVar[bool] = True
    row_budget: ClassVar[str | None] = "num_keys"
    finds: ClassVar[tuple[str, ...]] = ("neighbours",)

    num_rounds: int = 4
    keep: int = 2
    num_keys: int | float = 128
    num_buckets: int | None = None
    reach: int = 64
    min_offset: int = 0
    tile_size: int = 64
    votes: int | None = None

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self, "num_keys", self.num_keys)
        for name in ("num_rounds", "keep", "reach", "tile_size"):
            check_positive_int(self, name, getattr(self, name))
        check_non_negative_int(self, "min_offset", self.min_offset)
        if self.votes is not None:
            check_positive_int(self, "votes", self.votes)
        if self.num_buckets is None:
            return
        check_positive_int(self, "num_buckets", self.num_buckets)
        if self.num_buckets % 2:
            raise ArgumentError(
                f"lsh_topk: num_buckets={self.num_buckets} is odd, but every direction has an "
                "opposite; pass an even number"
            )

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return what each tile's rows found; see the class and `AbstractDetector.find`."""
        return self._find(query, key, scale, generator, None, is_causal=is_causal, strict=False)

    def find_strict(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
        earlier_query: torch.Tensor | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return keys found by earlier rows and the first one of each tile."""
        return self._find(
            query, key, scale, generator, earlier_query, is_causal=is_causal, strict=True
        )

    def _find(
        self, query: torch.Tensor, key: torch.Tensor, scale: float | None,
        generator: torch.Generator | None, earlier_query: torch.Tensor | None, *, is_causal: bool,
        strict: bool,
    ) -> ListMask:  # fmt: skip
        batch, heads, num_queries, _ = query.shape
        num_keys, device, offset = key.shape[2], query.device, key.shape[2] - num_queries
        size = min(self.tile_size, num_queries)
        num_tiles = -(-num_queries // size)
        begin = torch.arange(num_tiles, device=device) * size + offset
        before = begin if is_causal else torch.full_like(begin, num_keys)
        scale, buckets = default_scale(query, scale), self._buckets(key)
        with torch.no_grad():
            voters, query_code, key_code = self._hashed(
                query, key, generator, earlier_query, is_causal=is_causal, strict=strict
            )
            row = torch.arange(voters.shape[2], device=device)
            position = row + (offset - (size - 1 if strict else 0))
            edge = position if strict or not is_causal else begin[row // size]
            edge = edge - self.min_offset if is_causal else edge
            query_order, _, _ = bucket_order(query_code, buckets=buckets)
            key_order, bounds, counts = bucket_order(key_code, buckets=buckets)
            ranges = bucket_ranges(
                query_code, edge.clamp(0, num_keys).int(), bounds, counts, key_order,
                reach=self.reach, is_causal=is_causal,
            )  # fmt: skip
            index, score = bucket_topk(
                voters, query_order, key, key_order, ranges, reach=self.reach, keep=self.keep,
                scale=scale,
            )  # fmt: skip
            if self.tile_size == 1:
                weight = _own_votes(index, score)
            else:
                index, weight = bucket_votes(
                    voters, key, index, score, before, size=size,
                    votes=min(self.votes or index.shape[-1], index.shape[-1]), scale=scale,
                )  # fmt: skip
            lacking = num_tiles * size - voters.shape[2]
            if lacking:
                # rows that the last tile does not have found nothing
                index = pad(index, (0, 0, 0, lacking), value=-1)
                weight = pad(weight, (0, 0, 0, lacking))
            index, weight = (x.view(batch, heads, num_tiles, -1) for x in (index, weight))
            wanted = resolve_budget(self.num_keys, num_keys)
            kept = max(1, min(wanted, index.shape[-1], num_keys))
            chosen, held = best_distinct(index, weight, limit=num_keys, k=kept)
            pieces = [(chosen.clamp(max=max(0, num_keys - 1)), held)]
            if is_causal:
                first, stop = begin.clamp(min=0), (begin + size).clamp(min=0, max=num_keys)
                own = first.unsqueeze(-1) + torch.arange(min(size, num_keys), device=device)
                own = own.clamp(max=max(0, num_keys - 1)).int()
                pieces.append((own[None, None], (stop - first).clamp(min=0)[None, None]))
            index, held = concatenate_lists(pieces, (batch, heads, num_tiles), device)
        return ListMask(
            batch_size=batch, num_query_heads=heads, num_queries=num_queries, num_keys=num_keys,
            is_causal=is_causal, key_index=index, key_count=held, tile_size=size,
        )  # fmt: skip

    def _buckets(self, key: torch.Tensor) -> int:
        if self.num_buckets is not None:
            return self.num_buckets
        wanted = -(-key.shape[2] // _KEYS_PER_BUCKET)
        wanted = max(_FEWEST_DIRECTIONS, 1 << (wanted - 1).bit_length())
        return 2 * min(wanted, key.shape[-1])

    def _hashed(
        self, query: torch.Tensor, key: torch.Tensor, generator: torch.Generator | None,
        earlier_query: torch.Tensor | None, *, is_causal: bool, strict: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """Return the voters `[B, Hq, n, d]`, and the buckets `[rounds, B, H, n]` of them and keys.

        In the strict form voter `i` is row `i - (size - 1)`, where a tile has `size` rows. What
        came earlier is centred by its own mean.
        """
        batch, key_heads, num_keys, head_dim = key.shape
        first, second = _directions(self._buckets(key), head_dim)
        shape = (self.num_rounds, batch, key_heads, head_dim, first + second)
        rotation = rounded_planes(normal(shape, key.device, generator), key.dtype)
        unit = self.tile_size if self.tile_size > 1 else _RUN_OF_ROWS
        run = _run_of(unit, num_keys) if is_causal else num_keys
        key_code = _codes(key, rotation, second, _means(key, run, runs_before=is_causal), run)
        size = min(self.tile_size, query.shape[2])
        if not strict:
            run = _run_of(unit, query.shape[2]) if is_causal else query.shape[2]
            means = _means(query, run, runs_before=is_causal)
            return query, _codes(query, rotation, second, means, run), key_code
        early = query[:, :, :0] if earlier_query is None else earlier_query
        run = _run_of(unit, query.shape[2])
        means = _means(query, run, runs_before=True, earlier=early)
        code = _codes(query, rotation, second, means, run)
        count, num_voters = size - 1, -(-query.shape[2] // size) * size
        last = early[:, :, max(0, early.shape[2] - count) :]
        early_code = None
        if last.shape[2]:
            means = _means(early, early.shape[2], runs_before=False)
            early_code = _codes(last, rotation, second, means, last.shape[2]).movedim(0, -1)
        codes = code.movedim(0, -1)  # rows of codes, as there are rows of queries
        codes = delayed(codes, early_code, count)[:, :, :num_voters].movedim(-1, 0).contiguous()
        voters = delayed(query, None if early_code is None else last, count)[:, :, :num_voters]
        return voters, codes, key_code


def _run_of(unit: int, num_rows: int) -> int:
    """Return how many rows are centred together."""
    return min(unit if num_rows <= _ALL_ROWS else _STEP * unit, num_rows)


def _means(
    x: torch.Tensor, run: int, *, runs_before: bool, earlier: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what is taken away from the rows of each run: `[B, H, runs, d]`, float32 at least.

    The mean of all rows, which are one run; or that of all runs before and of what came earlier,
    0 if there is none. Of long inputs every eighth row (of a run) stands for all of them.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    step = 1 if x.shape[2] <= _ALL_ROWS else _STEP
    if not runs_before:
        return x[:, :, ::step].mean(dim=2, keepdim=True, dtype=dtype)
    whole = (x.shape[2] - 1) // run
    rows = x[:, :, : whole * run].unflatten(2, (whole, run))[:, :, :, ::step]
    total = rows.sum(dim=3, dtype=dtype)
    count = torch.arange(whole + 1, device=x.device) * rows.shape[3]
    start = x.new_zeros((*x.shape[:2], 1, x.shape[3]), dtype=dtype)
    if earlier is not None:
        earlier = earlier[:, :, ::step]
        start = start + earlier.sum(dim=2, keepdim=True, dtype=dtype)
        count = count + earlier.shape[2]
    # a GPU scans the last dimension many times faster than another one
    total = torch.cat([start, total], dim=2).transpose(2, 3).contiguous().cumsum(dim=3)
    mean: torch.Tensor = total.transpose(2, 3) / count.clamp(min=1).unsqueeze(-1)
    return mean


def _directions(buckets: int, head_dim: int) -> tuple[int, int]:
    """Return the columns of the two hashes that are joined; 0 for the second where one does.

    More buckets than `2 d` are those of two hashes of about equally many directions, if there are
    such.
    """
    first, second = buckets, 1
    if buckets > 2 * head_dim:
        while first > 2 * second and first % 4 == 0:
            first, second = first // 2, second * 2
    return first // 2, second // 2


def _codes(
    x: torch.Tensor, rotation: torch.Tensor, second: int, means: torch.Tensor, run: int
) -> torch.Tensor:
    """Return the buckets of centred rows: int32 `[rounds, B, H, n]`; see `bucket_codes`."""
    grouped = means.to(rotation.dtype).reshape(*rotation.shape[1:3], -1, x.shape[3])
    with without_autocast(x):
        shift = grouped @ rotation
    shift = shift.view(rotation.shape[0], *means.shape[:3], rotation.shape[-1])
    return bucket_codes(x, rotation, shift, run=run, second=second)


def _own_votes(index: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """Return weights in the order of the logits of each row; 0 for what it has in an earlier slot.

    Its votes need no normaliser where a row chooses for itself.
    """
    is_one = index >= 0
    for slot in range(1, index.shape[-1]):
        is_one[..., slot] &= ~(index[..., :slot] == index[..., slot, None]).any(dim=-1)
    share = (score - score.amax(dim=-1, keepdim=True)).exp()
    return torch.where(is_one, share, 0)
