"""ExpanderSketch: heavy entries of every column of `Q K^T`, found as clusters of names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..component import check_bool, check_choice, check_positive_int, check_positive_number
from ..sketching import expander_sketch as sketches
from ..sketching.columns import ColumnProblem
from ..sketching.decoders import DECODERS, choose_decoder
from ..sketching.expander_decoding import column_bytes, expander_rows
from .entry_detector import AbstractEntryDetector, CandidateSearch

__all__ = ["ExpanderSketch"]


@dataclass(frozen=True, kw_only=True)
class ExpanderSketch(AbstractEntryDetector):
    """The entries that hold at least `1 / tau` of the energy of their column of `Q K^T`.

    With `x = Q k_j`, entry `(i, j)` is heavy if `x_i^2 >= ||x||^2 / tau`: at most `tau` of a
    column. A random linear map `T` makes `(T Q) k_j` the sketch of the column. Every layer of the
    sketch reads names of heavy rows from it; names point at the names of the same row in other
    layers; those that agree form clusters, and a cluster spells its row in an error-correcting code
    (see `hyperframe.sketching.expander_sketch`). All columns are decoded at once. Candidates are
    then tested by their exact products, in float32 at least: no entry is held whose share of the
    energy is below `(1 - 128 eps) / tau`, with float32's `eps` 1.5e-5 below the bound.

    One map misses what noise spoils. Measured, of rows just at the bound that hold half of the
    energy of their column 1 to 4 in 1,000, and of `tau` equal rows that share all of it, the worst
    there is, 7 to 9; beyond `4,096 tau` rows, with a weaker code, 12 and 32. Maps are independent,
    and what any of them finds is a candidate: two missed 1 of 151,000, and beyond that length 0.5
    and 1.5 in 1,000. They cost twice as much, so one is the default; take `repetitions=2` where a
    miss matters. (At these sizes the constants of the paper's proof mean nothing.)

    A search looks at about `200 tau` numbers a map, hardly more for a million rows than for a
    thousand, where a descent of a tree needs ever more levels and repetitions: with `log2(n)` of
    these it looks at more from 2^16 rows on (`benchmarks/sketches.py`). But here one product makes
    all numbers of a sketch, `832 tau` a map, and `count_sketch` has fewer. Where they are more than
    half of the rows of `Q`, the identity is the better sketch: all products of a few columns at a
    time are looked at, and none is missed.

    A plan holds what any row of a tile of `tile_size` rows holds for all of the tile; the mask is
    the entries themselves. Under `is_causal` entries above the diagonal are dropped after the
    search, which sees all queries; there is no strict form. Rows of queries or keys with NaN or
    infinity hold no entries, nor do columns without energy (zero keys, zero queries).

    Args:
        tau: the bound; below 1 nothing is heavy. `"auto"` is `n_q / log(n_q)^2`, at most 64.
        positive_only: leave out entries whose logit, by the sign of `scale`, is negative.
        center: subtract the mean of the keys first (under `is_causal` that of the keys before each
            one). The relation is then that of the centred keys.
        search: `"sketch"`, `"exact"` (all products), or `"auto"`, see above.
        max_keys_per_tile: keys of a tile at most, those with the largest logits first; the entries
            of the others are not in the mask. None: as many as make lists of 16 MiB a head.
        tile_size: rows that share keys in a plan, at most 64.
        max_bytes: of temporaries held at once while columns are searched, at least those of one.
            None: 256 MiB, on a GPU 1 GiB.
        repetitions: independent maps.
        width: cells of a layer, times `tau`.
        keep: candidates of a column and map that are tested, times `tau`; of more those of the
            first buckets. Columns of energy 1 have clusters for about `2.2 tau` rows at most.
        spectral: part clusters that noise has joined, by a spectral cut; without it twice as many
            rows are missed where half of the energy is in heavy rows.
        decoder: what reads a sketch: `"torch"` (on a GPU its kernels); `"numba"`, on a CPU; or
            `"auto"`, see `hyperframe.sketching.decoders`. For the same products they find the same.

    Cost: with `S = 832 * repetitions * tau` rows of the sketch at `width` 8 and up to
        `31,000 tau` rows, `O(S d)` for a column, `O(13 * 8 * repetitions * n_q d)` to sketch; 20
        steps of a Laplacian of 64 vertices for a bucket whose clusters are joined. Memory
        `O(tau n_k)` a head and `max_bytes`. On a GPU no host synchronisation. No gradient.
    Source: HyperAttention (arXiv 2310.05869), Corollary 2; Larsen, Nelson, Nguyen and Thorup (2016,
        arXiv 1604.01357). Departures: those of the sketch, see there; the cuts, see
        `hyperframe.sketching.clusters`; energies are exact, by `Q^T Q`, and so are the products of
        the candidates, of which those below `1 / tau` are dropped (the corollary keeps some).

    Example:
        >>> q, k = torch.eye(8)[None, None], 5 * torch.eye(8)[None, None].flip(-1)
        >>> mask = ExpanderSketch(tau=2, search="sketch").find(
        ...     q, k, generator=torch.Generator().manual_seed(0))
        >>> mask.to_dense()[0, 0].int().argmax(dim=-1).tolist()
        [7, 6, 5, 4, 3, 2, 1, 0]
    """

    exact_up_to: ClassVar[float] = 2  # names are read as products are made: they are not stored

    repetitions: int = 1
    width: int | float = 8
    keep: int | float = 3
    spectral: bool = True
    decoder: str = "auto"

    def __post_init__(self) -> None:
        """Check the parameters."""
        super().__post_init__()
        check_positive_int(self, "repetitions", self.repetitions)
        check_positive_number(self, "width", self.width)
        check_positive_number(self, "keep", self.keep)
        check_bool(self, "spectral", self.spectral)
        check_choice(self, "decoder", self.decoder, DECODERS)

    def _sketch_rows(self, num_queries: int, tau: float) -> int:
        layout = sketches.Layout.of(num_queries, tau=tau, width=self.width)
        return self.repetitions * layout.num_outputs

    def _search(
        self, problem: ColumnProblem, tau: float, generator: torch.Generator | None
    ) -> tuple[CandidateSearch, int]:
        query = problem.query
        heads, num_queries, _ = query.shape
        capacity = max(1, math.ceil(min(num_queries, self.keep * tau)))
        # on a GPU products in half precision nominate: the exact test is in float32
        dtype = torch.bfloat16 if query.is_cuda and query.dtype == torch.float32 else query.dtype
        maps = []
        for _ in range(self.repetitions):
            drawn = sketches.ExpanderSketch.draw(
                heads, num_rows=num_queries, tau=tau, width=self.width, device=query.device,
                generator=generator,
            )  # fmt: skip
            maps.append((drawn, drawn.apply(query).to(dtype)))
        products = heads * problem.key.shape[1] * self._sketch_rows(num_queries, tau)
        decoder = choose_decoder(self.decoder, device=query.device, products=products)

        def search(key: torch.Tensor) -> torch.Tensor:
            rows = [
                expander_rows(
                    drawn, sketch, key, tau=tau, capacity=capacity, spectral=self.spectral,
                    decoder=decoder,
                )
                for drawn, sketch in maps
            ]  # fmt: skip
            return rows[0] if len(rows) == 1 else distinct(torch.cat(rows, dim=-1))

        return search, self.repetitions * column_bytes(maps[0][1], capacity)


def distinct(row: torch.Tensor) -> torch.Tensor:
    """Return rows in descending order, with -1 for all but the first of equal ones."""
    row = row.sort(dim=-1, descending=True).values
    is_again = torch.nn.functional.pad(row[..., 1:] == row[..., :-1], (1, 0))
    return row.masked_fill(is_again, -1)
