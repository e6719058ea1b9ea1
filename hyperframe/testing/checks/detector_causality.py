"""Checks of what detectors promise: causality in both senses, rectangles, and planted entries."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...detectors import AbstractDetector
from ...errors import UnsupportedError
from ...masks import HeavyMask
from .detector_checks import causal_forms, find
from .problem import (
    CheckSkippedError,
    changed,
    cpu_generator,
    device,
    fail,
    generator,
    inputs,
    same_bits,
)

__all__ = [
    "check_finds_what_it_says",
    "check_later_keys_move_no_earlier_row",
    "check_later_tokens_move_no_row_of_the_strict_form",
    "check_rectangles_have_masks",
    "check_rows_are_local_where_declared",
    "check_strict_rectangles_ignore_later_queries",
    "check_the_whole_call_is_a_part_of_itself",
]

_SHAPES = ((40, 40), (29, 40), (40, 29))
_CUTS = (1, 7, 13, 20, 26, 39)  # the first position whose token is changed


def check_later_keys_move_no_earlier_row(detector: AbstractDetector) -> None:
    """Under `is_causal` no key influences the entries of an earlier row."""

    def call(query: torch.Tensor, key: torch.Tensor) -> HeavyMask:
        return detector.find(query, key, is_causal=True, generator=generator(1))

    remedy = "choose among keys before the tile by scores of those alone"
    _check_rows_before(detector, call, "other keys", remedy, queries_too=False)


def check_later_tokens_move_no_row_of_the_strict_form(detector: AbstractDetector) -> None:
    """In the strict form neither later keys nor later queries move a row."""

    def call(query: torch.Tensor, key: torch.Tensor) -> HeavyMask:
        return detector.find_strict(query, key, is_causal=True, generator=generator(1))

    remedy = "let only queries before the tile choose, or leave find_strict to refuse"
    _check_rows_before(detector, call, "other tokens (find_strict)", remedy, queries_too=True)


def _check_rows_before(
    detector: AbstractDetector, call: Callable[[torch.Tensor, torch.Tensor], HeavyMask],
    what: str, remedy: str, *, queries_too: bool,
) -> None:  # fmt: skip
    """Change tokens from a position on; rows before it have to keep their entries."""
    answered = 0
    for num_queries, num_keys in _SHAPES:
        x, offset = inputs(num_queries=num_queries, num_keys=num_keys), num_keys - num_queries
        try:
            want = call(x.query, x.key).to_dense()
        except UnsupportedError:
            continue
        answered += 1
        for cut in _CUTS:
            row = min(max(cut - offset, 0), num_queries)
            key = changed(x.key, (..., slice(min(cut, num_keys), None), slice(None)))
            query = x.query
            if queries_too:
                query = changed(query, (..., slice(row, None), slice(None)))
            got = call(query, key).to_dense()
            moved = (want != got)[:, :, :row].any(dim=-1).any(dim=0).any(dim=0)
            if bool(moved.any()):
                asked = f"{what} from position {cut} on (n_q={num_queries}, n_k={num_keys})"
                fail(detector, asked, f"other entries of rows {_some(moved)}", remedy)
    if not answered:
        raise CheckSkippedError("the detector refuses this form by name")


def check_rows_are_local_where_declared(detector: AbstractDetector) -> None:
    """Where `is_row_local` says so, a row's entries depend on no other query."""
    if not detector.is_row_local:
        raise CheckSkippedError("is_row_local is False: rows choose together")
    x, kept = inputs(), slice(3, None, 5)
    others = [row for row in range(40) if row not in range(*kept.indices(40))]
    query = changed(x.query, (..., others, slice(None)))
    for is_causal in causal_forms(detector):
        want, got = (
            find(detector, x._replace(query=q), is_causal=is_causal)[:, :, kept]
            for q in (x.query, query)
        )
        if not same_bits(want, got):
            remedy = "set is_row_local = False, and write a find_strict if there is one"
            fail(detector, f"with other queries elsewhere, {is_causal=}", "other entries", remedy)


def check_rectangles_have_masks(detector: AbstractDetector) -> None:
    """`find_rectangle` gives uncausal masks over rectangles below the diagonal."""
    x = inputs(num_queries=64, num_keys=64)
    for start, stop, first in ((32, 64, 0), (40, 53, 8)):
        q, k = x.query[:, :, start:stop], x.key[:, :, first:start]
        mask = detector.find_rectangle(
            q, k, generator=generator(1), query_start=start, key_start=first, first_row=start
        )
        shape = (2, 4, stop - start, start - first)
        if mask.is_causal or mask.to_dense().shape != shape:
            found = f"is_causal={mask.is_causal}, {tuple(mask.to_dense().shape)}"
            asked = f"rows {start}..{stop} on keys {first}..{start}"
            fail(detector, asked, found, "return an uncausal mask over the rectangle")


def check_strict_rectangles_ignore_later_queries(detector: AbstractDetector) -> None:
    """In a strict rectangle no query moves the entries of an earlier row."""
    x, start = inputs(num_queries=64, num_keys=64), 32

    def call(query: torch.Tensor) -> torch.Tensor:
        return detector.find_rectangle(
            query[:, :, start:], x.key[:, :, :start], generator=generator(1), query_start=start,
            key_start=0, first_row=start, earlier_query=query[:, :, :start], strict=True,
        ).to_dense()  # fmt: skip

    try:
        want = call(x.query)
    except UnsupportedError:
        raise CheckSkippedError("the detector refuses this form by name") from None
    for cut in (33, 41, 50, 63):
        query = changed(x.query, (..., slice(cut, None), slice(None)))
        moved = (want != call(query))[:, :, : cut - start].any(dim=-1).any(dim=0).any(dim=0)
        if bool(moved.any()):
            remedy = "let earlier_query choose, not the rectangle's own rows"
            found = f"other entries of its rows {_some(moved)}"
            fail(detector, f"a strict rectangle, other queries from {cut} on", found, remedy)


def check_the_whole_call_is_a_part_of_itself(detector: AbstractDetector) -> None:
    """`find_within` of a call without padding is `find`."""
    for is_causal in causal_forms(detector):
        x = inputs()
        within = detector.find_within(
            x.query, x.key, is_causal=is_causal, generator=generator(1), query_start=0,
            key_start=0, first_row=0, num_queries=40, num_keys=40,
        )  # fmt: skip
        if not same_bits(within.to_dense(), find(detector, x, is_causal=is_causal)):
            remedy = "make find_within depend on the places it is told"
            fail(detector, f"find_within of a whole call, {is_causal=}", "another mask", remedy)


def check_finds_what_it_says(detector: AbstractDetector) -> None:
    """What `finds` names is found where it is planted, and stands out."""
    if not detector.finds:
        raise CheckSkippedError("finds is empty: nothing is claimed")
    for what in detector.finds:
        if what not in _PLANTED:
            remedy = f"use {', '.join(map(repr, _PLANTED))}"
            fail(detector, "what it finds", f"finds={detector.finds!r}", remedy)
        query, key, planted, is_causal, least = _PLANTED[what]()
        mask = detector.find(query, key, is_causal=is_causal, generator=generator(1)).to_dense()
        recall = float(mask[:, :, planted].float().mean())
        if recall < least:
            found = f"{recall:.0%} of them"
            remedy = "raise the budget of the checked instance, or take it out of `finds`"
            fail(detector, f"for at least {least:.0%} of planted {what}", found, remedy)


_Planted = tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool, float]


def _columns() -> _Planted:
    """Key 17 has by far the largest logit of every row."""
    x = inputs(num_queries=64, num_keys=64, head_dim=16)
    query, key = 0.3 * x.query, 0.1 * x.key
    query[..., 0], key[:, :, 17, 0] = 3.0, 12.0
    planted = torch.zeros(64, 64, dtype=torch.bool)
    planted[:, 17] = True
    return query, key, planted, False, 1.0


def _permuted(offset: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row i attends to one key, at a fixed distance or anywhere; all others are orthogonal."""
    partner = torch.randperm(64, generator=cpu_generator(3))
    if offset is not None:
        partner = (torch.arange(64) - offset) % 64
    key = 9 * torch.eye(64, device=device()).expand(2, 2, 64, 64)
    query = key[:, :1, partner].expand(2, 4, 64, 64)
    planted = torch.zeros(64, 64, dtype=torch.bool)
    planted[torch.arange(64), partner] = True
    return query, key, planted


def _diagonals() -> _Planted:
    """Row i attends to key i - 5; the first rows of a causal call have nothing to go by."""
    query, key, planted = _permuted(5)
    planted[:32] = False
    return query, key, planted, True, 0.9


def _neighbours() -> _Planted:
    """Every row has a key at angle 0, somewhere: half of them at least."""
    return (*_permuted(None), False, 0.5)


def _entries() -> _Planted:
    """Every row has one heavy entry, somewhere: all of them."""
    return (*_permuted(None), False, 1.0)


_PLANTED: dict[str, Callable[[], _Planted]] = {
    "columns": _columns,
    "diagonals": _diagonals,
    "entries": _entries,
    "neighbours": _neighbours,
}


def _some(rows: torch.Tensor) -> str:
    """Return the first few places where a flag is set."""
    places = rows.nonzero().flatten().tolist()
    return ", ".join(map(str, places[:5])) + (", ..." if len(places) > 5 else "")
