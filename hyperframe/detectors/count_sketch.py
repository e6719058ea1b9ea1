"""CountSketch: heavy entries of every column of `Q K^T`, decoded from a linear sketch of `Q`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..component import check_choice, check_positive_int, check_positive_number
from ..errors import ArgumentError
from ..sketching import count_sketch as sketches
from ..sketching.columns import ColumnProblem
from ..sketching.decoders import DECODERS, choose_decoder
from ..sketching.dyadic import MAX_REPETITIONS, RowSearch, repetitions_for
from .entry_detector import AbstractEntryDetector, CandidateSearch

__all__ = ["CountSketch", "check_descent"]


@dataclass(frozen=True, kw_only=True)
class CountSketch(AbstractEntryDetector):
    """The entries that hold at least `1 / tau` of the energy of their column of `Q K^T`.

    With `x = Q k_j`, entry `(i, j)` is heavy if `x_i^2 >= ||x||^2 / tau`; a column has at most
    `tau` of them. A random linear map `T` with far fewer rows than `Q` (a CountSketch for every
    level of a tree over the rows) makes `(T Q) k_j` the sketch of the column, from which its heavy
    rows are decoded, all columns at once: the tree is descended where enough energy is seen.
    Candidates are then tested by their exact products, in float32 at least. No entry is held whose
    share of the energy is below `(1 - 128 eps) / tau`, with float32's `eps` 1.5e-5 below the bound,
    and one that meets it is missed with small probability: see `repetitions`.

    Where `T` would have more than a quarter of the rows of `Q`, the identity is the better sketch:
    all products of a few columns at a time are looked at, and none is missed.

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
        repetitions: independent sketches of each level, at most 255. None takes as many as a
            proof needs: whatever the data, the expected share of a column's heavy entries that is
            lost is at most `n_q^-2` (114 of them at 131,072 rows), unless more nodes than are kept
            score higher than a heavy one. Of 8 the proof says 3.5 % a level; measured, on rows of
            Pareto norms, they lose 4 in 10,000, just above the bound.
        width: buckets of a level, times `tau`.
        keep: nodes of a level that are kept for each column, times `tau`. At most `tau` can hold
            the energy of a heavy entry.
        decoder: what searches a sketch: `"torch"` (on a GPU its kernels); `"numba"`, on a CPU,
            nearly twice as fast once compiled, which takes 2 seconds; or `"auto"`, numba where it
            is installed and a call large enough for that to pay, by its sizes alone (see
            `hyperframe.sketching.decoders`). They differ in which nodes of an equal score are kept
            where not all can be.

    Cost: with `S` rows of the sketch, `repetitions * width * tau * log(n_q / tau) / log(8)` about,
        `O(S d)` for a column, `O(repetitions n_q d)` to sketch, a sort of `tau n_k` numbers a
        head for the lists. Memory `O(tau n_k)` a head and `max_bytes`. No gradient.
    Source: HyperAttention (arXiv 2310.05869), Corollary 2; Charikar, Chen and Farach-Colton (2002).
        Departures: signs are independent altogether and siblings share a block of buckets (see
        `hyperframe.sketching.count_sketch`); energies are exact, by `Q^T Q`; a node is kept by a
        sum of clipped squares instead of a median.

    Example:
        >>> q, k = torch.eye(8)[None, None], 5 * torch.eye(8)[None, None].flip(-1)
        >>> CountSketch(tau=2).find(q, k).to_dense()[0, 0].int().argmax(dim=-1).tolist()
        [7, 6, 5, 4, 3, 2, 1, 0]
    """

    repetitions: int | None = 8
    width: int | float = 8
    keep: int | float = 2
    decoder: str = "auto"

    def __post_init__(self) -> None:
        """Check the parameters."""
        super().__post_init__()
        check_descent(self)

    def _sketch_rows(self, num_queries: int, tau: float) -> int:
        return sketches.sketch_size(num_queries, *self._sizes(num_queries, tau))

    def _search(
        self, problem: ColumnProblem, tau: float, generator: torch.Generator | None
    ) -> tuple[CandidateSearch, int]:
        query = problem.query
        heads, num_queries, _ = query.shape
        width, repetitions = self._sizes(num_queries, tau)
        drawn = sketches.CountSketch.draw(
            heads, num_rows=num_queries, width=width, repetitions=repetitions,
            device=query.device, generator=generator,
        )  # fmt: skip
        capacity = max(1, math.ceil(min(num_queries, self.keep * tau)))
        # on a GPU products in half precision nominate: the exact test is in float32
        dtype = torch.bfloat16 if query.is_cuda and query.dtype == torch.float32 else None
        search = RowSearch.of(drawn, query, dtype)
        products = (
            heads * problem.key.shape[1] * sketches.sketch_size(num_queries, width, repetitions)
        )
        decoder = choose_decoder(self.decoder, device=query.device, products=products)
        find = partial(search.candidates, tau=tau, capacity=capacity, decoder=decoder)
        return find, search.column_bytes(capacity)

    def _sizes(self, num_queries: int, tau: float) -> tuple[int, int]:
        """Return the buckets of a level and the repetitions."""
        blocks = math.ceil(min(self.width * tau, num_queries) / sketches.BRANCHING)
        width = max(1, blocks) * sketches.BRANCHING
        repetitions = self.repetitions
        if repetitions is None:
            levels = len(sketches.level_sizes(num_queries, width))
            repetitions = repetitions_for(num_queries**-2, levels) or MAX_REPETITIONS
        return width, repetitions


def check_descent(detector: Any) -> None:
    """Check the parameters `repetitions`, `width`, `keep` and `decoder` of a detector."""
    repetitions = detector.repetitions
    if repetitions is not None:
        check_positive_int(detector, "repetitions", repetitions)
        if repetitions > MAX_REPETITIONS:
            raise ArgumentError(
                f"{detector.name}: repetitions={repetitions} is too large: their scores share a "
                f"byte; pass at most {MAX_REPETITIONS}."
            )
    check_positive_number(detector, "width", detector.width)
    check_positive_number(detector, "keep", detector.keep)
    check_choice(detector, "decoder", detector.decoder, DECODERS)
