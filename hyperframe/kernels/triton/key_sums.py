"""Where tiles add the gradients of keys, if that is in 16 bits: the host's side of `half_sums`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .arguments import LIST, PlanView, strides_of
from .configs import is_interpreted, power_of_two
from .half_sums import TERMS, bounds_kernel, finish_kernel, spare_kernel, turns_kernel

__all__ = ["HALF_SUMS_OF", "SUMS", "HalfSums", "fits_half_sums", "no_half_sums"]

HALF_SUMS_OF: tuple[torch.dtype, ...] = (torch.bfloat16,)
"""Dtypes of inputs whose gradients may be added up in float16: those with fewer bits."""

SUMS = (
    "dk_ptr", "dv_ptr", "turn_ptr", "spare_ptr", "bound_ptr", "rows_of_sum", "list_slots", "HALF",
)  # fmt: skip
"""What kernels that add to sums of either kind take."""

_TERMS = TERMS.value
_BLOCK = 64  # rows of a program that bounds them
_ELEMENTS = 2048  # of a program that writes sums in the end


def fits_half_sums(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `tile_backward_kernel` and its sums can do inputs like these on their device."""
    width = query.shape[-1]
    if query.dtype not in HALF_SUMS_OF or width != value.shape[-1] or width not in (32, 64, 128):
        return False
    if query.numel() == 0 or key.numel() == 0:
        return False
    if is_interpreted():
        return True
    # elsewhere float16 is added two numbers at a time
    is_amd = torch.version.hip is not None
    return not is_amd and torch.cuda.get_device_capability(query.device) >= (9, 0)


def no_half_sums(nothing: torch.Tensor) -> dict[str, Any]:
    """Return the arguments of sums in float32, but for the sums."""
    return {
        **dict.fromkeys(("turn_ptr", "spare_ptr", "bound_ptr"), nothing), "rows_of_sum": 0,
        "list_slots": 0, "HALF": False,
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class HalfSums:
    """Sums of the gradients of keys and values in float16; see `half_sums`.

    Attributes:
        sum_k: float16 `[rows, d]`: a row for every key of every head, then the spare ones.
        sum_v: the same for values.
        count: int32 `[batch * key_heads * n_k]`: slots that name each key.
        turn: int32 `[batch, plan_heads, tiles, slots]`: how many were counted before a slot.
        spare: where the spare rows of each key begin, and the first free one.
        bound: float32 `[batch * key_heads, 4]`: what bounds the rows of a head.
        rows: rows of queries that add to one row of sums, at most.
    """

    sum_k: torch.Tensor
    sum_v: torch.Tensor
    count: torch.Tensor
    turn: torch.Tensor
    spare: torch.Tensor
    bound: torch.Tensor
    rows: int

    @classmethod
    def of(
        cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad_out: torch.Tensor,
        delta: torch.Tensor, view: PlanView,
    ) -> HalfSums:  # fmt: skip
        """Make room for the sums of a plan, and say where each slot adds and what it may add."""
        batch, width = query.shape[0], query.shape[-1]
        key_heads, num_keys = key.shape[1:3]
        device, keys = query.device, batch * key_heads * num_keys
        shape = (batch, view.plan_heads, view.num_tiles, view.list_slots)
        turn = torch.empty(shape, dtype=torch.int32, device=device)
        # a key has a spare row for every further `TERMS` slots
        sum_k, sum_v = torch.zeros(
            (2, keys + turn.numel() // _TERMS, width), dtype=torch.float16, device=device
        )
        zeros = torch.zeros(2 * keys + 1 + 4 * batch * key_heads, dtype=torch.int32, device=device)
        count, spare, bound = zeros.split((keys, keys + 1, 4 * batch * key_heads))
        sums = cls(
            sum_k=sum_k, sum_v=sum_v, count=count, turn=turn, spare=spare,
            bound=bound.view(torch.float32), rows=_TERMS * view.places,
        )  # fmt: skip
        turns_kernel[(view.num_tiles, view.plan_heads, batch)](
            count_ptr=count, turn_ptr=turn, plan_heads=view.plan_heads, key_heads=key_heads,
            heads_per_key=view.plan_heads // key_heads, num_tiles=view.num_tiles,
            num_keys=num_keys, list_slots=view.list_slots,
            **{name: view.lists[name] for name in ("index_ptr", *LIST, "counts_ptr")},
            BLOCK=min(1024, power_of_two(view.list_slots)),
        )  # fmt: skip
        spare_kernel[(-(-keys // 1024),)](count, spare, keys, BLOCK=1024)
        for x, grad, of_rows in ((query, grad_out, True), (value, value, False)):
            x_heads, x_rows = x.shape[1:3]
            bounds_kernel[(batch * x_heads * -(-x_rows // _BLOCK),)](
                bound_ptr=sums.bound, x_ptr=x, grad_ptr=grad, delta_ptr=delta,
                **strides_of(x, ("x_batch", "x_head", "x_row")),
                **strides_of(grad, ("g_batch", "g_head", "g_row")),
                heads=x_heads, heads_per_key=x_heads // key_heads, num_rows=x_rows, D=width,
                BLOCK=_BLOCK, OF_ROWS=of_rows,
            )  # fmt: skip
        return sums

    def arguments(self) -> dict[str, Any]:
        """Return what kernels that add to the sums take."""
        return {
            "dk_ptr": self.sum_k, "dv_ptr": self.sum_v, "turn_ptr": self.turn,
            "spare_ptr": self.spare, "bound_ptr": self.bound, "rows_of_sum": self.rows,
            "list_slots": self.turn.shape[-1], "HALF": True,
        }  # fmt: skip

    def finish(self, dk: torch.Tensor, dv: torch.Tensor, scale: float) -> None:
        """Write the sums to contiguous `[batch, key_heads, n_k, d]`."""
        batch, key_heads, num_keys, width = dk.shape
        block = max(1, _ELEMENTS // width)
        finish_kernel[(-(-num_keys // block), batch * key_heads)](
            dk, dv, self.sum_k, self.sum_v, self.count, self.spare, self.bound, self.rows, scale,
            num_keys, D=width, BLOCK=block,
        )  # fmt: skip
