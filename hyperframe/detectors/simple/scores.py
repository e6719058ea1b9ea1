"""Detectors that are a score of key blocks for tiles of rows."""

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
from ...validation import may_look_at
from ..base import default_scale
from ..block_scores import AbstractBlockScores
from ..blocks import best_blocks, filled_runs
from .functions import detector_of

__all__ = ["AbstractScores", "from_scores"]


@dataclass(frozen=True, kw_only=True)
class AbstractScores(AbstractBlockScores):
    """Base of detectors that say how good blocks of keys are for a tile of rows.

    A tile of `tile_size` rows holds the blocks with the best scores. Under `is_causal` it chooses
    among the whole blocks before its first row, and holds all keys from there to its last row as
    well. In the strict form the rows of a tile are the `tile_size` rows that end with its first
    one. So no later key or query moves a choice, as long as the score of a block looks at no other
    block. What has to compare blocks, a softmax, is done here: return logits.

    Args:
        tile_size: rows of a tile.
        num_keys: keys held by a tile, at most, beside its own under `is_causal`; a float is a
            fraction of all keys.
        block_size: keys of a block, no more than `num_keys`; 1 chooses single keys.

    Cost: that of the scores; they are made for some tiles at a time. No gradient.
    """

    row_budget: ClassVar[str | None] = "num_keys"

    num_keys: int | float = 256
    block_size: int = 16

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_positive_int(self, "tile_size", self.tile_size)
        check_budget(self, "num_keys", self.num_keys)
        check_positive_int(self, "block_size", self.block_size)

    def with_budget(self, keys: int) -> AbstractScores:
        """Return the detector that holds about so many keys."""
        return self.replace(num_keys=keys)

    @abstractmethod
    def _scores(self, tiles: torch.Tensor, keys: torch.Tensor, *, scale: float) -> torch.Tensor:
        """Return how good each block of keys is for each tile of rows; more is better.

        Args:
            tiles: `[batch, heads, tiles, tile_size, d]`, rows of some tiles. A short last tile is
                filled with its last row.
            keys: `[batch, heads, blocks, block_size, d]`, all blocks; a short last block is
                filled with its last key.
            scale: factor of the logits.

        Returns:
            `[batch, heads, tiles, blocks]`; or logits `[batch, heads, tiles, voters, blocks]`: then
            the scores are the masses of a softmax over the blocks that the tile chooses among,
            added up over the voters.
        """

    def _find(
        self, voters: torch.Tensor, query: torch.Tensor, key: torch.Tensor, scale: float | None,
        is_causal: bool,
    ) -> HeavyMask:  # fmt: skip
        batch, heads, num_queries, _ = query.shape
        key_heads, num_keys = key.shape[1:3]
        budget = resolve_budget(self.num_keys, num_keys)
        width = min(self.block_size, budget)
        num_tiles, total = -(-num_queries // self.tile_size), -(-num_keys // width)
        dtype = torch.promote_types(key.dtype, torch.float32)
        with torch.no_grad(), without_autocast(key):
            rows = filled_runs(voters, self.tile_size, num_tiles)
            # a key head has the tiles of all its query heads: keys are not repeated
            rows = rows.unflatten(1, (key_heads, heads // key_heads))
            blocks = filled_runs(key, width, total).to(dtype)
            begin = torch.arange(num_tiles, device=key.device) * self.tile_size
            seen = (begin + num_keys - num_queries).clamp(min=0) // width
            place = torch.arange(total, device=key.device)

            def scores(tiles: slice) -> torch.Tensor:
                chosen = rows[:, :, :, tiles].to(dtype)
                count = chosen.shape[3]
                found = self._scores(
                    chosen.flatten(2, 3), blocks, scale=default_scale(query, scale)
                )
                self._check(found, (batch, key_heads, heads // key_heads * count, total))
                self._check_numbers(found, chosen, blocks)
                if found.dim() == 5:
                    found = found.unflatten(2, (-1, count))
                    if is_causal:  # later keys must not enter the normaliser
                        is_later = place >= seen[tiles, None, None]
                        found = found.masked_fill(is_later, torch.finfo(found.dtype).min)
                    found = torch.softmax(found, dim=-1).sum(dim=-2)
                return found.reshape(batch, heads, count, total).to(dtype)

            return best_blocks(
                scores, query, key, block_size=width, num_blocks=budget // width,
                tile_size=self.tile_size, is_causal=is_causal,
            )  # fmt: skip

    def _check(self, found: Any, shape: tuple[int, ...]) -> None:
        is_tensor = isinstance(found, torch.Tensor) and found.is_floating_point()
        if is_tensor and shape in (tuple(found.shape), (*found.shape[:3], *found.shape[4:])):
            return
        what = f"a {type(found).__name__}"
        if isinstance(found, torch.Tensor):
            what = f"{found.dtype} {tuple(found.shape)}"
        raise ArgumentError(
            f"{self.name}: its scores are {what}; return floating point [batch, heads, tiles, "
            f"blocks] = {shape}, or logits [batch, heads, tiles, voters, blocks]"
        )

    def _check_numbers(self, found: torch.Tensor, *of: torch.Tensor) -> None:
        """Refuse scores that are NaN, unless the inputs are: the best blocks would be any."""
        if not (may_look_at(found) and bool(found.isnan().any())):
            return
        if all(bool(tensor.isfinite().all()) for tensor in of):
            raise ArgumentError(
                f"{self.name}: {int(found.isnan().sum())} of its {found.numel()} scores are NaN, "
                "for queries and keys that are finite; look for divisions by 0 and for inf - inf"
            )


def from_scores(function: Callable[..., torch.Tensor]) -> type[AbstractScores]:
    """Make a detector of a function that scores blocks of keys for tiles of rows.

    Args:
        function: `function(tiles, keys, *, ...)`, see `AbstractScores` for what it gets and
            returns. By keyword it may ask for `scale`, for `tile_size`, `num_keys` and
            `block_size`, and for parameters of its own, with defaults.

    Returns:
        A detector class of the function's name.

    Example:
        >>> @from_scores
        ... def nearest(tiles, keys, *, scale, block_size: int = 1):
        ...     '''Keys with most softmax mass of the rows of the tile: exact, and quadratic.'''
        ...     return scale * tiles @ keys.flatten(2, 3).transpose(-1, -2).unsqueeze(2)
        >>> q, k = torch.zeros(1, 1, 64, 4), torch.zeros(1, 1, 64, 4)
        >>> q[..., 0], k[:, :, 40, 0] = 1.0, 9.0
        >>> nearest(num_keys=1).find(q, k).to_dense()[0, 0, 5].nonzero().item()
        40
    """
    return detector_of(
        function, AbstractScores, maker="from_scores", method="_scores",
        tensors={("tiles", "keys")}, given={"scale"}, attributes={"takes_stream": True},
    )  # fmt: skip
