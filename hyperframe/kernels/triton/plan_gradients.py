"""Gradients of a plan: of the rows' queries, and of the keys and values that they see.

Tiles of few rows add to their keys from the rows' kernel; the keys of long tiles, of blocks and in
the deterministic mode have a kernel of their own (`backward_keys`). `Gradients` is where they meet.
"""

from __future__ import annotations

from typing import Any

import torch

from . import variants
from .arguments import LIST, WEIGHT, PlanView, strides_of
from .backward_keys import LISTED, RANGE, backward_keys_kernel
from .backward_rows import backward_rows_kernel
from .common import ORDERED
from .configs import Config, choose, launch
from .key_sums import SUMS, HalfSums, fits_half_sums, no_half_sums
from .tile_backward import tile_backward_kernel
from .tile_forward import survey_kernel

__all__ = ["Gradients", "gradient_of_rows", "range_gradients", "tile_gradients"]

# the kernels' own constants, as plain numbers
_LISTED, _RANGE = LISTED.value, RANGE.value
_ORDERED = ORDERED.value
_FEWEST_ROWS_BY_KEY = 256  # rows of a tile from which keys are worth a kernel of their own
_PROGRAMS = 2048  # enough to fill a GPU
_AHEAD = False  # whether weights are loaded a block ahead, for more registers
_CHUNK_BYTES = 1 << 30  # of gradients stored by slot


class Gradients:
    """Where the gradients gather.

    What has one writer at a time (queries; keys of leaves and blocks) goes to `dq`, `dk`, `dv`;
    what several programs add to (keys of tile plans) to float32 sums beside them. A tile plan that
    is alone may add in 16 bits instead (`key_sums`) and write `dk` and `dv` in the end.
    """

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, views: list[PlanView],
        leaf: int | None, delta: torch.Tensor,
    ) -> None:  # fmt: skip
        self.inputs = (query, key, value)
        self.delta = delta
        self.are_alone = len(views) == 1 and leaf is None
        self.written = False
        covered = leaf is not None or (bool(views) and views[0].covers_all_rows)
        # blocks and leaves add a handful of times, in the dtype of the inputs: half the traffic,
        # and errors far below those of the products. Others add in float32
        tiles = any(view.blocks is None for view in views)
        wide = tiles and len(views) + (leaf is not None) > 1
        self.dtype = torch.float32 if wide else query.dtype
        make = torch.empty if covered else torch.zeros
        self.dq = make(query.shape, dtype=self.dtype, device=query.device)
        self.dk: torch.Tensor | None = None
        self.dv: torch.Tensor | None = None
        self.sum_k: torch.Tensor | None = None
        self.sum_v: torch.Tensor | None = None
        summaries = max((view.num_summaries for view in views), default=0)
        self.rows = key.shape[2] + summaries

    def start(self, gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        """Begin with gradients that were computed elsewhere."""
        self.dq, self.dk, self.dv = (x.to(self.dtype).contiguous() for x in gradients)
        self.written = True

    def owned(self, *, filled: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `dk` and `dv`, zero at first; not `filled`: for a caller that writes all of it."""
        if self.dk is None or self.dv is None:
            _, key, value = self.inputs
            make = torch.zeros if filled else torch.empty
            self.dk = make(key.shape, dtype=self.dtype, device=key.device)
            self.dv = make(value.shape, dtype=self.dtype, device=key.device)
        return self.dk, self.dv

    def shared(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the float32 sums over all programs, zero at first."""
        if self.sum_k is None or self.sum_v is None:
            _, key, value = self.inputs
            shape = (*key.shape[:2], self.rows)
            self.sum_k = torch.zeros((*shape, key.shape[-1]), device=key.device)
            self.sum_v = torch.zeros((*shape, value.shape[-1]), device=key.device)
        return self.sum_k, self.sum_v

    def result(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients in the dtypes of the inputs."""
        query, key, value = self.inputs
        if self.sum_k is None or self.sum_v is None:
            dk, dv = self.owned()
        else:
            dk, dv = self.sum_k, self.sum_v
            if self.dk is not None and self.dv is not None:
                dk, dv = dk + self.dk, dv + self.dv
        return self.dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


def gradient_of_rows(
    query: torch.Tensor, value: torch.Tensor, view: PlanView, given: dict[str, Any],
    sums: Gradients, *, scatter: bool, rest: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Add a plan's part of `dQ`, and with `scatter` its part of `dK` and `dV`.

    With `rest` only those of the tiles that another kernel has left, to the sums named there.
    """
    dk, dv = sums.shared() if scatter and rest is None else (query, value)
    is_rest = rest is not None
    given = {
        **given, "dq_ptr": sums.dq, "dk_ptr": dk, "dv_ptr": dv, "ROWS": view.rows,
        "SCATTER": scatter, "ACCUMULATE": sums.written, "REST": is_rest, "bits_ptr": query,
        **no_half_sums(query), "num_sums": sums.rows,
    }  # fmt: skip
    if rest is not None:
        given |= {name: rest[name] for name in ("bits_ptr", *SUMS)}
    launch(
        backward_rows_kernel,
        ("rows", scatter, sums.written, is_rest, *variants.variant(view, query, value)),
        choose(
            "rest backward" if is_rest else "scatter" if scatter else "rows", query, value,
            view.places, view.list_slots, is_plain=view.is_plain,
        ),
        lambda config: variants.grid(query, view, config),
        lambda config: {**given, **config.blocks()},
    )  # fmt: skip
    sums.written = True


def _fast_gradients(
    query: torch.Tensor, value: torch.Tensor, view: PlanView, given: dict[str, Any],
    sums: Gradients, config: Config,
) -> dict[str, Any]:  # fmt: skip
    """Do what the kernel for tiles alone can do, and return what the rest needs."""
    shape = (query.shape[0], view.plan_heads, view.num_tiles)
    bits = torch.empty(shape, dtype=torch.int64, device=query.device)
    given = {**given, "dq_ptr": sums.dq, "bits_ptr": bits, "AHEAD": _AHEAD}

    def arguments(kernel: Any, config: Config) -> dict[str, Any]:
        every = {**given, **config.blocks()}
        return {name: every[name] for name in kernel.arg_names}

    def run(config: Config) -> dict[str, Any]:
        survey_kernel[(shape[2], shape[1], shape[0])](**arguments(survey_kernel, config))
        return arguments(tile_backward_kernel, config)

    launch(
        tile_backward_kernel, ("tile backward", *variants.variant(view, query, value)), config,
        lambda config: variants.grid(query, view, config), run,
    )  # fmt: skip
    return given


def tile_gradients(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, view: PlanView,
    given: dict[str, Any], sums: Gradients,
) -> None:  # fmt: skip
    """Add a tile plan's part of all three gradients."""
    ordered = torch.are_deterministic_algorithms_enabled()
    if view.list_slots == 0:
        sums.shared()
        return
    tile_rows = view.places
    if tile_rows < _FEWEST_ROWS_BY_KEY and not ordered:
        config = None
        if view.is_simple and sums.are_alone and fits_half_sums(query, key, value):
            config = choose(
                "tile backward", query, value, tile_rows, view.list_slots, is_plain=True
            )
        if config is None or config.block_n > view.list_slots:
            gradient_of_rows(query, value, view, given, sums, scatter=True)
            return
        half = HalfSums.of(query, key, value, given["grad_out_ptr"], sums.delta, view)
        rest = _fast_gradients(query, value, view, {**given, **half.arguments()}, sums, config)
        gradient_of_rows(query, value, view, given, sums, scatter=True, rest=rest)
        half.finish(*sums.owned(filled=False), given["scale"])
        return
    gradient_of_rows(query, value, view, given, sums, scatter=False)
    of_keys = {
        **given, "range_ptr": query, "range_batch": 0, "range_head": 0,
        "num_slots": view.list_slots,
    }  # fmt: skip
    del of_keys["exact_slots"]
    # slots without a row in an order, or tiles without any
    has_gaps = view.rows == _ORDERED or (view.num_tiles - 1) * view.tile_slots >= query.shape[2]
    config = choose("listed", query, value, tile_rows, view.list_slots, is_plain=view.is_plain)
    tiles = query.shape[0] * view.plan_heads * view.num_tiles

    def run(count: int, first: int, dk: torch.Tensor, dv: torch.Tensor, *, atomic: bool) -> None:
        def blocks(config: Config) -> tuple[int, int, int]:
            """Return blocks of slots, parts and blocks of rows in a part."""
            slot_blocks = -(-view.list_slots // config.block_n)
            row_blocks = -(-tile_rows // config.block_m)
            parts = 1
            if atomic:
                parts = max(1, min(row_blocks // 4, _PROGRAMS // max(1, count * slot_blocks)))
            part_blocks = -(-row_blocks // parts)
            return slot_blocks, -(-row_blocks // part_blocks), part_blocks

        def arguments(config: Config) -> dict[str, Any]:
            slot_blocks, parts, part_blocks = blocks(config)
            return {
                **of_keys, "dk_ptr": dk, "dv_ptr": dv, "FORM": _LISTED, "ATOMIC": atomic,
                "HAS_GAPS": has_gaps,
                "ACCUMULATE": False, "num_parts": parts, "part_blocks": part_blocks,
                "first_program": first * slot_blocks * parts,
                **config.blocks(),
            }  # fmt: skip

        launch(
            backward_keys_kernel,
            ("listed", atomic, has_gaps, *variants.variant(view, query, value)), config,
            lambda config: (count * blocks(config)[0] * blocks(config)[1],), arguments,
        )  # fmt: skip

    if ordered:
        _sum_by_slot(
            view, sums, tiles, lambda count, first, dk, dv: run(count, first, dk, dv, atomic=False)
        )
    else:
        dk, dv = sums.shared()
        run(tiles, 0, dk, dv, atomic=True)


def _sum_by_slot(view: PlanView, sums: Gradients, tiles: int, run: Any) -> None:
    """Let a kernel store gradients by slot, some tiles at a time, and add them in a fixed order."""
    dk, dv = sums.shared()
    slots = view.list_slots
    width = dk.shape[-1] + dv.shape[-1]
    step = max(1, _CHUNK_BYTES // (4 * slots * width))
    key = _flat_keys(view, dk)
    for first in range(0, tiles, step):
        count = min(step, tiles - first)
        here = key[first : first + count].flatten()
        parts = [torch.zeros((count * slots, x.shape[-1]), device=x.device) for x in (dk, dv)]
        run(count, first, *parts)
        for total, part in zip((dk, dv), parts, strict=True):
            # index_put_ sorts: a fixed order, which index_add_ has on no device
            total.view(-1, total.shape[-1]).index_put_((here,), part, accumulate=True)


def _flat_keys(view: PlanView, dk: torch.Tensor) -> torch.Tensor:
    """Return where in `[batch * key_heads * rows]` each slot of each tile adds: `[tiles, L]`."""
    batch, key_heads, rows = dk.shape[:3]
    index = view.lists["index_ptr"][:, :, : view.num_tiles].long()
    used = torch.arange(index.shape[-1], device=index.device)
    used = used < view.lists["counts_ptr"][..., :1].expand(*index.shape[:3], 1)
    # slots that are not used hold zeros: they may add to any key
    index = torch.where(used, index.clamp(0, rows - 1), 0)
    head = torch.arange(view.plan_heads, device=index.device) * key_heads // view.plan_heads
    flat_head = torch.arange(batch, device=index.device)[:, None] * key_heads + head
    return (flat_head[:, :, None, None] * rows + index).flatten(0, 2)


def range_gradients(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, view: PlanView,
    given: dict[str, Any], sums: Gradients,
) -> None:  # fmt: skip
    """Add what the ranges of a block plan contribute to the gradients of keys and values."""
    plan = view.blocks
    assert plan is not None
    if view.num_tiles == 0:
        sums.owned()
        return
    accumulate = sums.dk is not None
    dk, dv = sums.owned(filled=not plan.covers_all_keys)
    batch, heads, key_heads = query.shape[0], query.shape[1], key.shape[1]
    variant = variants.variant(view, query, value)
    order = plan.key_order.contiguous()
    of_keys = {
        **given, "first_program": 0, "ATOMIC": False,
        "range_ptr": order, **strides_of(order, ("range_batch", "range_head")),
        "index_ptr": order, **strides_of(None, LIST),
        "weight_ptr": order, **strides_of(None, WEIGHT),
    }  # fmt: skip
    del of_keys["exact_slots"]

    def range_arguments(config: Config) -> dict[str, Any]:
        blocks = -(-view.places // config.block_m) * (heads // key_heads)
        return {
            **of_keys, "num_slots": plan.max_keys, "dk_ptr": dk, "dv_ptr": dv, "FORM": _RANGE,
            "HAS_GAPS": False,
            "ACCUMULATE": accumulate, "num_parts": 1, "part_blocks": blocks,
            "HAS_WEIGHT": False, **config.blocks(),
        }  # fmt: skip

    launch(
        backward_keys_kernel, ("range", accumulate, *variant),
        choose("range", query, value, view.places, plan.max_keys, is_plain=True),
        lambda config: (-(-plan.max_keys // config.block_n) * view.num_tiles * batch * key_heads,),
        range_arguments,
    )  # fmt: skip
