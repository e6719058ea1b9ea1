"""Schemas and shapes of the operators that `kernels/slashes.py` implements."""

from __future__ import annotations

import torch

__all__ = ["CAUGHT_SCHEMA", "LISTS_SCHEMA", "VOTERS_SCHEMA"]

VOTERS_SCHEMA = (
    "(Tensor query, Tensor? drawn, Tensor? seed, int stream, SymInt size, SymInt count,"
    " SymInt num_voters) -> (Tensor, Tensor)"
)
"""Rows that vote for runs of rows; see `kernels.slashes.run_voters`."""

CAUGHT_SCHEMA = (
    "(Tensor votes, str earlier, SymInt run, SymInt tile_size, SymInt first_offset,"
    " SymInt min_offset) -> Tensor"
)
"""What runs of keys catch of the mass of diagonals; see `kernels.slashes.caught_votes`."""

LISTS_SCHEMA = (
    "(Tensor columns, Tensor column_count, Tensor? near, Tensor? near_count, Tensor? near_begin,"
    " Tensor runs, SymInt[] cut, SymInt num_keys) -> (Tensor, Tensor, Tensor, Tensor)"
)
"""Columns and diagonals of tiles as lists; see `kernels.slashes.line_lists`."""

_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define("hyperframe::run_voters", VOTERS_SCHEMA, tags=_TAGS)
torch.library.define("hyperframe::caught_votes", CAUGHT_SCHEMA, tags=_TAGS)
torch.library.define("hyperframe::line_lists", LISTS_SCHEMA, tags=_TAGS)


@torch.library.register_fake("hyperframe::run_voters")
def _shapes_of_voters(
    query: torch.Tensor, drawn: torch.Tensor | None, seed: torch.Tensor | None, stream: int,
    size: int, count: int, num_voters: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    batch, heads, _, dim = query.shape
    voters = torch.empty(
        (batch, heads, count, num_voters, dim), dtype=query.dtype, device=query.device
    )
    return voters, torch.empty((count, num_voters), dtype=torch.int64, device=query.device)


@torch.library.register_fake("hyperframe::caught_votes")
def _shape_of_caught(
    votes: torch.Tensor, earlier: str, run: int, tile_size: int, first_offset: int, min_offset: int
) -> torch.Tensor:
    batch, heads, segments, runs = votes.shape
    votings = 1 if earlier == "all" else segments
    return torch.empty((batch, heads, votings, runs), dtype=votes.dtype, device=votes.device)


@torch.library.register_fake("hyperframe::line_lists")
def _shapes_of_lists(
    columns: torch.Tensor, column_count: torch.Tensor, near: torch.Tensor | None,
    near_count: torch.Tensor | None, near_begin: torch.Tensor | None, runs: torch.Tensor,
    cut: list[int], num_keys: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    lists = (*columns.shape[:2], column_count.shape[0])
    slots = columns.shape[-1] + (0 if near is None else near.shape[-1])
    diagonals = runs.shape[-1] * cut[2]
    index, keys = (
        torch.empty((*lists, length), dtype=torch.int32, device=columns.device)
        for length in (slots, diagonals)
    )
    counts = [torch.empty(lists, dtype=torch.int32, device=columns.device) for _ in range(2)]
    return index, counts[0], keys, counts[1]
