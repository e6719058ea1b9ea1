"""Launches of the kernels that count votes, and the operators made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .arguments import is_wide
from .configs import is_interpreted, padded, power_of_two
from .votes import combine_kernel, listed_kernel, normalisers_kernel, votes_kernel

__all__ = ["Voting", "supports", "triton_column_votes"]

_ROWS = 64
_PROGRAMS = 4096  # enough for all multiprocessors to be busy to the end, half of them empty
_SHORTEST = 1024  # keys of a chunk


def supports(voters: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the kernels take these: heads of up to 256, up to 64 voters of a segment."""
    return (
        key.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and voters.dtype == key.dtype
        and key.shape[-1] <= 256
        and 0 < voters.shape[-2] <= 64
        and voters.shape[0] * voters.shape[1] <= 65535
        and voters.shape[2] <= 65535
        and key.shape[2] > 0
    )


@dataclass(frozen=True, kw_only=True)
class Voting:
    """Voters and the keys that they see, as the kernels take them.

    Attributes:
        voters: `[batch, heads, groups, segments, voters, d]`, contiguous.
        key: `[batch, key_heads, n_k, d]`, its last stride 1.
        begin: int32 `[groups]`, contiguous as those below: the first key that is seen.
        stop: int32 `[groups, segments]`, one past the last one.
        width: no segment sees more keys.
        scale: factor of the logits.
        last: int32 `[groups, segments, voters]`, the stop of lines, or None without lines.
        position: int32, likewise: key positions of the voters.
        bias: float32 `[n_k]`, added to the logits in units of log2, or None.
        precision: of the products, as `tl.dot` takes it.
    """

    voters: torch.Tensor
    key: torch.Tensor
    begin: torch.Tensor
    stop: torch.Tensor
    width: int
    scale: float
    last: torch.Tensor | None = None
    position: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    precision: str = "ieee"

    @property
    def rows(self) -> tuple[int, int]:
        """Segments of all heads and groups, and the power of two that their voters fill."""
        batch, heads, groups, segments, voters, _ = self.voters.shape
        return batch * heads * groups * segments, power_of_two(voters)

    def normalisers(
        self, *, listed: torch.Tensor | None = None, voted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the log normalisers of all rows, in units of log2; `+inf` for rows without keys.

        Args:
            listed: int32 `[segments of all groups, slots]`, further keys that each segment sees;
                those from `n_k` on are none.
            voted: int8 `[segments of all groups, voters]`: which of them count.

        Returns:
            float32 `[1 or 2, rows]`, with lines the second one is theirs.
        """
        grid, chunks, chunk_size = self._grid()
        (segments, voters), slots = self.rows, chunks + (listed is not None)
        states = 1 if self.last is None else 2
        device = self.key.device
        partial = torch.empty((segments * voters, slots, states), device=device)
        lse = torch.empty((states, segments * voters), device=device)
        normalisers_kernel[grid](
            **self._common(), partial_ptr=partial, row_blocks=grid[0] // chunks,
            chunk_size=chunk_size, slots=slots, LINES=states == 2,
        )  # fmt: skip
        if listed is not None:
            self.listed(partial, partial, listed, group=1, out_slots=slots, normalise=True)
        block = max(1, min(64, 4096 // power_of_two(slots)))
        combine_kernel[(-(-segments * voters // block),)](
            partial, self.stop, self._or_key(self.last), self._or_key(voted), lse,
            segments * voters, self.stop.numel(), self.voters.shape[4], slots,
            VOTERS=voters, LINES=states == 2, HAS_VOTED=voted is not None,
            SLOTS=power_of_two(slots), BLOCK=block, num_warps=4,
        )  # fmt: skip
        return lse

    def votes(
        self, lse: torch.Tensor, *, group: int = 0, lines: torch.Tensor | None = None,
        run: int = 0, first_offset: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        """Return the votes of all keys, or the largest of each `group` of them.

        Args:
            lse: from `normalisers`.
            group: keys of a group, or 0.
            lines: float32 `[batch, heads, segments, voters, runs of keys, 2]`, written if given.
            run: keys of a run; a power of two, 16 at most.
            first_offset: the smallest offset of a line.

        Returns:
            float32 `[batch, heads, groups, segments, width or groups of keys]`; what no voter of
            a segment sees is not written.
        """
        grid, chunks, chunk_size = self._grid()
        slots = -(-self.width // group) if group else self.width
        out = torch.empty((*self.voters.shape[:4], slots), device=self.key.device)
        votes_kernel[grid](
            **self._common(), position_ptr=self._or_key(self.position), lse_ptr=lse, out_ptr=out,
            line_ptr=self._or_key(lines), row_blocks=grid[0] // chunks, chunk_size=chunk_size,
            width=self.width, out_slots=slots, num_lines=0 if lines is None else lines.shape[-2],
            first_offset=first_offset, GROUP=group, RUN=0 if lines is None else run,
        )  # fmt: skip
        return out

    def listed(
        self, lse: torch.Tensor, out: torch.Tensor, listed: torch.Tensor, *, group: int,
        out_slots: int, normalise: bool = False, lines: torch.Tensor | None = None, run: int = 0,
        first_offset: int = 0, bits: torch.Tensor | None = None, stop: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Write what `listed_kernel` says for lists `[heads or none, segments, slots]` of groups.

        `stop` replaces that of the segments; for lists of keys, of groups of 1, it is `n_k`.
        """
        batch, heads, groups, segments, voters, _ = self.voters.shape
        slots, total = listed.shape[-1], groups * segments
        begin = self.begin.repeat_interleave(segments) if groups > 1 else self.begin
        if group == 1:
            stop = torch.full_like(self.stop, self.key.shape[2])
            begin = torch.zeros_like(self.begin)
        stop = self.stop if stop is None else stop
        width = self.key.shape[2] if group == 1 else self.width
        common = self._common() | {"begin_ptr": begin.expand(total).contiguous(), "stop_ptr": stop}
        chunk = slots if normalise else 512 // group
        listed_kernel[(total, -(-slots // chunk), batch * heads)](
            **common | {"num_segments": total}, position_ptr=self._or_key(self.position),
            lse_ptr=lse, list_ptr=listed, list_head=total * slots if listed.dim() == 3 else 0,
            bits_ptr=self._or_key(bits), out_ptr=out, line_ptr=self._or_key(lines), slots=slots,
            out_slots=out_slots, num_groups=-(-width // group),
            num_lines=0 if lines is None else lines.shape[-2], first_offset=first_offset,
            chunk_size=chunk * group, BLOCK_M=max(16, power_of_two(voters)), GROUP=group,
            RUN=0 if lines is None else run, NORMALISE=normalise,
        )  # fmt: skip

    def _or_key(self, tensor: torch.Tensor | None) -> torch.Tensor:
        return self.key if tensor is None else tensor

    def _grid(self) -> tuple[tuple[int, int, int], int, int]:
        """Return the grid of the kernels, the number of chunks and their size."""
        batch, heads, groups, segments, voters, _ = self.voters.shape
        row_blocks = -(-segments * power_of_two(voters) // _ROWS)
        programs = row_blocks * groups * batch * heads
        width = max(1, self.width)
        wanted = min(-(-_PROGRAMS // programs), -(-width // _SHORTEST))
        size = -(-width // (64 * wanted)) * 64
        chunks = -(-width // size)
        return (row_blocks * chunks, groups, batch * heads), chunks, size

    def _common(self) -> dict[str, Any]:
        """Return the arguments of every kernel."""
        key, dim = self.key, self.key.shape[-1]
        is_narrow = key.element_size() == 4 or dim > 128
        # one more program on a multiprocessor, for nothing spilled
        few = {"maxnreg": 128} if key.element_size() == 2 and dim <= 64 else {}
        return {
            **({} if is_interpreted() else few),
            "voter_ptr": self.voters, "k_ptr": key, "k_batch": key.stride(0),
            "k_head": key.stride(1), "k_row": key.stride(2),
            "bias_ptr": self._or_key(self.bias), "begin_ptr": self.begin, "stop_ptr": self.stop,
            "last_ptr": self._or_key(self.last), "num_heads": self.voters.shape[1],
            "heads_per_key": self.voters.shape[1] // key.shape[1], "num_keys": key.shape[2],
            "num_segments": self.voters.shape[3], "num_voters": self.voters.shape[4],
            "scale": self.scale, "D": dim, "BLOCK_D": padded(dim),
            "VOTERS": power_of_two(self.voters.shape[4]), "BLOCK_N": 32 if is_narrow else 64,
            "HAS_BIAS": self.bias is not None, "WIDE": is_wide(key), "PRECISION": self.precision,
            "num_warps": 4, "num_stages": 2 if is_narrow else 3,
        }  # fmt: skip


def triton_column_votes(
    voters: torch.Tensor, key: torch.Tensor, begin: torch.Tensor, stop: torch.Tensor, *,
    scale: float, width: int,
) -> torch.Tensor:  # fmt: skip
    """Do what `kernels.votes.column_votes` says, where `supports` holds; no host sync."""
    shape = voters.shape
    if 0 in shape or width == 0:
        return torch.zeros((*shape[:4], width), device=key.device)
    voting = Voting(
        voters=voters.contiguous(), key=key if key.stride(-1) == 1 else key.contiguous(),
        begin=begin.int().contiguous(), stop=stop.int().contiguous(), width=width, scale=scale,
    )  # fmt: skip
    return voting.votes(voting.normalisers())
