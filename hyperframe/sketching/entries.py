"""Heavy entries of the columns of `Q K^T`: their exact test, and their mask.

Queries and keys are those of a `ColumnProblem`: columns have energy 1, and an entry is heavy if
its square is at least `1 / tau`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.entry_lists import entry_lists, list_bytes
from ..kernels.sketch import heavy_products
from ..masks import EntryMask
from ..precision import without_autocast

__all__ = ["Entries", "entry_mask", "find_entries_exactly", "verified"]

_CHUNK_BYTES = 64 << 20  # of temporaries held at once; as many as a search holds on a GPU
_GPU_CHUNK_BYTES = 1 << 30
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
        query: `[heads, n_q, d]`, of a `ColumnProblem`; may be of a lower precision, if exact.
        key: `[heads, columns, d]`, some of its keys.
        row: int64 `[heads, columns, C]`, distinct candidates of each column, -1 for none.
        tau: the bound; a column has at most this many heavy entries.
        limit: slots of the result; `tau` of them hold all that can be heavy.
        sign: keep only entries whose product has this sign; None keeps both.

    Returns:
        The entries of largest square, `min(limit, C)` slots.
    Cost: O(columns C d) time and memory: ask for some columns at a time.
    """
    least = (1 - _SLACK * torch.finfo(key.dtype).eps) / tau
    return Entries(*heavy_products(query, key, row, least=least, limit=limit, sign=sign))


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


def _ranked(
    row: torch.Tensor, strength: torch.Tensor, num_queries: int, tile_size: int, is_causal: bool
) -> torch.Tensor:
    """Return strengths by which tiles choose: see `entry_mask` for those of their own keys."""
    if not is_causal:
        return strength
    num_keys = row.shape[1]
    at = torch.arange(num_keys, device=row.device).unsqueeze(-1) + num_queries - num_keys
    is_own = torch.div(row, tile_size, rounding_mode="floor") == torch.div(
        at, tile_size, rounding_mode="floor"
    )
    last = -1e38 * (1 + (at % tile_size) / tile_size)  # below all logits
    return torch.where(is_own, last, strength)


def entry_mask(
    row: torch.Tensor, strength: torch.Tensor, *, batch_size: int, num_queries: int,
    is_causal: bool, tile_size: int, max_keys: int,
) -> EntryMask:  # fmt: skip
    """Return the mask of entries that are known by columns.

    The transposition is a sort of all pairs of a tile and a key by tile, see `entry_lists`; of as
    many heads at a time as fit into 64 MiB, on a GPU 1 GiB, of one at least. A pair
    is as strong as its strongest entry. What a tile cannot keep is not in the mask. Under
    `is_causal` a tile's own keys come after all keys before it, in their order, however strong they
    are: a key must not take the place of one that an earlier row holds.

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
    Cost: O(n_k C) time for a head with Triton on CUDA, elsewhere sorts; memory of the heads that
        are held at a time, and of the result.
    """
    heads, num_keys, width = row.shape
    num_tiles, longest = -(-num_queries // tile_size), min(max_keys, num_keys)
    shape, device = (heads, num_tiles, longest), row.device
    index = torch.empty(shape, dtype=torch.int32, device=device)
    bits = torch.empty(shape, dtype=torch.int64, device=device)
    count = torch.empty(shape[:2], dtype=torch.int32, device=device)
    limit = _GPU_CHUNK_BYTES if device.type == "cuda" else _CHUNK_BYTES
    step = max(1, limit // max(1, list_bytes(row, strength, longest) * num_keys * width))
    for first in range(0, heads, step):
        part = slice(first, min(first + step, heads))
        rank = _ranked(row[part], strength[part].float(), num_queries, tile_size, is_causal)
        index[part], bits[part], count[part] = entry_lists(
            row[part], rank, num_queries=num_queries, tile_size=tile_size, longest=longest,
            is_causal=is_causal,
        )  # fmt: skip
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
