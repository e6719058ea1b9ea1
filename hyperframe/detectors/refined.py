"""Refined: of what another detector proposes, the keys that a tile's own rows attend to most."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar

import torch

from ..budget import check_budget, resolve_budget
from ..component import check_fraction, check_positive_int
from ..errors import UnsupportedError
from ..kernels.joined import side_by_side
from ..kernels.lists import best_distinct
from ..kernels.mass import NO_WINDOW, Window, tile_mass
from ..masks import BandMask, EntryMask, HeavyMask, ListMask, UnionMask
from ..masks.base import problem_of
from ..tables import spaced
from .base import AbstractDetector, default_scale
from .blocks import delayed, filled_runs

__all__ = ["Refined"]


@dataclass(frozen=True, kw_only=True)
class Refined(AbstractDetector):
    """The second of two stages: exact scores of a tile's own rows decide among candidates.

    A first detector proposes keys for every tile, more than are wanted: its recall is what counts.
    All rows of the tile then score them exactly, and the tile keeps the `num_keys` candidates with
    the largest softmax mass, summed over the rows; of ties the first ones. What the first detector
    holds as a band (a sliding window and its sinks) is kept as it is: its keys take part in the
    softmax, and a candidate that a row sees in its window has no mass there.

    Under `is_causal` only keys before the tile are candidates and take part in the softmax, and the
    tile holds its own keys, unless the window does: no key moves the choice of an earlier row. In
    the strict form the rows that vote are as many as a tile has, and end with its first one.

    Args:
        candidates: the first stage: a detector, a name or a spec string; one that holds lists of
            keys by tiles, and bands.
        num_keys: keys kept by a tile, beside the band and its own keys; a float is a fraction of
            all keys.
        top_p: None; or the share of its softmax mass that a tile has to hold exactly: keys are
            kept, the best ones first, until band and keys hold that much (at most `num_keys`).
            Tiles whose mass lies on few keys then hold few.
        tile_size: rows of a tile; a divisor of the tiles of the candidates.
        vote_step: every how manyth row of a tile scores; neighbours want much the same keys.

    Cost: that of the candidates, and O(n_q L d / vote_step) time for `L` candidates of a tile;
    memory O(n_q L / tile_size) and one bounded chunk. Deterministic if the candidates are. No
    gradient.
    Source: two-stage retrieval. Errors on a model's heads, beside those of a choice among all keys:
    docs/how-to-choose.md.

    Example:
        >>> q, k = torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 8, 4)
        >>> q[..., 0], k[:, :, 5, 0] = 1.0, 9.0
        >>> refined = Refined(candidates="heavy_columns(num_columns=6)", num_keys=1, tile_size=4)
        >>> refined.find(q, k).to_dense()[0, 0].nonzero()[:, 1].unique().tolist()
        [5]
    """

    takes_stream: ClassVar[bool] = True  # the candidates are asked by themselves

    candidates: Any = "vertical_slash(num_columns=512)"
    num_keys: int | float = 256
    top_p: float | None = None
    tile_size: int = 64
    vote_step: int = 1

    def __post_init__(self) -> None:
        """Create the first stage and check the parameters."""
        from . import create

        check_budget(self, "num_keys", self.num_keys)
        if self.top_p is not None:
            check_fraction(self, "top_p", self.top_p)
        check_positive_int(self, "tile_size", self.tile_size)
        check_positive_int(self, "vote_step", self.vote_step)
        object.__setattr__(self, "candidates", create(self.candidates))
        # it must be told where it is, if the first stage must
        object.__setattr__(self, "is_positional", self.candidates.is_positional)

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the best candidates; see the class and `AbstractDetector.find`."""
        mask = self.candidates.find(
            query, key, scale=scale, is_causal=is_causal, generator=generator
        )
        return self._best(mask, query, key, scale)

    def find_strict(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
        earlier_query: torch.Tensor | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the best of strict candidates, for which no later query voted."""
        mask = self.candidates.find_strict(
            query, key, scale=scale, is_causal=is_causal, generator=generator,
            earlier_query=earlier_query,
        )  # fmt: skip
        return self._best(mask, query, key, scale, earlier_query, strict=True)

    def find_within(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None, strict: bool = False,
        query_start: int, key_start: int, first_row: int, num_queries: int, num_keys: int,
    ) -> HeavyMask:  # fmt: skip
        """Return the best candidates among these rows and keys of the call."""
        mask = self.candidates.find_within(
            query, key, scale=scale, is_causal=is_causal, generator=generator, strict=strict,
            query_start=query_start, key_start=key_start, first_row=first_row,
            num_queries=num_queries, num_keys=num_keys,
        )  # fmt: skip
        return self._best(mask, query, key, scale, strict=strict)

    def find_rectangle(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        generator: torch.Generator | None = None, query_start: int = 0, key_start: int = 0,
        first_row: int = 0, first_key: int = 0, earlier_query: torch.Tensor | None = None,
        strict: bool = False,
    ) -> HeavyMask:  # fmt: skip
        """Return the best candidates of a rectangle."""
        mask = self.candidates.find_rectangle(
            query, key, scale=scale, generator=generator, query_start=query_start,
            key_start=key_start, first_row=first_row, first_key=first_key,
            earlier_query=earlier_query, strict=strict,
        )  # fmt: skip
        return self._best(mask, query, key, scale, earlier_query, strict=strict)

    def _best(
        self, mask: HeavyMask, query: torch.Tensor, key: torch.Tensor, scale: float | None,
        earlier_query: torch.Tensor | None = None, *, strict: bool = False,
    ) -> HeavyMask:  # fmt: skip
        lists, bands = self._parts(mask)
        window = _window_of(bands)
        sizes = [part.tile_size for part in lists if part.tile_size < query.shape[2]]
        size = gcd(min(self.tile_size, query.shape[2]), *sizes)
        num_tiles = -(-query.shape[2] // size)
        offset, device = mask.position_offset, query.device
        begin = spaced(num_tiles, size, offset, device)
        shape = (query.shape[0], query.shape[1], num_tiles)
        tiled = [part.retile(size) for part in lists]
        kept_whole: list[HeavyMask] = [*bands]
        problem = problem_of(mask)
        if mask.is_causal and window.left < size - 1:
            kept_whole.insert(0, ListMask.own_keys(problem, tile_size=size, device=device))
        if not lists:  # nothing to choose among
            return UnionMask.of(*kept_whole)
        with torch.no_grad():
            index = _distinct(tiled, begin, shape, size, window, mask)
            voters, position = query, begin
            step = gcd(self.vote_step, size)
            votes = size // step
            rows = spaced(num_tiles, -votes, -(-query.shape[2] // step), device, high=votes)
            if strict:
                voters = delayed(query, earlier_query, size - 1)
                position = spaced(num_tiles, size, offset - (size - step), device)
                rows = spaced(num_tiles, 0, votes, device)
            voters = filled_runs(voters, size, num_tiles)
            # strict voters end with the first row of the tile, others begin with it
            voters = voters[:, :, :, step - 1 if strict else 0 :: step]
            mass = tile_mass(
                voters, rows, position, key, index, begin, window,
                scale=default_scale(query, scale), is_causal=mask.is_causal, is_delayed=strict,
                step=step,
            )  # fmt: skip
            if self.top_p is not None:
                mass = _with_target(mass, rows, self.top_p)
            kept = min(resolve_budget(self.num_keys, mask.num_keys), index.shape[-1])
            chosen, held = best_distinct(
                index, mass, limit=mask.num_keys, k=max(1, kept), is_sorted=True
            )
        found = ListMask(
            **problem, key_index=chosen.clamp(max=max(0, mask.num_keys - 1)), key_count=held,
            tile_size=size, is_ascending=True,
        )  # fmt: skip
        return UnionMask.of(found, *kept_whole)

    def _parts(self, mask: HeavyMask) -> tuple[list[ListMask], list[BandMask]]:
        parts = [p.to_lists() if isinstance(p, EntryMask) else p for p in mask.parts()]
        lists = [part for part in parts if isinstance(part, ListMask)]
        bands = [part for part in parts if isinstance(part, BandMask)]
        if len(lists) + len(bands) < len(parts):
            raise UnsupportedError(
                f"refined: candidates={self.candidates.name} holds hash blocks in orders of their "
                "own; take a detector that lists keys for tiles of rows, for example "
                "vertical_slash, pooled_topk, pca_tree or heavy_columns"
            )
        return lists, bands


def _with_target(mass: torch.Tensor, rows: torch.Tensor, top_p: float) -> torch.Tensor:
    """Give -1 to all candidates but the best ones that a tile needs to hold its share of mass.

    Args:
        mass: `[batch, heads, tiles, L]`, of the candidates; that of a row, with the band, is 1.
        rows: integer `[tiles]`, how many rows voted.
        top_p: the share.
    """
    ordered = mass.clamp(min=0).sort(dim=-1, descending=True).values
    from_here = ordered.flip(-1).cumsum(dim=-1).flip(-1)  # what would be lost without it
    is_needed = from_here > (1 - top_p) * rows.unsqueeze(-1)
    least = ordered.masked_fill(~is_needed, torch.inf).amin(dim=-1, keepdim=True)
    return mass.masked_fill(mass < least, -1.0)


def _window_of(bands: list[BandMask]) -> Window:
    """Return the union of bands."""
    if not bands:
        return NO_WINDOW
    return Window(*(max(getattr(b, n) for b in bands) for n in ("left", "right", "num_sinks")))


def _distinct(
    lists: list[ListMask], begin: torch.Tensor, shape: tuple[int, int, int], size: int,
    window: Window, mask: HeavyMask,
) -> torch.Tensor:  # fmt: skip
    """Return the candidates of every tile, ascending and once each; `n_k` fills the rest.

    What all rows of a tile hold by the bands is no candidate; under a causal mask, nor is what does
    not stand before the tile.
    """
    if mask.is_causal:  # a tile's own keys do not stand before it
        lists = [part for part in lists if not part.is_own] or lists
    pieces = [(part.key_index, part.key_count) for part in lists]
    index, count = side_by_side(pieces, shape, fill=mask.num_keys)
    first, stop = begin, None
    held = window.left + window.right + 2 - size  # keys around the tile that all rows hold
    if mask.is_causal:
        before = min(0, size - 1 - window.left)
        stop = spaced(shape[2], size, mask.position_offset + before, mask.device)
    elif held > 0:
        first = (first + (size - 1 - window.left)).unsqueeze(-1)
        index = torch.where((index >= first) & (index < first + held), mask.num_keys, index)
    index, _ = best_distinct(
        index, limit=mask.num_keys, k=max(1, index.shape[-1]), count=count,
        start=window.num_sinks, stop=stop,
    )  # fmt: skip
    return index
