"""What detectors of heavy entries by columns share: all but the search for candidates."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..component import check_bool, check_choice, check_positive_int, check_positive_number
from ..errors import ArgumentError
from ..kernels.sketch import runs_kernels
from ..masks import MAX_ENTRY_TILE, EntryMask, HeavyMask
from ..sketching.columns import ColumnProblem, exact_rows
from ..sketching.entries import entry_mask, find_entries_exactly, verified
from .base import AbstractDetector, default_scale

__all__ = ["AbstractEntryDetector", "CandidateSearch", "centred_keys"]

CandidateSearch = Callable[[torch.Tensor], torch.Tensor]
"""From some scaled keys, `[heads, columns, d]`, to distinct rows `[heads, columns, C]` or -1."""

_MOST_TAU = 64  # of tau="auto"
_LIST_BYTES = 16 << 20  # of a head's lists, for max_keys_per_tile=None
_BYTES_PER_KEY = 12  # an index and a word of rows
_CPU_BYTES, _GPU_BYTES = 256 << 20, 1 << 30  # for max_bytes=None


@dataclass(frozen=True, kw_only=True)
class AbstractEntryDetector(AbstractDetector):
    """The entries that hold at least `1 / tau` of the energy of their column of `Q K^T`.

    With `x = Q k_j`, entry `(i, j)` is heavy if `x_i^2 >= ||x||^2 / tau`: at most `tau` of a
    column. A subclass says how candidates are found from a linear sketch of `Q` (`_search`), and
    how many rows its sketch has (`_sketch_rows`). Candidates are tested here by their exact
    products: no entry is held that fails the definition (up to rounding).

    Where a sketch would have more than a quarter of the rows of `Q`, the identity is the better
    one: all products of a few columns at a time are looked at, and none is missed.

    A plan holds what any row of a tile of `tile_size` rows holds for all of the tile; the mask is
    the entries themselves. Under `is_causal` entries above the diagonal are dropped after the
    search, which sees all queries; there is no strict form. Rows of queries or keys with NaN or
    infinity hold no entries, nor do columns without energy (zero keys, zero queries).

    Args:
        tau: the bound; below 1 nothing is heavy. `"auto"` is `n_q / log(n_q)^2`, at most 64: a
            logit of about `log n` is what a softmax over `n` others of variance 1 feels, and its
            square has that share of the energy; the sketch grows with `tau`.
        positive_only: leave out entries whose logit, by the sign of `scale`, is negative: their
            squares are heavy, but they vanish under the exponential.
        center: subtract the mean of the keys first (under `is_causal` that of the keys before each
            one). Softmax is invariant to a shift of all keys, the energies are not. The relation
            is then that of the centred keys.
        search: `"sketch"`, `"exact"` (all products), or `"auto"`, see above.
        max_keys_per_tile: keys of a tile at most, those with the largest logits first (under
            `is_causal` the tile's own keys last, in their order); the entries of the others are
            not in the mask. None: as many as make lists of 16 MiB a head, 682 at
            131,072 rows and all keys up to about 9,000.
        tile_size: rows that share keys in a plan, at most 64.
        max_bytes: of temporaries held at once while columns are searched, at least those of one.
            None: 256 MiB, on a GPU 1 GiB.
    """

    takes_stream: ClassVar[bool] = True
    finds: ClassVar[tuple[str, ...]] = ("entries",)
    exact_up_to: ClassVar[float] = 4
    """Times the rows of the sketch: for fewer queries `search="auto"` looks at all products."""

    tau: int | float | str = "auto"
    positive_only: bool = False
    center: bool = False
    search: str = "auto"
    max_keys_per_tile: int | None = None
    tile_size: int = 64
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.tau != "auto":
            check_positive_number(self, "tau", self.tau)
        check_bool(self, "positive_only", self.positive_only)
        check_bool(self, "center", self.center)
        check_choice(self, "search", self.search, ("auto", "sketch", "exact"))
        if self.max_keys_per_tile is not None:
            check_positive_int(self, "max_keys_per_tile", self.max_keys_per_tile)
        check_positive_int(self, "tile_size", self.tile_size)
        if self.tile_size > MAX_ENTRY_TILE:
            raise ArgumentError(
                f"{self.name}: tile_size={self.tile_size!r} is too large: there is room for "
                f"{MAX_ENTRY_TILE}; pass at most {MAX_ENTRY_TILE}."
            )
        if self.max_bytes is not None:
            check_positive_int(self, "max_bytes", self.max_bytes)

    @abstractmethod
    def _sketch_rows(self, num_queries: int, tau: float) -> int:
        """Return the number of rows of the sketch of `num_queries` rows."""

    @abstractmethod
    def _search(
        self, problem: ColumnProblem, tau: float, generator: torch.Generator | None
    ) -> tuple[CandidateSearch, int]:
        """Sketch the queries; return the search, and about the bytes it holds for a column."""

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the heavy entries; see the class and `AbstractDetector.find`."""
        with torch.no_grad():
            return self._find(query, key, default_scale(query, scale), is_causal, generator)

    def _find(
        self, query: torch.Tensor, key: torch.Tensor, scale: float, is_causal: bool,
        generator: torch.Generator | None,
    ) -> EntryMask:  # fmt: skip
        num_queries, num_keys = query.shape[2], key.shape[2]
        tau = self._tau(num_queries)
        direction = -1.0 if scale < 0 else 1.0
        problem = ColumnProblem.of(query, centred_keys(key, is_causal) if self.center else key)
        sign = direction if self.positive_only else None
        # no more can be heavy; rounding may let one more in where tau is a whole number
        limit = max(1, math.floor(min(num_queries, tau * 1.001)))
        heads, item = problem.query.shape[0], problem.query.element_size()
        search, column_bytes = None, 3 * item * num_queries
        if not self._is_exact(num_queries, tau):
            search, column_bytes = self._search(problem, tau, generator)
        exact, factor = problem.query, None
        if runs_kernels(problem.key):
            # half of the traffic of the exact test
            exact, factor = exact_rows(query)
        rows = torch.empty((heads, num_keys, limit), dtype=torch.int32, device=query.device)
        strength = torch.empty((heads, num_keys, limit), device=query.device)
        # beside the search, the entries; without kernels also the rows of some candidates
        column_bytes += 3 * limit * (40 + (item * query.shape[-1] if factor is None else 0))
        step = max(1, self._bytes(query.device) // (heads * column_bytes))
        for start in range(0, num_keys, step):
            part = problem.key[:, start : start + step]
            if search is None:
                found = find_entries_exactly(problem.query, part, count=limit, sign=sign)
            else:
                found = search(part)
            tested = part if factor is None else part * factor
            kept = verified(exact, tested, found, tau=tau, limit=limit, sign=sign)
            slots = kept.row.shape[-1]
            rows[:, start : start + step, :slots] = kept.row.int()
            rows[:, start : start + step, slots:] = -1
            size = direction * problem.norm[:, start : start + step].unsqueeze(-1)
            strength[:, start : start + step, :slots] = (kept.logit * size).float()
        return entry_mask(
            rows, strength, batch_size=query.shape[0], num_queries=num_queries,
            is_causal=is_causal, tile_size=self.tile_size,
            max_keys=self._max_keys(num_queries, num_keys),
        )  # fmt: skip

    def _bytes(self, device: torch.device) -> int:
        if self.max_bytes is not None:
            return self.max_bytes
        return _GPU_BYTES if device.type == "cuda" else _CPU_BYTES

    def _is_exact(self, num_queries: int, tau: float) -> bool:
        if self.search == "auto":
            return num_queries < self.exact_up_to * self._sketch_rows(num_queries, tau)
        return self.search == "exact"

    def _tau(self, num_queries: int) -> float:
        if not isinstance(self.tau, str):
            return float(self.tau)
        return max(1.0, min(_MOST_TAU, num_queries / max(1.0, math.log(num_queries)) ** 2))

    def _max_keys(self, num_queries: int, num_keys: int) -> int:
        if self.max_keys_per_tile is not None:
            return self.max_keys_per_tile
        tiles = -(-num_queries // self.tile_size)
        return min(num_keys, max(self.tile_size, _LIST_BYTES // (_BYTES_PER_KEY * tiles)))


def centred_keys(key: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """Return keys less their mean; under `is_causal` less that of the keys before each one.

    Keys that are not finite stay so, and count as zeros in the means.
    """
    x = key.to(torch.promote_types(key.dtype, torch.float32))
    known = torch.where(x.isfinite().all(dim=-1, keepdim=True), x, 0)
    if not is_causal:
        return x - known.mean(dim=2, keepdim=True)
    before = known.cumsum(dim=2, dtype=torch.float64) - known
    count = torch.arange(key.shape[2], device=key.device).clamp(min=1).unsqueeze(-1)
    return x - (before / count).to(x.dtype)
