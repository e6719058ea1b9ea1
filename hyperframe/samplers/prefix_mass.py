"""Pooled attention to the keys before each tile, without a look at any later key."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..rectangles import Level, causal_levels
from .pooled import pooled_mass, pooled_queries, run_lengths

__all__ = ["Pieces", "PrefixMass", "prefix_mass"]


class Pieces(NamedTuple):
    """The rectangles that the keys before each tile are cut into, in their order: int64 `[T, K]`.

    Attributes:
        number: number of the rectangle among all.
        start: its first key.
        first: place of that key's entry in `PrefixMass.density`.
        length: its keys; 0 where the tile has no rectangle of this kind.
    """

    number: torch.Tensor
    start: torch.Tensor
    first: torch.Tensor
    length: torch.Tensor


class PrefixMass(NamedTuple):
    """Masses of the keys that every row of a tile sees, rectangle by rectangle.

    Attributes:
        density: float64 `[batch, key_heads, N]`, of the keys of all rectangles; adds up to 1 in
            each of them.
        cumulative: the same, its sums from the rectangle's first key on, plus the number of the
            rectangle: ascending.
        share: float64 `[batch, key_heads, T, K]`, the part of each rectangle in a tile's mass; adds
            up to 1, or to 0 for a tile without rectangles.
        pieces: the tiles' rectangles.
        covered: int64 `[T, 1]`: the first so many keys lie in a tile's rectangles.
    """

    density: torch.Tensor
    cumulative: torch.Tensor
    share: torch.Tensor
    pieces: Pieces
    covered: torch.Tensor


def prefix_mass(
    query: torch.Tensor, key: torch.Tensor, prefixes: torch.Tensor, *, num_runs: int, size: int,
    scale: float,
) -> PrefixMass | None:  # fmt: skip
    """Return the masses of the keys before each tile.

    The keys before all rows are one rectangle; of the others, runs of `size * 2^l` keys are, each
    with the rows of the run after it. The keys between a tile's last rectangle and its first row,
    fewer than `size`, lie in none.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        prefixes: int64 `[T]`, as in `AbstractSampler.sample_prefixes`.
        num_runs: pooled queries of a rectangle, of each query head.
        size: keys of the smallest rectangles.
        scale: factor of the logits.

    Returns:
        None where there is no rectangle. What belongs to a tile depends on no key that one of its
        rows does not see. Cost O(num_runs n d log(n / size)) time, O(n log(n / size)) memory.
    """
    offset = max(0, key.shape[2] - query.shape[2])
    query = query[:, :, max(0, query.shape[2] - key.shape[2]) :]  # the first rows see no key
    own, num_rows = key[:, :, offset:], query.shape[2]
    length = prefixes.clamp(max=key.shape[2])
    seen = torch.cat([prefixes.new_full((1,), offset), prefixes[:-1]]).minimum(length)  # [T]
    # a tile's first row, and the smallest runs before it: one rectangle for each bit of their count
    row = (seen - offset).clamp(min=0, max=num_rows - 1)
    count = row // size
    groups = []
    if offset:
        rows = torch.full((1,), num_rows, device=key.device)
        stack = (query.unsqueeze(2), key[:, :, :offset].unsqueeze(2))
        nothing = torch.zeros_like(row)
        groups.append(_Group(*stack, rows, seen >= offset, nothing, row, nothing))
    for bit, level in reversed(list(enumerate(causal_levels(num_rows, size)))):
        number = count >> (bit + 1)
        start = 2 * level.size * number
        groups.append(
            _Group(
                _runs(query, level, 1), _runs(own, level, 0),
                _rows(level, num_rows, key.device), (seen >= offset) & ((count >> bit) & 1 > 0),
                number, row - start - level.size, start + offset,
            )
        )  # fmt: skip
    if not groups:
        return None
    densities, cumulatives, normalisers, tables = [], [], [], []
    rectangles, entries = 0, 0
    for group in groups:
        num_rectangles, num_keys = group.key.shape[2:4]
        number = group.number.clamp(max=num_rectangles - 1)
        mass, normaliser = _masses(group, num_runs, scale)
        cumulative = mass.cumsum(dim=-1)
        total = cumulative[..., -1:].clamp(min=1e-300)
        numbers = torch.arange(num_rectangles, device=key.device).unsqueeze(-1) + rectangles
        densities.append((mass / total).flatten(2))
        cumulatives.append((cumulative / total + numbers).flatten(2))
        run = group.row.clamp(min=0) // -(-group.query.shape[3] // num_runs)
        run = number * normaliser.shape[-1] + run.clamp(max=normaliser.shape[-1] - 1)
        normaliser = normaliser.flatten(3)[..., run]  # [B, H, G, T]
        normalisers.append(normaliser.masked_fill(~group.is_there, -torch.inf))
        first = entries + number * num_keys
        tables.append((number + rectangles, group.start, first, group.is_there * num_keys))
        rectangles, entries = rectangles + num_rectangles, entries + num_rectangles * num_keys
    share = torch.softmax(torch.stack(normalisers, dim=-1).double(), dim=-1)
    share = share.nan_to_num(nan=0.0).mean(dim=2)  # without rectangles: 0 / 0
    pieces = Pieces(*(torch.stack(column, dim=-1) for column in zip(*tables, strict=True)))
    return PrefixMass(
        density=torch.cat(densities, dim=-1), cumulative=torch.cat(cumulatives, dim=-1),
        share=share, pieces=pieces, covered=pieces.length.sum(dim=-1, keepdim=True),
    )  # fmt: skip


class _Group(NamedTuple):
    """Rectangles of one size, and which of them each tile has."""

    query: torch.Tensor  # [B, heads, R, S, d], rows that are not there zero
    key: torch.Tensor  # [B, key_heads, R, keys, d]
    rows: torch.Tensor  # int64 [R], how many rows there are
    is_there: torch.Tensor  # bool [T]
    number: torch.Tensor  # int64 [T], which of the R
    row: torch.Tensor  # int64 [T], the tile's first row among the rectangle's
    start: torch.Tensor  # int64 [T], position of the rectangle's first key


def _masses(group: _Group, num_runs: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return masses float64 `[B, key_heads, R, keys]`, normalisers `[B, key_heads, G, R, runs]`."""
    batch, key_heads, rectangles, num_keys, dim = group.key.shape
    voters = pooled_queries(group.query, group.rows, num_runs)  # [B, heads, R, runs, d]
    runs = voters.shape[3]
    voters = voters.unflatten(1, (key_heads, -1)).transpose(2, 3)  # [B, key_heads, R, G, runs, d]
    shape = voters.shape[:5]
    votes = run_lengths(group.rows, group.query.shape[3], num_runs) > 0
    votes = votes.unsqueeze(1).expand(shape)
    mass, normaliser = pooled_mass(
        voters.reshape(-1, shape[3] * runs, dim), group.key.reshape(-1, num_keys, dim),
        votes.reshape(-1, shape[3] * runs), scale=scale,
    )  # fmt: skip
    # a key that is NaN must not unsettle the search among the keys of earlier rectangles
    mass = mass.double().nan_to_num(nan=0.0).view(batch, key_heads, rectangles, num_keys)
    return mass, normaliser.view(shape).transpose(2, 3)


def _runs(tensor: torch.Tensor, level: Level, side: int) -> torch.Tensor:
    """Stack the even (0) or odd (1) runs of a level's rectangles: `[B, heads, R, S, d]`."""
    rectangles = level.full + (level.ragged > 0)
    wanted = 2 * level.size * rectangles
    tensor = tensor[:, :, :wanted]
    if tensor.shape[2] < wanted:
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, wanted - tensor.shape[2]))
    runs: torch.Tensor = tensor.unflatten(2, (rectangles, 2, level.size))
    return runs[:, :, :, side]


def _rows(level: Level, num_rows: int, device: torch.device) -> torch.Tensor:
    """Return how many rows each rectangle of a level has: int64 `[R]`."""
    rectangles = torch.arange(level.full + (level.ragged > 0), device=device)
    return (num_rows - (2 * rectangles + 1) * level.size).clamp(max=level.size)
