"""ExpanderSketch: heavy entries of every column of `Q K^T`, found as clusters of names."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..component import check_bool, check_positive_int, check_positive_number
from ..precision import without_autocast
from ..sketching import expander_sketch as sketches
from ..sketching.columns import ColumnProblem
from ..sketching.expander_decoding import MOST_CLUSTERS, distinct, expander_rows
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
    then tested by their exact products: no entry is held that fails the definition (up to
    rounding).

    One map misses up to 1.5 % of the rows at the bound where half of the energy or more is spread
    out, and 2 to 3 % where `tau` equal rows share all of it, the worst there is; two maps miss a
    few in 10,000 of those. Maps are independent, and what any of them finds is a candidate. These
    are measurements: at these sizes the constants of the paper's proof mean nothing.

    A search looks at about `170 tau` numbers a map, nearly as many for a million rows as for a
    thousand, where a descent of a tree needs ever more levels and repetitions: with `log2(n)` of
    these it looks at more from 2^16 rows on (`benchmarks/sketches.py`). But here one product makes
    all numbers of a sketch, about `1,100 tau` a map up to 2^16 rows, and `count_sketch` has fewer.
    Where they are more than a quarter of the rows of `Q`, the identity is the better sketch: all
    products of a few columns at a time are looked at, and none is missed.

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
        keep: candidates of a column and map that are tested, times `tau`.
        spectral: part clusters that noise has joined, by a spectral cut; without it 10 to 20 %
            of the heavy rows are missed where half of the energy or more is in heavy rows.

    Cost: with `S` rows of the sketch, about `17 * 8 * width * repetitions * tau`: `O(S d)` for a
        column, `O(repetitions * 136 * n_q d)` to sketch; about 30 products of `64 x 64` matrices
        for a bucket whose clusters are joined. Memory `O(tau n_k)` a head and `max_bytes`. No
        gradient.
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

    repetitions: int = 2
    width: int | float = 8
    keep: int | float = 2
    spectral: bool = True

    def __post_init__(self) -> None:
        """Check the parameters."""
        super().__post_init__()
        check_positive_int(self, "repetitions", self.repetitions)
        check_positive_number(self, "width", self.width)
        check_positive_number(self, "keep", self.keep)
        check_bool(self, "spectral", self.spectral)

    def _sketch_rows(self, num_queries: int, tau: float) -> int:
        layout = sketches.Layout.of(num_queries, tau=tau, width=self.width)
        return self.repetitions * layout.num_outputs

    def _search(
        self, problem: ColumnProblem, tau: float, generator: torch.Generator | None
    ) -> tuple[CandidateSearch, int]:
        heads, num_queries, _ = problem.query.shape
        capacity = max(1, math.ceil(self.keep * tau))
        drawn = [
            sketches.ExpanderSketch.draw(
                heads, num_rows=num_queries, tau=tau, width=self.width,
                device=problem.query.device, generator=generator,
            )
            for _ in range(self.repetitions)
        ]  # fmt: skip
        sketched = [one.apply(problem.query) for one in drawn]

        def search(key: torch.Tensor) -> torch.Tensor:
            rows = []
            for one, sketch in zip(drawn, sketched, strict=True):
                with without_autocast(key):
                    value = key @ sketch.transpose(-1, -2)
                rows.append(
                    expander_rows(one, value, tau=tau, capacity=capacity, spectral=self.spectral)
                )
            return rows[0] if len(rows) == 1 else distinct(torch.cat(rows, dim=-1))

        return search, _column_bytes(drawn[0].layout, problem.query.element_size())


def _column_bytes(layout: sketches.Layout, item: int) -> int:
    """Return about how much is held while one column of a head is searched."""
    values = layout.num_outputs * (item + 2)
    edges = 8 * 4 * layout.graph.degree * layout.num_buckets * layout.num_vertices
    counts = 8 * 2 * layout.num_buckets * layout.num_vertices * layout.num_layers
    words = 8 * 8 * layout.num_buckets * MOST_CLUSTERS * layout.num_layers
    return values + edges + counts + words
