"""The best columns of segments, and the mass of runs of diagonals less those columns.

The masses of single voters are too many to keep: 512 voters by 131,072 keys by 12 heads. But a run
of diagonals meets two neighbouring runs of keys in a voter's row, whose position says where it
parts them. So for each voter and run of keys two sums are kept, for runs of 16 an eighth of the
memory of the masses, and every run of diagonals adds two of them a voter, in a fixed order. With
the largest term of each run they come from one pass over the keys: they are relative to a shift of
the voter and chunk of keys, and normalisers are made of them (`line_sums`).

Columns are chosen among the keys of the groups with the largest bounds of votes. The sums of groups
that hold a column are then made anew without it, which leaves no rounding error of the large mass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...tables import kept, maker_device, spaced
from . import vote_calls
from .arguments import is_wide
from .configs import is_interpreted, padded, power_of_two
from .line_sums import (
    bounds_kernel,
    left_sums_kernel,
    line_shares_kernel,
    line_sums_kernel,
    rank_kernel,
    sum_runs_kernel,
)
from .select_long import launch_best
from .vote_calls import Voting

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["supports", "triton_line_votes"]

_HELD_BYTES = 384 << 20  # of sums and largest terms of runs of keys
_LARGEST = 16384  # values of a row that are selected from at once
_RUNS = 256  # of a program
_MANY = 2048  # groups of keys, beyond which the best are found among the best
_COARSE = 4  # of them
_PROGRAMS = 3072  # enough for all multiprocessors to be busy to the end, half of them empty
_HALVES = True  # sums of 16-bit inputs in bfloat16: an error of 2^-9 of a sum
_LISTED = 64  # keys of a list that a program makes anew


class Blocks(NamedTuple):
    """Rows and keys of a block, and what the compiler is told."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    max_registers: int | None


_BLOCKS = {64: Blocks(64, 64, 4, 3, 128), 128: Blocks(128, 64, 8, 2, 128)}
_NARROW = Blocks(64, 32, 4, 2, None)  # float32 and larger heads


def supports(
    voters: torch.Tensor, key: torch.Tensor, lines: Sequence[int], groups: Sequence[int]
) -> bool:  # fmt: skip
    """Whether the kernels take these: see `vote_calls.supports`; runs of 8 or 16 diagonals."""
    (num_columns, run, _, _), (size, count), num_keys = lines, groups, key.shape[2]
    return (
        vote_calls.supports(voters.unsqueeze(2), key)
        and run in (8, 16)
        and size in (16, 32)
        and num_columns > 0
        and -(-num_keys // size) <= _LARGEST
        and min(count * size, num_keys + size) <= _LARGEST
    )


def triton_line_votes(
    voters: torch.Tensor, row: torch.Tensor, key: torch.Tensor, lines: Sequence[int], *,
    groups: Sequence[int], scale: float, is_causal: bool, segment: int, shift: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `hyperframe.kernels.votes.line_votes` says, where `supports` holds; no host sync.

    `groups` says of how many neighbouring keys a group is, and among how many columns are chosen.
    """
    num_columns, run, first_offset, num_runs = lines
    batch, heads, num_segments, num_voters, _ = voters.shape
    key_heads, num_keys, device = key.shape[1], key.shape[2], key.device
    columns = torch.empty((*voters.shape[:3], num_columns), dtype=torch.int32, device=device)
    votes = torch.empty((*voters.shape[:3], num_runs), dtype=torch.float32, device=device)
    if 0 in columns.shape[:3]:
        return columns, votes
    position = torch.add(row, shift, out=torch.empty(row.shape, dtype=torch.int32, device=device))
    spacing = (segment, shift) if is_causal else (0, num_keys)
    start = spaced(1, 0, 0, device, dtype=torch.int32)
    key = key if key.stride(-1) == 1 else key.contiguous()
    # sums of runs of keys for some heads at a time
    per_head = _bytes_of_run(key) * batch * heads // key_heads * num_segments
    per_head *= power_of_two(num_voters)
    parts = min(key_heads, -(-key_heads * per_head * -(-num_keys // run) // _HELD_BYTES))
    step = -(-key_heads // parts)
    for first in range(0, key_heads, step):
        mine = slice(first * (heads // key_heads), (first + step) * (heads // key_heads))
        some = voters[:, mine].unsqueeze(2).contiguous()
        stops = _stops(batch * some.shape[1], num_segments, *spacing, num_keys, groups[0], device)
        voting = Voting(
            voters=some, key=key[:, first : first + step], begin=start, stop=stops[0],
            width=num_keys, scale=scale,
        )  # fmt: skip
        of_some = _LineVoting(
            voting=voting, stops=stops, position=position, is_causal=is_causal, run=run,
            first_offset=first_offset, group=groups[0], num_listed=groups[1],
        )  # fmt: skip
        found = of_some.columns_and_votes(num_columns, num_runs)
        if step == key_heads:
            return found
        columns[:, mine], votes[:, mine] = found
    return columns, votes


@kept
def _stops(
    heads: int, num_segments: int, segment: int, shift: int, num_keys: int, size: int,
    device: torch.device,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Return where keys of segments stop: `[1, segments]`; of all heads; in (coarse) groups."""
    numbers = torch.arange(num_segments, device=maker_device(device))
    stop = (numbers * segment + shift).clamp(0, num_keys).int().to(device)
    every = stop.repeat(heads)
    in_groups = (every + (size - 1)) // size
    return stop.unsqueeze(0), every, in_groups, (in_groups + (_COARSE - 1)) // _COARSE


def _in_halves(key: torch.Tensor) -> bool:
    return _HALVES and key.element_size() == 2


def _bytes_of_run(key: torch.Tensor) -> int:
    return 6 if _in_halves(key) else 12


class _LineVoting(NamedTuple):
    """Voters of segments, where they are and which diagonals are looked for.

    Attributes:
        voting: the voters and the keys.
        stops: from `_stops`.
        position: int32 `[segments, voters]`, key positions of the voters.
        is_causal: whether lines end at the voter.
        run: neighbouring diagonals that are counted together.
        first_offset: the smallest offset of a diagonal.
        group: neighbouring keys that are a group.
        num_listed: groups that columns are chosen from, at most.
    """

    voting: Voting
    stops: tuple[torch.Tensor, ...]
    position: torch.Tensor
    is_causal: bool
    run: int
    first_offset: int
    group: int
    num_listed: int

    def columns_and_votes(
        self, num_columns: int, num_runs: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return columns and the mass of runs of diagonals, as `line_votes` does."""
        voting, run, device = self.voting, self.run, self.voting.key.device
        batch, heads, _, num_segments, num_voters, _ = voting.voters.shape
        num_keys, units = voting.key.shape[2], batch * heads * num_segments
        size, longest = self.group, min(num_columns, num_keys)
        num_groups = -(-num_keys // size)
        listed = min(self.num_listed, num_groups)
        padded_voters, num_lines = power_of_two(num_voters), -(-num_keys // run)
        sums, largest, partial, lse, share = self._sums()
        log_chunk, slots = self._cut()[1], partial.shape[1]
        shape = {"VOTERS": padded_voters, "HALVES": _in_halves(voting.key)}
        bound = torch.empty((units, num_groups), device=device)
        coarse = _COARSE if num_groups > _MANY else 1
        num_coarse = -(-num_groups // coarse)
        largest_bound = bound if coarse == 1 else torch.empty((units, num_coarse), device=device)
        bounds_kernel[(units, slots)](
            largest, share, voting.stop, bound, largest_bound, num_segments, num_voters, num_lines,
            slots, num_groups, **shape, GROUP=size, RUN=run, LINES=(1 << log_chunk) // run,
            COARSE=coarse, num_warps=4,
        )  # fmt: skip
        _, stop, group_stop, coarse_stop = self.stops
        if coarse == 1:
            groups, _, _, _ = launch_best(bound, group_stop, num_groups, listed)
        else:
            some, _, _, _ = launch_best(
                largest_bound, coarse_stop, num_coarse, min(listed, num_coarse)
            )
            groups, _, _, _ = launch_best(
                bound, group_stop, num_groups, listed, groups=some, size=coarse
            )
        masses = torch.empty((units, listed * size), device=device)
        voting.listed(
            lse, masses, groups.view(batch * heads, num_segments, listed), group=size,
            out_slots=listed * size,
        )  # fmt: skip
        index, mass, _, held = launch_best(
            masses, stop, num_keys, longest, groups=groups, size=size, is_compact=True,
            with_bits=True,
        )  # fmt: skip
        plane = sums[0].numel()
        per_part = _LISTED // size
        left_sums_kernel[(num_segments, -(-listed // per_part), batch * heads)](
            **self._common(), **shape, position_ptr=self.position, partial_ptr=partial,
            list_ptr=held[0], bits_ptr=held[1], sum_ptr=sums, plane=plane,
            list_slots=listed, num_groups=num_groups, log_chunk=log_chunk, slots=slots,
            num_lines=num_lines, BLOCK_M=max(16, padded_voters), BLOCK_N=_LISTED, GROUP=size,
            num_warps=4,
        )  # fmt: skip
        votes = torch.empty((batch, heads, num_segments, num_runs), device=device)
        block = min(_RUNS, (1 << log_chunk) // run)
        sum_runs_kernel[(units, -(-num_runs // (block - 1)))](
            sums, plane, share[1], self.position, votes, num_keys, num_segments, num_voters,
            num_lines, num_runs, self.first_offset, slots, **shape, RUN=run,
            LOG_RUN=run.bit_length() - 1, LINES=(1 << log_chunk) // run, BLOCK=block,
            IS_CAUSAL=self.is_causal,
            num_warps=max(1, block // 64),
        )  # fmt: skip
        columns = torch.empty(
            (batch, heads, num_segments, num_columns), dtype=torch.int32, device=device
        )
        rank_kernel[(units,)](
            index, mass, columns, longest, num_columns, num_keys, PADDED=power_of_two(num_columns),
            num_warps=4,
        )  # fmt: skip
        return columns, votes

    def _sums(self) -> tuple[torch.Tensor, ...]:
        """Return sums and largest terms of runs, partial sums, normalisers and factors."""
        voting, device = self.voting, self.voting.key.device
        batch, heads, _, num_segments, num_voters, _ = voting.voters.shape
        key_heads, num_keys = voting.key.shape[1:3]
        units, padded_voters = batch * heads * num_segments, power_of_two(num_voters)
        num_lines, halves = -(-num_keys // self.run), _in_halves(voting.key)
        blocks, log_chunk, row_blocks = self._cut()
        rows, slots = units * padded_voters, -(-num_keys // (1 << log_chunk))
        word = torch.int32 if halves else torch.float32
        places = (units, num_lines, padded_voters)
        sums = torch.empty((1 if halves else 2, *places), dtype=word, device=device)
        pairs = (units, -(-num_lines // 2) if halves else num_lines, padded_voters)
        largest = torch.empty(pairs, dtype=word, device=device)
        partial = torch.empty((rows, slots, 3), device=device)
        share = torch.empty((2, rows, slots), device=device)
        lse = torch.empty(rows, device=device)
        few = {} if blocks.max_registers is None else {"maxnreg": blocks.max_registers}
        line_sums_kernel[(row_blocks * slots, batch * key_heads)](
            **self._common(), **({} if is_interpreted() else few), stop_ptr=voting.stop,
            position_ptr=self.position, partial_ptr=partial, sum_ptr=sums,
            max_ptr=largest, plane=sums[0].numel(), row_blocks=row_blocks,
            chunk_size=1 << log_chunk, slots=slots, num_lines=num_lines, VOTERS=padded_voters,
            BLOCK_M=blocks.rows, BLOCK_N=blocks.keys, HALVES=halves, num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )  # fmt: skip
        some = max(1, 1024 // power_of_two(slots))
        line_shares_kernel[(-(-rows // some),)](
            partial, voting.stop, self.position, lse, share, rows, num_keys, num_segments,
            num_voters, 1 << log_chunk, slots, VOTERS=padded_voters, SLOTS=power_of_two(slots),
            BLOCK=some, IS_CAUSAL=self.is_causal, num_warps=4,
        )  # fmt: skip
        return sums, largest, partial, lse, share

    def _cut(self) -> tuple[Blocks, int, int]:
        """Return block sizes, the logarithm of the keys of a chunk, and how many tiles of rows."""
        key, voters = self.voting.key, self.voting.voters
        is_narrow = key.element_size() == 4 or key.shape[-1] > 128
        blocks = _NARROW if is_narrow else _BLOCKS[max(64, padded(key.shape[-1]))]
        batch, heads, _, segments, num_voters, _ = voters.shape
        units = heads // key.shape[1] * segments
        row_blocks = -(-units * power_of_two(num_voters) // blocks.rows)
        wanted = -(-_PROGRAMS // (row_blocks * batch * key.shape[1]))
        longest = 64 * blocks.keys  # bits say which blocks of a chunk are tested
        size = min(longest, max(1024, power_of_two(-(-key.shape[2] // wanted))))
        return blocks, size.bit_length() - 1, row_blocks

    def _common(self) -> dict[str, Any]:
        """Return the arguments of every kernel that makes scores."""
        voting, key = self.voting, self.voting.key
        return {
            "voter_ptr": voting.voters, "k_ptr": key, "k_batch": key.stride(0),
            "k_head": key.stride(1), "k_row": key.stride(2), "num_heads": voting.voters.shape[1],
            "heads_per_key": voting.voters.shape[1] // key.shape[1], "num_keys": key.shape[2],
            "num_segments": voting.voters.shape[3], "num_voters": voting.voters.shape[4],
            "first_offset": self.first_offset, "scale": voting.scale, "D": key.shape[-1],
            "BLOCK_D": padded(key.shape[-1]), "RUN": self.run, "IS_CAUSAL": self.is_causal,
            "WIDE": is_wide(key), "PRECISION": voting.precision,
        }  # fmt: skip
