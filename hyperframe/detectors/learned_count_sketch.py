"""Learned CountSketch: rows that look heavy are kept, and the others are sketched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..component import (
    check_fraction,
    check_non_negative_int,
)
from ..errors import ArgumentError, ArgumentTypeError
from ..masks import EntryMask
from ..sketching import count_sketch as sketches
from ..sketching.columns import ColumnProblem
from ..sketching.decoders import choose_decoder
from ..sketching.dyadic import RowSearch
from ..sketching.entries import find_entries_exactly
from ..sketching.row_oracle import RowOracle, centred_norms, leverages
from ..sketching.row_oracle_file import load_oracle, save_oracle
from ..validation import check_inputs
from .count_sketch import CountSketch, check_descent
from .entry_detector import AbstractEntryDetector, CandidateSearch, centred_keys

__all__ = ["LearnedCountSketch"]

_UNTRAINED = {"norm": centred_norms, "leverage": leverages}


@dataclass(frozen=True, kw_only=True)
class LearnedCountSketch(AbstractEntryDetector):
    """The heavy entries of `count_sketch`, with buckets of their own for rows that look heavy.

    An oracle scores every row of queries, and the `num_unique` best of a head are kept as they
    are: all of their products are looked at, and no heavy entry of theirs is missed. The other rows
    are sketched as by `count_sketch`, with fewer buckets, so that kept rows and sketch together
    have no more rows than the sketch of `count_sketch` with the same `width` and `repetitions`.
    What is kept no longer lies in the buckets of others: where the oracle is right, the rest has
    less energy, and needs fewer.

    The oracle only moves rows from one to the other. However wrong it is, no entry is held that
    fails the definition (up to rounding), and one that meets it is missed with the probability
    that holds for `count_sketch` with the smaller width; see `repetitions`, `width` and `keep`.

    `"norm"` and `"leverage"` need no training. A trained oracle is of one layer, head by head, see
    `fit`; its file is read when the detector is made, and travels with it from then on (to a GPU
    with every call, which a CUDA graph cannot hold). None of them reads the keys of the call, so
    that no later key moves an earlier row. On heads of a small language model, trained on prose and
    asked on code, a trained one finds 0.88 to 0.94 of the entries where `"norm"` finds 0.67 to 0.93
    and `count_sketch` 0.27 (n_q = 2,048, tau 256, 768 rows of memory).

    Args:
        tau: as for `count_sketch`, and so are the parameters up to `decoder`.
        positive_only: leave out entries whose logit, by the sign of `scale`, is negative.
        center: subtract the mean of the keys first; an oracle is to be trained with the same.
        search: `"sketch"`, `"exact"`, or `"auto"`: exact where kept rows and sketch would be more
            than a quarter of the queries.
        max_keys_per_tile: keys of a tile at most, those with the largest logits first.
        tile_size: rows that share keys in a plan, at most 64.
        max_bytes: of temporaries held at once while columns are searched.
        repetitions: independent sketches of each level, at most 255; None is as for `count_sketch`.
        width: buckets of a level of the `count_sketch` whose memory is shared, times `tau`.
        keep: nodes of a level that are kept for each column, times `tau`.
        decoder: `"torch"`, `"numba"` or `"auto"`, as for `count_sketch`.
        num_unique: rows that are kept beside the sketch; a float is the fraction of the shared
            memory that they take. At most what leaves the smallest sketch its rows; 0 is
            `count_sketch` itself.
        oracle: `"norm"`, the distance from the mean query; `"leverage"`, the largest share of a
            column's energy that a row can hold, whatever the keys; a `RowOracle`; or the path of a
            file written by `fit` or `save_oracle`.

    Cost: as `count_sketch` of the same memory, `O(n_q d)` for the oracle `"norm"`, `O(n_q d^2)`
        for the others. No gradient.
    Source: Hsu, Indyk, Katabi and Vakilian, Learning-based frequency estimation algorithms (2019),
        on HyperAttention's Corollary 2 (arXiv 2310.05869). Departures: those of `count_sketch`; the
        oracle scores and a budget cuts, instead of a classifier's threshold; an item is a row that
        is heavy in many columns, so one oracle serves all of them.

    Example:
        >>> q, k = torch.eye(8)[None, None], 5 * torch.eye(8)[None, None].flip(-1)
        >>> found = LearnedCountSketch(tau=2, search="sketch", num_unique=3).find(q, k)
        >>> found.to_dense()[0, 0].int().argmax(dim=-1).tolist()
        [7, 6, 5, 4, 3, 2, 1, 0]
    """

    repetitions: int | None = 8
    width: int | float = 8
    keep: int | float = 2
    decoder: str = "auto"
    num_unique: int | float = 0.5
    oracle: str | RowOracle = "norm"

    def __post_init__(self) -> None:
        """Check the parameters, and read the oracle."""
        super().__post_init__()
        check_descent(self)
        if isinstance(self.num_unique, float):
            check_fraction(self, "num_unique", self.num_unique, include_zero=True)
        else:
            check_non_negative_int(self, "num_unique", self.num_unique)
        object.__setattr__(self, "_trained", self._read(self.oracle))

    def _read(self, oracle: object) -> RowOracle | None:
        if isinstance(oracle, RowOracle):
            return oracle
        if not isinstance(oracle, str):
            raise ArgumentTypeError(
                f"{self.name}: oracle={oracle!r} has type {type(oracle).__name__}; pass "
                f"{', '.join(map(repr, _UNTRAINED))}, the path of a file as a string, or a "
                "RowOracle."
            )
        if oracle in _UNTRAINED:
            return None
        if not Path(oracle).is_file():
            raise ArgumentError(
                f"{self.name}: oracle={oracle!r} is no file, and none of "
                f"{', '.join(map(repr, _UNTRAINED))}; make one with "
                "LearnedCountSketch.fit(query, key, path=...)."
            )
        return load_oracle(oracle)

    @classmethod
    def fit(
        cls, query: torch.Tensor | Sequence[torch.Tensor],
        key: torch.Tensor | Sequence[torch.Tensor], *, path: Path | str | None = None,
        is_causal: bool = False, num_columns: int = 1024, **parameters: Any,
    ) -> LearnedCountSketch:  # fmt: skip
        """Return the detector with an oracle trained on the queries and keys of a layer.

        Args:
            query: `[batch, query_heads, n_q, d]`, or several such, of any lengths.
            key: `[batch, key_heads, n_k, d]`, or as many.
            path: where to write the oracle; the detector then has a spec string. None keeps it in
                the detector alone.
            is_causal: whether rows attend only to keys at or before their position.
            num_columns: keys of each text that are looked at, at most.
            parameters: of the detector, all but `oracle`.

        Raises:
            MissingDependencyError: scikit-learn is not installed.
            ArgumentError: the shapes do not fit, or a head has no energy.
        Cost: O(num_columns n_q d) for a head of a text. Deterministic.
        """
        if "oracle" in parameters:
            raise ArgumentError(
                f"{cls.name}: oracle={parameters['oracle']!r} was given to fit, which makes one; "
                "leave it out."
            )
        detector = cls(**parameters)
        queries = [query] if isinstance(query, torch.Tensor) else list(query)
        keys = [key] if isinstance(key, torch.Tensor) else list(key)
        if len(queries) != len(keys) or not queries:
            raise ArgumentError(
                f"{cls.name}: fit got {len(queries)} tensors of queries and {len(keys)} of keys; "
                "pass one of each for every text."
            )
        for q, k in zip(queries, keys, strict=True):
            check_inputs(q, k, k)
        sizes = sorted({(q.shape[1], q.shape[3]) for q in queries})
        if len(sizes) > 1:
            raise ArgumentError(
                f"{cls.name}: fit got queries with (heads, head_dim) of {sizes}; an oracle is of "
                "one layer, so pass texts of the same one."
            )
        with torch.no_grad():
            problems = [
                ColumnProblem.of(q, centred_keys(k, is_causal) if detector.center else k)
                for q, k in zip(queries, keys, strict=True)
            ]
            oracle = RowOracle.fit(
                problems, query_heads=sizes[0][0], is_causal=is_causal, num_columns=num_columns,
                tau=detector._tau(max(q.shape[2] for q in queries)),
            )  # fmt: skip
        if path is None:
            return detector.replace(oracle=oracle)
        save_oracle(path, oracle)
        return detector.replace(oracle=str(path))

    _trained: ClassVar[RowOracle | None]  # not a field: made of the oracle

    def _find(
        self, query: torch.Tensor, key: torch.Tensor, scale: float, is_causal: bool,
        generator: torch.Generator | None,
    ) -> EntryMask:  # fmt: skip
        if self._trained is not None:
            self._trained.check(query.shape[1], query.shape[3])
        return super()._find(query, key, scale, is_causal, generator)

    def _plain(self, tau: float) -> CountSketch:
        """Return the detector whose memory is shared."""
        return CountSketch(tau=tau, repetitions=self.repetitions, width=self.width)

    def _sketch_rows(self, num_queries: int, tau: float) -> int:
        return self._plain(tau)._sketch_rows(num_queries, tau)

    def _search(
        self, problem: ColumnProblem, tau: float, generator: torch.Generator | None
    ) -> tuple[CandidateSearch, int]:
        query = problem.query
        heads, num_queries, _ = query.shape
        num_unique, width, repetitions = self._split(num_queries, tau)
        unique = self._scores(query).topk(num_unique, dim=-1, sorted=False).indices
        is_unique = torch.zeros(query.shape[:2], dtype=torch.bool, device=query.device)
        is_unique.scatter_(1, unique, True)
        kept = query.gather(1, unique.unsqueeze(-1).expand(-1, -1, query.shape[-1]))
        # rows of the sketch keep their numbers
        rest = query.masked_fill(is_unique.unsqueeze(-1), 0)
        drawn = sketches.CountSketch.draw(
            heads, num_rows=num_queries, width=width, repetitions=repetitions,
            device=query.device, generator=generator,
        )  # fmt: skip
        capacity = max(1, math.ceil(min(num_queries, self.keep * tau)))
        # on a GPU products in half precision nominate: the exact test is in float32
        dtype = torch.bfloat16 if query.is_cuda and query.dtype == torch.float32 else None
        search = RowSearch.of(drawn, rest, dtype)
        size = sketches.sketch_size(num_queries, width, repetitions)
        products = heads * problem.key.shape[1] * size
        decoder = choose_decoder(self.decoder, device=query.device, products=products)
        find = partial(search.candidates, tau=tau, capacity=capacity, decoder=decoder)
        limit = max(1, math.floor(min(num_queries, tau * 1.001)))
        return (
            partial(_candidates, find, kept, unique, is_unique, limit),
            search.column_bytes(capacity) + 3 * query.element_size() * num_unique + 16 * capacity,
        )

    def _scores(self, query: torch.Tensor) -> torch.Tensor:
        if self._trained is not None:
            scores = self._trained.scores(query)
        else:
            scores = _UNTRAINED[str(self.oracle)](query)
        # zeros, also those that stand for rows that are not finite, hold nothing
        return scores.masked_fill((query == 0).all(dim=-1), -torch.inf)

    def _split(self, num_queries: int, tau: float) -> tuple[int, int, int]:
        """Return the rows that are kept, the buckets of a level beside them, and repetitions."""
        most, repetitions = self._plain(tau)._sizes(num_queries, tau)
        rows = {
            width: sketches.sketch_size(num_queries, width, repetitions)
            for width in range(sketches.BRANCHING, most + 1, sketches.BRANCHING)
        }
        asked = self.num_unique
        if isinstance(asked, float):
            asked = math.floor(asked * rows[most])
        num_unique = min(asked, num_queries, rows[most] - min(rows.values()))
        # with fewer buckets there may be a level more, so that the largest one need not be next
        width = max(x for x, size in rows.items() if size + num_unique <= rows[most])
        return num_unique, width, repetitions


def _candidates(
    search: CandidateSearch, kept: torch.Tensor, unique: torch.Tensor, is_unique: torch.Tensor,
    limit: int, key: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Return the largest entries of the kept rows, and what the search finds among the others."""
    heads, columns, _ = key.shape
    row = search(key)
    # a kept row is a zero of the sketch: nominated where it shares buckets with a heavy one
    known = is_unique.gather(1, row.clamp(min=0).flatten(1)).view_as(row)
    row = row.masked_fill(known, -1)
    if not unique.shape[1]:
        return row
    place = find_entries_exactly(kept, key, count=limit)
    largest = unique.gather(1, place.flatten(1)).view(heads, columns, -1)
    return torch.cat([largest, row], dim=-1)
