"""Detectors made of one function: tiling, causality, grouped heads and budgets come for free.

    from_scores   the function says how good blocks of keys are for a tile of rows
    from_codes    the function gives queries and keys hash codes
    from_index    the function names the columns that rows should hold

Each makes a detector class of a function, to be registered and used as any other one. The class has
the function's name, its keyword-only parameters and those of the base class. Parameters that are
the same for all detectors (`scale`, `generator`, `count`) the function gets where it names them.

    >>> import torch
    >>> from hyperframe.detectors.simple import from_scores
    >>> @from_scores
    ... def mean_topk(tiles, keys, *, scale, power: float = 1.0):
    ...     '''Blocks whose mean key is near the mean query of the tile.'''
    ...     return scale * power * tiles.mean(dim=3) @ keys.mean(dim=3).transpose(-1, -2)
    >>> detector = mean_topk(num_keys=32)
    >>> detector
    mean_topk(tile_size=64, num_keys=32, block_size=16, power=1.0)
    >>> query, key = torch.randn(1, 4, 256, 8), torch.randn(1, 2, 256, 8)
    >>> detector.find(query, key).to_dense().sum(dim=-1).unique().tolist()
    [32]

The bases may be subclassed as well: `AbstractScores`, `AbstractCodes`, `AbstractIndex`.
"""

from .codes import AbstractCodes, from_codes
from .index import AbstractIndex, from_index
from .scores import AbstractScores, from_scores

__all__ = [
    "AbstractCodes",
    "AbstractIndex",
    "AbstractScores",
    "from_codes",
    "from_index",
    "from_scores",
]
