"""Heavy masks: which entries of `Q K^T` are computed exactly.

A mask `M` is a set of (query, key) pairs. Six forms cover the detectors, and each is stored by
what defines it rather than by its entries, so no mask ever needs `n_q x n_k` memory:

- `RangeMask`: rows in tiles, keys in an order; every tile holds one range of that order
  (buckets, clusters);
- `BlockMask`: two orders and nothing else; inside rectangles of them, blocks of equal rank (hash
  blocks without a mask);
- `BandMask`: a band around the diagonal plus the first positions (window, sinks);
- `ListMask`: key lists of tiles of consecutive rows, from one list for a head down to one list
  for each row (columns, block lists, single entries);
- `EntryMask`: single entries, kept by tiles of rows;
- `UnionMask`: several of them.

Under `is_causal` every form also requires `key position <= query position`, bottom-right aligned
when `n_q != n_k`.
"""

from .band import BandMask
from .base import HeavyMask, check_mask_type
from .block import BlockMask
from .entry import MAX_ENTRY_TILE, EntryMask
from .key_blocks import KeyBlocks
from .list import ListMask
from .range import RangeMask
from .union import UnionMask

__all__ = [
    "MAX_ENTRY_TILE",
    "BandMask",
    "BlockMask",
    "EntryMask",
    "HeavyMask",
    "KeyBlocks",
    "ListMask",
    "RangeMask",
    "UnionMask",
    "check_mask_type",
]
