"""Launches of the kernels that count votes, and the operators made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .arguments import is_wide
from .column_votes import column_votes_kernel
from .configs import is_interpreted, padded, power_of_two
from .votes import combine_kernel, listed_kernel, normalisers_kernel, votes_kernel

__all__ = ["Voting", "supports", "triton_column_votes"]

_ROWS = 64
_PROGRAMS = 4096  # enough for all multiprocessors to be busy to the end, half of them empty
_SHORTEST = 1024  # keys of a chunk
_OF_LIST = 512  # keys of a list that a program has
_LONGEST = 4096  # keys that one program goes over twice
# rows and keys of a block, warps, stages and registers of `column_votes_kernel`, by head size
_BLOCKS = {64: (64, 64, 4, 3, 128), 128: (64, 64, 4, 2, 168)}
_NARROW = (64, 32, 4, 2, None)


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
        bias: float32 `[n_k]`, added to the logits in units of log2, or None.
        precision: of the products, as `tl.dot` takes it.
    """

    voters: torch.Tensor
    key: torch.Tensor
    begin: torch.Tensor
    stop: torch.Tensor
    width: int
    scale: float
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
            float32 `[rows]`.
        """
        grid, chunks, chunk_size = self._grid()
        (segments, voters), slots = self.rows, chunks + (listed is not None)
        device = self.key.device
        partial = torch.empty((segments * voters, slots), device=device)
        lse = torch.empty(segments * voters, device=device)
        normalisers_kernel[grid](
            **self._common(), partial_ptr=partial, row_blocks=grid[0] // chunks,
            chunk_size=chunk_size, slots=slots,
        )  # fmt: skip
        if listed is not None:
            self.listed(partial, partial, listed, group=1, out_slots=slots, normalise=True)
        block = max(1, min(64, 4096 // power_of_two(slots)))
        combine_kernel[(-(-segments * voters // block),)](
            partial, self._or_key(voted), lse, segments * voters, self.stop.numel(),
            self.voters.shape[4], slots, VOTERS=voters, HAS_VOTED=voted is not None,
            SLOTS=power_of_two(slots), BLOCK=block, num_warps=4,
        )  # fmt: skip
        return lse

    def votes(self, lse: torch.Tensor, *, group: int = 0) -> torch.Tensor:
        """Return the votes of all keys, or the largest of each `group` of them.

        Args:
            lse: from `normalisers`.
            group: keys of a group, or 0.

        Returns:
            float32 `[batch, heads, groups, segments, width or groups of keys]`; what no voter of
            a segment sees is not written.
        """
        grid, chunks, chunk_size = self._grid()
        slots = -(-self.width // group) if group else self.width
        out = torch.empty((*self.voters.shape[:4], slots), device=self.key.device)
        votes_kernel[grid](
            **self._common(), lse_ptr=lse, out_ptr=out, row_blocks=grid[0] // chunks,
            chunk_size=chunk_size, width=self.width, out_slots=slots, GROUP=group,
        )  # fmt: skip
        return out

    def listed(
        self, lse: torch.Tensor, out: torch.Tensor, listed: torch.Tensor, *, group: int,
        out_slots: int, normalise: bool = False,
    ) -> None:  # fmt: skip
        """Write what `listed_kernel` says for lists `[heads or none, segments, slots]` of groups.

        Of lists of keys, of groups of 1, all are seen.
        """
        batch, heads, groups, segments, voters, _ = self.voters.shape
        slots, total = listed.shape[-1], groups * segments
        begin = self.begin.repeat_interleave(segments) if groups > 1 else self.begin
        stop = self.stop
        if group == 1:
            stop = torch.full_like(self.stop, self.key.shape[2])
            begin = torch.zeros_like(self.begin)
        width = self.key.shape[2] if group == 1 else self.width
        common = self._common() | {"begin_ptr": begin.expand(total).contiguous(), "stop_ptr": stop}
        chunk = slots if normalise else _OF_LIST // group
        listed_kernel[(total, -(-slots // chunk), batch * heads)](
            **common | {"num_segments": total}, lse_ptr=lse, list_ptr=listed,
            list_head=total * slots if listed.dim() == 3 else 0, out_ptr=out, slots=slots,
            out_slots=out_slots, num_groups=-(-width // group), chunk_size=chunk * group,
            BLOCK_M=max(16, power_of_two(voters)), GROUP=group, NORMALISE=normalise,
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
            "num_heads": self.voters.shape[1],
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
    key = key if key.stride(-1) == 1 else key.contiguous()
    begin, stop = begin.int().contiguous(), stop.int().contiguous()
    is_narrow = key.element_size() == 4 or key.shape[-1] > 128
    blocks = _NARROW if is_narrow else _BLOCKS[max(64, padded(key.shape[-1]))]
    rows, block, num_warps, num_stages, few = blocks
    if width > min(_LONGEST, 64 * block):
        voting = Voting(
            voters=voters.contiguous(), key=key, begin=begin, stop=stop, width=width, scale=scale
        )
        return voting.votes(voting.normalisers())
    (batch, heads, groups, segments, count, dim), key_heads = shape, key.shape[1]
    out = torch.empty((*shape[:4], width), device=key.device)
    units = segments * heads // key_heads
    row_blocks = -(-units * power_of_two(count) // rows)
    column_votes_kernel[(row_blocks, groups, batch * key_heads)](
        voters.contiguous(), key, key.stride(0), key.stride(1), key.stride(2), begin, stop, out,
        heads, heads // key_heads, key.shape[2], segments, count, row_blocks, width, scale,
        D=dim, BLOCK_D=padded(dim), VOTERS=power_of_two(count), ROWS=rows, BLOCK_N=block,
        WIDE=is_wide(key), PRECISION="ieee", num_warps=num_warps, num_stages=num_stages,
        **({} if few is None or is_interpreted() else {"maxnreg": few}),
    )  # fmt: skip
    return out
