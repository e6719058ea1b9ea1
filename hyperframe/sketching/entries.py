"""Heavy entries of the columns of `Q K^T`: their exact test, and their mask.

Queries and keys are those of a `ColumnProblem`: columns have energy 1, and an entry is heavy if
its square is at least `1 / tau`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..masks import EntryMask
from ..precision import without_autocast

__all__ = ["Entries", "entry_mask", "find_entries_exactly", "verified"]

_CHUNK_BYTES = 64 << 20  # of temporaries held at once
# roundings that may not cost an entry that meets the bound exactly
_SLACK = 128


class Entries(NamedTuple):
    """Entries of columns.

    Attributes:
        row: int64 `[heads, columns, C]`, -1 for a slot that is not used; distinct in a column.
        logit: floating point `[heads, columns, C]`, `q_row . k` with keys of unit energy.
    """

    row: torch.Tensor
    logit: torch.Tensor


def verified(
    query: torch.Tensor, key: torch.Tensor, row: torch.Tensor, *, tau: float, limit: int,
    sign: float | None = None,
) -> Entries:  # fmt: skip
    """Return those of some candidates that are heavy, by their exact inner products.

    Args:
        query: `[heads, n_q, d]`, of a `ColumnProblem`.
        key: `[heads, columns, d]`, some of its keys.
        row: int64 `[heads, columns, C]`, distinct candidates of each column, -1 for none.
        tau: the bound; a column has at most this many heavy entries.
        limit: slots of the result; `tau` of them hold all that can be heavy.
        sign: keep only entries whose product has this sign; None keeps both.

    Returns:
        The entries of largest square, `min(limit, C)` slots.
    Cost: O(columns C d) time and memory: ask for some columns at a time.
    """
    heads, columns, width = row.shape
    with without_autocast(query):
        index = row.clamp(min=0).view(heads, -1, 1).expand(-1, -1, query.shape[-1])
        found = query.gather(1, index).view(heads, columns, width, -1)
        logit = (found @ key.unsqueeze(-1)).squeeze(-1)
    square = logit.square()
    least = (1 - _SLACK * torch.finfo(square.dtype).eps) / tau
    is_heavy = (row >= 0) & (square > 0) & (square >= least)
    if sign is not None:
        is_heavy = is_heavy & (logit * sign > 0)
    square = square.masked_fill(~is_heavy, -1)
    if limit < width:
        square, place = square.topk(limit, dim=-1)
        row, logit = row.gather(-1, place), logit.gather(-1, place)
    return Entries(row=torch.where(square > 0, row, -1), logit=logit)


def find_entries_exactly(
    query: torch.Tensor, key: torch.Tensor, *, count: int, sign: float | None = None
) -> torch.Tensor:  # fmt: skip
    """Return the `count` largest entries of each column, by looking at all of them.

    Args:
        query: `[heads, n_q, d]`.
        key: `[heads, columns, d]`.
        count: entries of a column.
        sign: rank the products by their size in this direction; None by their squares.

    Returns:
        int64 `[heads, columns, min(count, n_q)]`, rows.
    Cost: O(n_q d) time and O(n_q) memory for each column.
    """
    with without_autocast(query):
        logit = key @ query.transpose(-1, -2)
    weight = logit.abs() if sign is None else logit * sign
    return weight.topk(min(count, query.shape[1]), dim=-1, sorted=False).indices


def entry_mask(
    row: torch.Tensor, strength: torch.Tensor, *, batch_size: int, num_queries: int,
    is_causal: bool, tile_size: int, max_keys: int,
) -> EntryMask:  # fmt: skip
    """Return the mask of entries that are known by columns.

    The transposition is a sort: each column's entries by row, then all pairs of a tile and a key
    by tile, the strongest first. A pair is as strong as its strongest entry. What a tile
    cannot keep is not in the mask.

    Args:
        row: int64 or int32 `[batch * query_heads, n_k, C]`, distinct rows of a column, -1 for none.
        strength: floating point, the same shape, finite where a row is given.
        batch_size: number of batch items.
        num_queries: `n_q`.
        is_causal: drop entries whose key is later than their row, bottom-right aligned.
        tile_size: rows of a tile, at most 64.
        max_keys: keys of a tile, at most.

    Returns:
        The mask; of equally strong pairs the ones with the first keys stay.
    Cost: O(n_k C log(n_k C)) time for a head; memory of one head, and of the result.
    """
    heads, num_keys, width = row.shape
    num_tiles, longest = -(-num_queries // tile_size), min(max_keys, num_keys)
    shape, device = (heads, num_tiles, longest), row.device
    index = torch.empty(shape, dtype=torch.int32, device=device)
    bits = torch.empty(shape, dtype=torch.int64, device=device)
    count = torch.empty(shape[:2], dtype=torch.int32, device=device)
    step = max(1, _CHUNK_BYTES // max(1, 64 * num_keys * width))
    for first in range(0, heads, step):
        part = slice(first, min(first + step, heads))
        found = _by_tile(
            row[part].long(), strength[part].float(), num_queries, tile_size, longest, is_causal
        )
        index[part], bits[part], count[part] = found
    if device.type == "cpu" and not torch.compiler.is_compiling():
        # where reading a value is free, no list is longer than the longest
        used = int(count.max())
        index, bits = index[..., :used], bits[..., :used]
    split = (batch_size, heads // batch_size)
    index, bits, count = (x.unflatten(0, split) for x in (index, bits, count))
    return EntryMask(
        batch_size=batch_size, num_query_heads=index.shape[1], num_queries=num_queries,
        num_keys=num_keys, is_causal=is_causal, key_index=index, key_count=count, row_bits=bits,
        tile_size=tile_size,
    )  # fmt: skip


def _by_tile(
    row: torch.Tensor, strength: torch.Tensor, num_queries: int, tile_size: int, longest: int,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return key lists of tiles, the rows of each key as bits, and how many keys there are."""
    heads, num_keys, width = row.shape
    num_tiles, device = -(-num_queries // tile_size), row.device
    is_used = row >= 0
    if is_causal:
        position = torch.arange(num_keys, device=device) + num_queries - num_keys
        is_used = is_used & (row >= position[:, None])
    row, order = torch.where(is_used, row, num_tiles * tile_size).sort(dim=-1)
    strength = strength.gather(-1, order)
    tile = row // tile_size
    bits = torch.ones_like(row) << (row % tile_size)
    # what a tile has of a column is a run: the first of a run learns what all of it hold
    is_first = torch.ones_like(tile, dtype=torch.bool)
    is_first[..., 1:] = tile[..., 1:] != tile[..., :-1]
    reach = 1
    while reach < min(width, tile_size):
        is_same = tile[..., reach:] == tile[..., :-reach]
        later = torch.where(is_same, bits[..., reach:], 0)
        bits = torch.cat([bits[..., :-reach] | later, bits[..., -reach:]], dim=-1)
        later = torch.where(is_same, strength[..., reach:], -torch.inf)
        strength = torch.cat(
            [torch.maximum(strength[..., :-reach], later), strength[..., -reach:]], dim=-1
        )
        reach *= 2
    pair = torch.where(is_first, tile, num_tiles) << 32 | _descending(strength)
    pair, place = pair.flatten(1).sort(dim=-1, stable=True)
    bound = torch.arange(num_tiles + 1, device=device) << 32
    bound = torch.searchsorted(pair, bound.expand(heads, -1).contiguous())
    count = (bound[:, 1:] - bound[:, :-1]).clamp(max=longest)
    slot = torch.arange(longest, device=device)
    is_kept = slot < count.unsqueeze(-1)
    taken = (bound[:, :-1].unsqueeze(-1) + slot).clamp(max=pair.shape[-1] - 1)
    place = place.gather(-1, taken.flatten(1)).view(taken.shape)
    key = torch.where(is_kept, place // width, num_keys)
    key, order = key.sort(dim=-1)
    bits = bits.flatten(1).gather(-1, place.flatten(1)).view(taken.shape).gather(-1, order)
    return key.clamp(max=num_keys - 1), bits, count


def _descending(strength: torch.Tensor) -> torch.Tensor:
    """Return int64 from 0 to 2^32 - 1 that descend as float32 values ascend."""
    bits = strength.contiguous().view(torch.int32).long()
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # from -2^31
    return (1 << 31) - 1 - ascending
