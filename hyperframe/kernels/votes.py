"""Votes of sampled rows: softmax mass of keys and of diagonals, summed over the voters."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..precision import without_autocast
from .ops import has_triton
from .ops import votes as _schema  # noqa: F401  (defines the operators implemented here)

__all__ = ["Lines", "column_votes", "diagonal_mass", "line_votes"]

_CHUNK_BYTES = 64 << 20  # of logits of voters, and what is made of them, held at once
_FEWEST = 32  # groups of keys that columns are chosen from, or one for each column


class Lines(NamedTuple):
    """What `line_votes` looks for.

    Attributes:
        num_columns: columns of a segment, at most.
        run: neighbouring diagonals that are counted together.
        first_offset: the smallest offset (position of a row less that of a key) of a diagonal.
        num_runs: how many runs of diagonals, from there on.
    """

    num_columns: int
    run: int
    first_offset: int
    num_runs: int


def column_votes(
    voters: torch.Tensor, key: torch.Tensor, begin: torch.Tensor, stop: torch.Tensor, *,
    scale: float, width: int,
) -> torch.Tensor:  # fmt: skip
    """Return the softmax mass that the voters of each segment give to the keys they see.

    Args:
        voters: `[batch, query_heads, groups, segments, voters, d]`.
        key: `[batch, key_heads, n_k, d]`, of the same dtype.
        begin: integer `[groups]`, the first key that voters of a group see; 0 at least.
        stop: integer `[groups, segments]`, one past the last one; `n_k` at most.
        scale: factor of the logits.
        width: how many keys are asked for; no segment sees more.

    Returns:
        `[batch, query_heads, groups, segments, width]`, in float32 at least: sums over the voters
        of their softmax over the keys from `begin` to `stop`, the first one at 0. Nothing is said
        of what lies behind. No gradient.
        Cost O(groups segments voters width d) time. On CUDA with Triton one launch, or three for
        rows longer than 4,096, for up to 64 voters and d <= 256; elsewhere in chunks of bounded
        memory.
    """
    votes: torch.Tensor = torch.ops.hyperframe.column_votes(
        voters.detach(), key.detach(), begin, stop, scale, width
    )
    return votes


def line_votes(
    voters: torch.Tensor, row: torch.Tensor, key: torch.Tensor, lines: Lines, *, scale: float,
    is_causal: bool, segment: int, shift: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the best columns of segments of rows, and the mass of runs of diagonals in them.

    The columns have the largest sums, over the voters of the segment, of their softmax over all
    keys; under `is_causal` over those before the segment. They are chosen in two steps: first as
    many groups of 16 neighbouring keys (32 beyond 262,144 keys) as there are columns, 32 at least,
    then the best keys of those. A group's bound is the sum, over the voters, of the largest share
    that each gives to one of its keys: no key of the group has more votes, and one that each of
    them likes best there has as many. On heads of a model (2,048 keys, 32 columns of 32 groups)
    the columns found so hold 99.97 % of the votes of the very best ones in the mean over a layer,
    98.9 % in the worst segment of a head. The mass of diagonals is that of a softmax over all keys,
    or those up to the voter's position, less the columns of the segment before; the first segment
    leaves out its own.

    Args:
        voters: `[batch, query_heads, segments, voters, d]`.
        row: integer `[segments, voters]`, rows of the voters.
        key: `[batch, key_heads, n_k, d]`, of the same dtype.
        lines: what to look for.
        scale: factor of the logits.
        is_causal: see above.
        segment: rows of a segment.
        shift: key position of row 0.

    Returns:
        int32 `[batch, query_heads, segments, num_columns]`, the columns, best first, then `n_k`;
        and `[batch, query_heads, segments, num_runs]`, in float32 at least. No gradient.
        Cost O(segments voters n_k d) time. On CUDA with Triton a dozen launches, for runs of 8 or
        16, up to 64 voters and d <= 256, and memory O(segments voters n_k / run), of which 384 MiB
        are held at once; sums of runs of 16-bit keys are kept in bfloat16. Elsewhere in chunks of
        bounded memory.
    """
    columns, mass = torch.ops.hyperframe.line_votes(
        voters.detach(), row, key.detach(), scale, is_causal, [segment, shift], list(lines)
    )
    return columns, mass


@torch.library.impl("hyperframe::column_votes", "default")
def _run_votes(
    voters: torch.Tensor, key: torch.Tensor, begin: torch.Tensor, stop: torch.Tensor,
    scale: float, width: int,
) -> torch.Tensor:  # fmt: skip
    if key.is_cuda and torch.version.hip is None and has_triton():
        from .triton import vote_calls as kernels

        if kernels.supports(voters, key):
            with torch.cuda.device(key.device):
                return kernels.triton_column_votes(
                    voters, key, begin, stop, scale=scale, width=width
                )
    return torch_column_votes(voters, key, begin, stop, scale=scale, width=width)


@torch.library.impl("hyperframe::line_votes", "default")
def _run_lines(
    voters: torch.Tensor, row: torch.Tensor, key: torch.Tensor, scale: float, is_causal: bool,
    cut: list[int], lines: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    segment, shift = cut
    wanted = Lines(*lines)
    if key.is_cuda and torch.version.hip is None and has_triton():
        from .triton import lines as kernels

        groups = groups_of(wanted, key.shape[2])
        if kernels.supports(voters, key, lines, groups):
            with torch.cuda.device(key.device):
                return kernels.triton_line_votes(
                    voters, row, key, lines, groups=groups, scale=scale, is_causal=is_causal,
                    segment=segment, shift=shift,
                )  # fmt: skip
    return torch_line_votes(
        voters, row, key, wanted, scale=scale, is_causal=is_causal, segment=segment, shift=shift
    )


def torch_column_votes(
    voters: torch.Tensor, key: torch.Tensor, begin: torch.Tensor, stop: torch.Tensor, *,
    scale: float, width: int,
) -> torch.Tensor:  # fmt: skip
    """Do what `column_votes` says, for some groups or segments at a time, on any device."""
    batch, heads, groups, segments, count, _ = voters.shape
    num_keys = key.shape[2]
    dtype = torch.promote_types(key.dtype, torch.float32)
    found = torch.zeros((*voters.shape[:4], width), dtype=dtype, device=key.device)
    if num_keys == 0 or found.numel() == 0:
        return found
    place = torch.arange(width, device=key.device)
    many = max(1, _CHUNK_BYTES // (12 * batch * heads * width * max(count, 1)))
    group_step, segment_step = max(1, many // segments), min(many, segments)
    for first in range(0, groups, group_step):
        part = slice(first, first + group_step)
        at = begin[part].unsqueeze(-1) + place
        keys = key[:, :, at.clamp(max=num_keys - 1)]  # [B, Hkv, G, width, d]
        for start in range(0, segments, segment_step):
            some = slice(start, start + segment_step)
            rows = voters[:, :, part, some]
            logits = voter_logits(rows.flatten(3, 4), keys, scale).unflatten(3, (-1, count))
            is_hidden = (at.unsqueeze(1) >= stop[part, some].unsqueeze(-1)).unsqueeze(2)
            mass = softmax_of_seen(logits, is_hidden).masked_fill(is_hidden, 0)
            found[:, :, part, some] = mass.sum(dim=4)
    return found


def torch_line_votes(
    voters: torch.Tensor, row: torch.Tensor, key: torch.Tensor, lines: Lines, *, scale: float,
    is_causal: bool, segment: int, shift: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `line_votes` says, for some segments at a time, on any device."""
    batch, heads, num_segments, num_voters, _ = voters.shape
    num_keys, device = key.shape[2], key.device
    longest = min(lines.num_columns, num_keys)
    seen = torch.full((num_segments, 1), num_keys, device=device)
    if is_causal:
        begin = torch.arange(num_segments, device=device).unsqueeze(-1) * segment + shift
        seen = begin.clamp(0, num_keys)
    columns: list[torch.Tensor] = []
    votes: list[torch.Tensor] = []
    num_offsets = lines.num_runs * lines.run
    step = max(1, _CHUNK_BYTES // (16 * batch * heads * num_voters * (num_keys + num_offsets)))
    for start in range(0, num_segments, step):
        part = slice(start, start + step)
        keys = key
        if is_causal:  # nobody here sees more
            keys = key[:, :, : max(longest, shift + (start + step) * segment)]
        rows = voters[:, :, part].flatten(2, 3).unsqueeze(2)
        logits = voter_logits(rows, keys.unsqueeze(2), scale).squeeze(2)
        logits = logits.unflatten(2, (-1, num_voters))  # [B, H, S, R, keys]
        place = torch.arange(keys.shape[2], device=device)
        is_hidden = place >= seen[part]
        shares = softmax_of_seen(logits, is_hidden.unsqueeze(1))
        is_listed = of_best_groups(shares, is_hidden, *groups_of(lines, num_keys))
        mass = shares.sum(dim=3).masked_fill(is_hidden | ~is_listed, -1.0)
        best = mass.topk(longest, dim=-1).indices
        # what the segment before holds as columns is no diagonal; the first has its own
        rank = torch.arange(longest, device=device)
        used = torch.where(rank < seen[part], best, num_keys).int()
        last = columns[-1][:, :, -1:] if columns else used[:, :, :1]
        earlier = torch.cat([last, used[:, :, :-1]], dim=2)
        earlier = earlier.clamp(max=keys.shape[2]).long()
        is_column = logits.new_zeros((*used.shape[:3], keys.shape[2] + 1), dtype=torch.bool)
        is_column = is_column.scatter_(-1, earlier, True)[..., :-1]
        position = row[part] + shift
        is_later = place > position.unsqueeze(-1) if is_causal else place < 0
        mass = softmax_of_seen(logits, is_later).masked_fill(is_column.unsqueeze(3), 0)
        diagonals = diagonal_mass(
            mass, position, first_offset=lines.first_offset, num_offsets=num_offsets
        )
        columns.append(used)
        votes.append(diagonals.unflatten(-1, (-1, lines.run)).sum(dim=-1))
    lacking = lines.num_columns - longest
    found = torch.nn.functional.pad(torch.cat(columns, dim=2), (0, lacking), value=num_keys)
    return found, torch.cat(votes, dim=2)


def groups_of(lines: Lines, num_keys: int) -> tuple[int, int]:
    """Return the size of a group of keys, 32 at most, and among how many columns are chosen."""
    return 16 if num_keys <= 1 << 18 else 32, max(lines.num_columns, _FEWEST)


def of_best_groups(
    shares: torch.Tensor, is_hidden: torch.Tensor, size: int, count: int
) -> torch.Tensor:
    """Return which keys are of the groups with the largest bounds of votes.

    Args:
        shares: `[batch, heads, segments, voters, keys]`, what each voter gives.
        is_hidden: broadcasts to `[segments, keys]`: keys that are not seen.
        size: keys of a group; the first one begins at key 0.
        count: groups of a segment, at most.

    Returns:
        bool, without the voters. The bound is the sum of the largest shares of each voter.
    """
    num_keys = shares.shape[-1]
    lacking = -num_keys % size
    largest = shares.masked_fill(is_hidden.unsqueeze(1), -1.0)
    largest = torch.nn.functional.pad(largest, (0, lacking), value=-1.0)
    bound = largest.unflatten(-1, (-1, size)).amax(dim=-1).sum(dim=3)
    best = bound.topk(min(count, bound.shape[-1]), dim=-1).indices
    is_best = torch.zeros_like(bound, dtype=torch.bool).scatter_(-1, best, True)
    return is_best.repeat_interleave(size, dim=-1)[..., :num_keys]


def diagonal_mass(
    mass: torch.Tensor, position: torch.Tensor, *, first_offset: int, num_offsets: int
) -> torch.Tensor:
    """Return the mass of every diagonal: of the keys at each offset before some rows.

    Args:
        mass: `[batch, heads, segments, rows, keys]`.
        position: int64 `[segments, rows]`, key positions of the rows.
        first_offset: the smallest offset (position of the row less position of the key).
        num_offsets: how many offsets.

    Returns:
        `[batch, heads, segments, num_offsets]`, sums over the rows.
    """
    offset = torch.arange(num_offsets, device=mass.device) + first_offset
    place = position.unsqueeze(-1) - offset
    is_key = (place >= 0) & (place < mass.shape[-1])
    index = place.clamp(0, mass.shape[-1] - 1).expand(*mass.shape[:2], -1, -1, -1)
    return torch.where(is_key, mass.gather(-1, index), 0).sum(dim=3)


def voter_logits(voters: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Return logits `[B, H, S, R, L]` of `[B, H, S, R, d]` and `[B, key_heads, S, L, d]`."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    grouped = (voters.to(dtype) * scale).unflatten(1, (key.shape[1], -1)).transpose(2, 3)
    with without_autocast(key):  # rows of a group side by side
        logits = grouped.flatten(3, 4) @ key.to(dtype).transpose(-1, -2)
    spread: torch.Tensor = logits.unflatten(3, grouped.shape[3:5]).transpose(2, 3).flatten(1, 2)
    return spread


def softmax_of_seen(logits: torch.Tensor, is_hidden: torch.Tensor) -> torch.Tensor:
    """Return the softmax over the keys that are not hidden; finite where all of them are."""
    return torch.softmax(logits.masked_fill(is_hidden, torch.finfo(logits.dtype).min), dim=-1)
