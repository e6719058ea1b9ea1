"""The best columns of segments, and the mass of runs of diagonals less those columns.

The masses of single voters are too many to keep: 512 voters by 131,072 keys by 12 heads. But a run
of diagonals meets two neighbouring runs of keys in a voter's row, whose position says where it
parts them. So for each voter and run of keys two sums are kept, for runs of 16 an eighth of the
memory of the masses, and every run of diagonals adds two of them a voter, in a fixed order. Columns
are chosen by the largest votes of groups of keys, then among the keys of those groups; the sums of
groups that hold a column are then made anew without it, which leaves no rounding error of the large
mass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from . import vote_calls
from .select_long import launch_best
from .vote_calls import Voting

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["supports", "triton_line_votes"]

_HELD_BYTES = 256 << 20  # of sums of runs of keys
_LARGEST = 16384  # values of a row that are selected from at once
_RUNS = 256  # of a program


@triton.jit(
    do_not_specialize=["num_segments", "num_voters", "num_lines", "num_runs", "first_offset"]
)
def sum_runs_kernel(
    line_ptr, position_ptr, last_ptr, votes_ptr, num_segments, num_voters, num_lines, num_runs,
    first_offset, RUN: tl.constexpr, LOG_RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the mass of runs of diagonals of a segment: `[batch, heads, segments, runs]`."""
    flat = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(0) % num_segments
    run = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    votes = tl.zeros([BLOCK], tl.float32)
    for voter in range(num_voters):
        place = segment * num_voters + voter
        last = tl.load(last_ptr + place)
        near = ((tl.load(position_ptr + place) - first_offset) >> LOG_RUN) - run
        row_ptr = line_ptr + (flat * num_voters + voter) * num_lines * 2
        low = (near >= 0) & (near * RUN < last)
        high = (near >= 1) & ((near - 1) * RUN < last)
        votes += tl.load(row_ptr + near * 2, mask=low, other=0.0)
        votes += tl.load(row_ptr + near * 2 - 1, mask=high, other=0.0)
    tl.store(votes_ptr + flat * num_runs + run, votes, mask=run < num_runs)


def supports(voters: torch.Tensor, key: torch.Tensor, lines: Sequence[int]) -> bool:
    """Whether the kernels take these: see `vote_calls.supports`; runs of 8 or 16 diagonals."""
    num_columns, run, _, _ = lines
    size, num_keys = _group(key.shape[2]), key.shape[2]
    return (
        vote_calls.supports(voters.unsqueeze(2), key)
        and run in (8, 16)
        and -(-num_keys // size) <= _LARGEST
        and 0 < min(num_columns, num_keys) * size <= _LARGEST
    )


def _group(num_keys: int) -> int:
    """Return how many keys have one value to choose by; their taken ones fit into 32 bits."""
    return 16 if num_keys <= 16 * _LARGEST else 32


def triton_line_votes(
    voters: torch.Tensor, row: torch.Tensor, key: torch.Tensor, lines: Sequence[int], *,
    scale: float, is_causal: bool, segment: int, shift: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `hyperframe.kernels.votes.line_votes` says, where `supports` holds; no host sync."""
    num_columns, run, first_offset, num_runs = lines
    batch, heads, num_segments, num_voters, _ = voters.shape
    key_heads, num_keys, device = key.shape[1], key.shape[2], key.device
    columns = torch.empty((*voters.shape[:3], num_columns), dtype=torch.int32, device=device)
    votes = torch.empty((*voters.shape[:3], num_runs), dtype=torch.float32, device=device)
    if 0 in columns.shape[:3]:
        return columns, votes
    position = row.int() + shift
    if is_causal:
        begin = torch.arange(num_segments, dtype=torch.int32, device=device) * segment + shift
        stop, last = begin.clamp(0, num_keys), (position + 1).clamp(0, num_keys)
    else:
        stop = torch.full((num_segments,), num_keys, dtype=torch.int32, device=device)
        last = torch.full_like(position, num_keys)
    key = key if key.stride(-1) == 1 else key.contiguous()
    # sums of runs of keys for some heads at a time
    per_head = 8 * batch * heads // key_heads * num_segments * num_voters * -(-num_keys // run)
    parts = min(key_heads, -(-key_heads * per_head // _HELD_BYTES))
    step = -(-key_heads // parts)
    start = torch.zeros(1, dtype=torch.int32, device=device)
    for first in range(0, key_heads, step):
        mine = slice(first * (heads // key_heads), (first + step) * (heads // key_heads))
        voting = Voting(
            voters=voters[:, mine].unsqueeze(2).contiguous(), key=key[:, first : first + step],
            begin=start, stop=stop.unsqueeze(0), width=num_keys, scale=scale,
            last=last.unsqueeze(0).contiguous(), position=position.unsqueeze(0).contiguous(),
        )  # fmt: skip
        columns[:, mine], votes[:, mine] = _of_some_heads(
            voting, num_columns, run, first_offset, num_runs
        )
    return columns, votes


def _of_some_heads(
    voting: Voting, num_columns: int, run: int, first_offset: int, num_runs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, _, num_segments, num_voters, _ = voting.voters.shape
    num_keys, device = voting.key.shape[2], voting.key.device
    size, rows = _group(num_keys), batch * heads * num_segments
    longest, num_lines = min(num_columns, num_keys), -(-num_keys // run)
    num_groups = -(-num_keys // size)
    lse = voting.normalisers()
    lines = torch.empty((batch, heads, num_segments, num_voters, num_lines, 2), device=device)
    largest = voting.votes(lse, group=size, lines=lines, run=run, first_offset=first_offset)
    stop = voting.stop.expand(batch * heads, -1).reshape(rows)
    groups, _, _, _ = launch_best(
        largest.view(rows, num_groups), (stop + (size - 1)) // size, num_groups,
        min(longest, num_groups),
    )  # fmt: skip
    listed = groups.view(batch * heads, num_segments, -1)
    slots = listed.shape[-1]
    masses = torch.empty((rows, slots * size), device=device)
    voting.listed(lse, masses, listed, group=size, out_slots=slots * size)
    index, mass, _, bits = launch_best(
        masses, stop, num_keys, longest, groups=groups, size=size, is_compact=True, with_bits=True
    )
    voting.listed(
        lse, masses, listed, group=size, out_slots=slots * size, lines=lines, run=run,
        first_offset=first_offset, bits=bits,
    )  # fmt: skip
    votes = torch.empty((batch, heads, num_segments, num_runs), device=device)
    sum_runs_kernel[(rows, -(-num_runs // _RUNS))](
        lines, voting.position, voting.last, votes, num_segments, num_voters, num_lines, num_runs,
        first_offset, RUN=run, LOG_RUN=run.bit_length() - 1, BLOCK=_RUNS, num_warps=4,
    )  # fmt: skip
    order = mass.sort(dim=-1, descending=True, stable=True).indices
    index = index.gather(-1, order).view(batch, heads, num_segments, longest)
    return torch.nn.functional.pad(index, (0, num_columns - longest), value=num_keys), votes
