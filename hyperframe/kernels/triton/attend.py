"""Forward and backward of several plans and exact leaves as one state, in Triton kernels.

The forward of each plan merges into the state that the plans before it left: one `(out, lse)` and
no partial states. The backward therefore sees one softmax over everything: with the final `out` and
`lse`, every plan (and the fused kernel of the leaves) gives just its part of the gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from ...blockplan import BlockPlan
from ...plan import TilePlan
from ..fused_exact import leaf_backward, leaf_forward, with_positive_scale
from .arguments import (
    LIST,
    WEIGHT,
    PlanView,
    is_wide,
    kernel_arguments,
    places_of,
    strides_of,
    view_of,
    views_of,
)
from .backward_keys import LISTED, RANGE, backward_keys_kernel
from .backward_rows import backward_rows_kernel
from .beside import Beside
from .common import ORDERED
from .configs import Config, choose, launch, padded
from .forward import forward_kernel
from .hopper import hopper_kernel
from .key_sums import SUMS, HalfSums, fits_half_sums, no_half_sums
from .lists import delta_kernel
from .sample_gradients import add_sample_gradients
from .tile_backward import tile_backward_kernel
from .tile_forward import survey_kernel, tile_forward_kernel
from .tile_rest import rest_kernel

__all__ = ["backward", "forward"]

# the kernels' own constants, as plain numbers
_LISTED, _RANGE = LISTED.value, RANGE.value
_ORDERED = ORDERED.value
_FEWEST_ROWS_BY_KEY = 256  # rows of a tile from which keys are worth a kernel of their own
_PROGRAMS = 2048  # enough to fill a GPU
_AHEAD = False  # whether weights are loaded a block ahead, for more registers
_FEWEST_PROGRAMS = 768  # that fill a GPU if all of them have something to do
_CHUNK_BYTES = 1 << 30  # of gradients stored by slot

Plan = TilePlan | BlockPlan


def _precision(query: torch.Tensor) -> str:
    """True float32 products unless the user has asked PyTorch for TF32."""
    return "tf32" if query.dtype == torch.float32 and _asks_for_tf32() else "ieee"


def _asks_for_tf32() -> bool:
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # asked by the newer name, after which the older one cannot be read
        return str(torch.backends.cuda.matmul.fp32_precision) == "tf32"


def _shape(query: torch.Tensor, value: torch.Tensor) -> dict[str, Any]:
    return {
        "BLOCK_D": padded(query.shape[-1]), "BLOCK_DV": padded(value.shape[-1]),
        "PRECISION": _precision(query),
    }  # fmt: skip


def _variant(view: PlanView, query: torch.Tensor, value: torch.Tensor) -> tuple[Any, ...]:
    """What a kernel is compiled for, but for its block sizes."""
    return (
        query.dtype, query.shape[-1], value.shape[-1], view.rows, view.group,
        *view.variant.values(), query.device.index,
    )  # fmt: skip


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plans: Sequence[Plan],
    leaf: int | None, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return `out`, `lse` and which rows took the floor (int8, empty without floors)."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    query, scale = with_positive_scale(query, scale)
    batch, heads, rows, _ = query.shape
    is_chain = leaf is not None and all(isinstance(plan, BlockPlan) for plan in plans)
    beside = Beside(query.device, wanted=is_chain)
    views = views_of(plans, query, beside)
    floored = query.new_empty(0, dtype=torch.int8)
    if any(view.variant["HAS_FLOOR"] for view in views):
        floored = torch.zeros((batch, heads, rows), dtype=torch.int8, device=query.device)
    if leaf is not None:
        out, lse = leaf_forward(query, key, value, leaf=leaf, scale=scale)
        out, lse = out.contiguous(), lse.contiguous()
    else:
        shape = (batch, heads, rows)
        fill = not (views and views[0].covers_all_rows)
        make = torch.zeros if fill else torch.empty
        out = make((*shape, value.shape[-1]), dtype=query.dtype, device=query.device)
        lse = torch.empty(shape, dtype=torch.float32, device=query.device)
        if fill:
            lse.fill_(float("-inf"))
    beside.join()
    # heads depend on nothing but themselves: half of them go through the levels beside the others
    halves = [range(heads)]
    if beside.is_used and heads > 1:
        halves = [range(heads // 2), range(heads // 2, heads)]
    for half in halves:
        with beside.here() if half.stop < heads else contextlib.nullcontext():
            for number, view in enumerate(views):
                merge = number > 0 or leaf is not None
                _forward_plan(
                    query, key, value, view, out, lse, floored, scale, merge=merge,
                    heads=half if view.blocks else range(view.plan_heads),
                )  # fmt: skip
    beside.join()
    return out, lse, floored


def _grid(query: torch.Tensor, view: PlanView, config: Config) -> tuple[int, int, int]:
    """Return a program for every block of rows; divisions in the kernels would delay its loads."""
    return view.num_tiles * -(-view.places // config.block_m), view.plan_heads, query.shape[0]


def _forward_plan(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, view: PlanView, out: torch.Tensor,
    lse: torch.Tensor, floored: torch.Tensor, scale: float, *, merge: bool, heads: range,
) -> None:  # fmt: skip
    if query.shape[0] * query.shape[2] * view.num_tiles * view.list_slots == 0:
        return  # nothing to add, and what is not covered was filled before
    given = {
        "floor_ptr": query, **kernel_arguments(view, query, key, value, scale), **view.order,
        **_shape(query, value), "ROWS": view.rows, "MERGE": merge,
        "out_ptr": out, "lse_ptr": lse, "floored_ptr": floored,
        "o_batch": out.stride(0), "o_head": out.stride(1), "o_row": out.stride(2),
        "first_head": heads.start,
    }  # fmt: skip
    if view.is_simple and not merge and _forward_tiles(query, key, value, view, given):
        return
    launch(
        forward_kernel, ("forward", merge, *_variant(view, query, value)),
        choose(
            "merging forward" if merge else "forward", query, value, view.places, view.list_slots,
            is_plain=view.is_plain,
        ),
        lambda config: (_grid(query, view, config)[0], len(heads), query.shape[0]),
        lambda config: {**given, **config.blocks()},
    )  # fmt: skip


def _forward_tiles(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, view: PlanView,
    given: dict[str, Any],
) -> bool:  # fmt: skip
    """Attend by the kernels for tiles alone, if they can; whether they did."""
    kernel, name = hopper_kernel(query, key, value, view, given), "hopper tiles"
    if kernel is None:
        kernel, name = tile_forward_kernel, "tile forward"
    config = choose(name, query, value, view.places, view.list_slots, is_plain=True)
    if view.list_slots % config.block_n:
        # then not all lists end with a block, and maybe none: many would be left to slower programs
        return False
    shape = (query.shape[0], view.plan_heads, view.num_tiles)
    bits = torch.empty(shape, dtype=torch.int64, device=query.device)
    # most programs of the rest have nothing to do; but where all have, they have to be enough
    tiles = 32 if bits.numel() >= 32 * _FEWEST_PROGRAMS else 4
    given = {**given, "bits_ptr": bits, "TILES": tiles}

    def arguments(kernel: Any, config: Config) -> dict[str, Any]:
        every = {**given, **config.blocks()}
        return {name: every[name] for name in kernel.arg_names}

    def run(config: Config) -> dict[str, Any]:
        given_survey = arguments(survey_kernel, config)
        survey_kernel[(shape[2], shape[1], shape[0])](**given_survey, num_warps=1)
        return arguments(kernel, config)

    launch(
        kernel, (name, *_variant(view, query, value)), config,
        lambda config: _grid(query, view, config), run,
    )  # fmt: skip
    launch(
        rest_kernel, ("rest forward", *_variant(view, query, value)),
        choose("rest forward", query, value, view.places, view.list_slots, is_plain=True),
        lambda config: (-(-shape[2] // tiles), shape[1], shape[0]),
        lambda config: arguments(rest_kernel, config),
    )  # fmt: skip
    return True


def backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor,
    value: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, floored: torch.Tensor,
    plans: Sequence[Plan], leaf: int | None, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients of query, and of keys and values with any summaries behind them."""
    query, key, value, grad_out = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, grad_out)
    )
    # (any scale does here: what a row does not see is masked after the exponential)
    # of blocks, queries get their gradient beside keys and values: neither reads the other's
    is_apart = all(isinstance(plan, BlockPlan) for plan in plans) and grad_lse is None
    beside = Beside(query.device, wanted=is_apart)
    views = views_of(plans, query, beside)
    delta = _delta(out, grad_out, grad_lse)
    if leaf is not None and grad_lse is not None:
        # the fused kernel of the leaves takes no gradient of lse: a plan of the leaves does
        views.append(view_of(_leaf_plan(query, key, leaf), query))
        leaf = None
    sums = _Gradients(query, key, value, views, leaf, delta)
    if leaf is not None:
        sums.start(leaf_backward(grad_out, query, key, value, out, lse, leaf=leaf, scale=scale))
    given_of = []
    for view, places in zip(views, places_of(views, query, lse, delta), strict=True):
        given = {
            **kernel_arguments(view, query, key, value, scale), **_shape(query, value),
            **places, "floored_ptr": floored,
            "grad_out_ptr": grad_out, "g_batch": grad_out.stride(0), "g_head": grad_out.stride(1),
            "g_row": grad_out.stride(2),
        }  # fmt: skip
        given["WIDE"] |= is_wide(grad_out)
        given.pop("floor_ptr", None)
        given_of.append(given)
    for view, given in zip(views, given_of, strict=True):
        if view.blocks is not None and view.num_tiles:
            with beside.here():
                _gradient_of_rows(query, value, view, given, sums, scatter=False)
        elif view.blocks is None:
            _tile_gradients(query, key, value, view, given, sums)
    for view, given in zip(views, given_of, strict=True):
        if view.blocks is not None:
            _range_gradients(query, key, value, view, given, sums)
    if any(view.blocks for view in views):
        add_sample_gradients(query, key, value, views, given_of, *sums.owned())
    beside.join()
    return sums.result()


def _leaf_plan(query: torch.Tensor, key: torch.Tensor, leaf: int) -> TilePlan:
    """Return the plan in which every row attends to the keys of its run up to its own."""
    batch, key_heads, length = key.shape[:3]
    tiles = -(-length // leaf)
    index = torch.arange(tiles * leaf, dtype=torch.int32, device=key.device)
    index = index.view(tiles, leaf).clamp(max=length - 1)
    count = torch.full((tiles,), leaf, dtype=torch.int32, device=key.device)
    count[-1] = length - (tiles - 1) * leaf
    count = count.expand(batch, key_heads, tiles)
    return TilePlan(
        key_index=index.expand(batch, key_heads, tiles, leaf), key_count=count, heavy_count=count,
        tile_size=leaf, num_query_heads=query.shape[1], num_queries=length, num_keys=length,
        is_causal=True, disjoint=True,
    )  # fmt: skip


def _delta(
    out: torch.Tensor, grad_out: torch.Tensor, grad_lse: torch.Tensor | None
) -> torch.Tensor:
    batch, heads, rows, width = out.shape
    delta = torch.empty((batch, heads, rows), dtype=torch.float32, device=out.device)
    total, block = batch * heads * rows, 64
    if total == 0:
        return delta
    delta_kernel[(-(-total // block),)](
        out, grad_out, out if grad_lse is None else grad_lse.contiguous(), delta,
        out.stride(0), out.stride(1), out.stride(2),
        grad_out.stride(0), grad_out.stride(1), grad_out.stride(2),
        heads, rows, total, D_V=width, BLOCK_DV=padded(width), BLOCK=block,
        HAS_GRAD_LSE=grad_lse is not None,
    )  # fmt: skip
    return delta


class _Gradients:
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
        query, key, value = self.inputs
        if self.sum_k is None or self.sum_v is None:
            dk, dv = self.owned()
        else:
            dk, dv = self.sum_k, self.sum_v
            if self.dk is not None and self.dv is not None:
                dk, dv = dk + self.dk, dv + self.dv
        return self.dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


def _gradient_of_rows(
    query: torch.Tensor, value: torch.Tensor, view: PlanView, given: dict[str, Any],
    sums: _Gradients, *, scatter: bool, rest: dict[str, Any] | None = None,
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
        ("rows", scatter, sums.written, is_rest, *_variant(view, query, value)),
        choose(
            "rest backward" if is_rest else "scatter" if scatter else "rows", query, value,
            view.places, view.list_slots, is_plain=view.is_plain,
        ),
        lambda config: _grid(query, view, config),
        lambda config: {**given, **config.blocks()},
    )  # fmt: skip
    sums.written = True


def _fast_gradients(
    query: torch.Tensor, value: torch.Tensor, view: PlanView, given: dict[str, Any],
    sums: _Gradients, config: Config,
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
        tile_backward_kernel, ("tile backward", *_variant(view, query, value)), config,
        lambda config: _grid(query, view, config), run,
    )  # fmt: skip
    return given


def _tile_gradients(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, view: PlanView,
    given: dict[str, Any], sums: _Gradients,
) -> None:  # fmt: skip
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
            _gradient_of_rows(query, value, view, given, sums, scatter=True)
            return
        half = HalfSums.of(query, key, value, given["grad_out_ptr"], sums.delta, view)
        rest = _fast_gradients(query, value, view, {**given, **half.arguments()}, sums, config)
        _gradient_of_rows(query, value, view, given, sums, scatter=True, rest=rest)
        half.finish(*sums.owned(filled=False), given["scale"])
        return
    _gradient_of_rows(query, value, view, given, sums, scatter=False)
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
            backward_keys_kernel, ("listed", atomic, has_gaps, *_variant(view, query, value)),
            config,
            lambda config: (count * blocks(config)[0] * blocks(config)[1],), arguments,
        )  # fmt: skip

    if ordered:
        _sum_by_slot(
            view, sums, tiles, lambda count, first, dk, dv: run(count, first, dk, dv, atomic=False)
        )
    else:
        dk, dv = sums.shared()
        run(tiles, 0, dk, dv, atomic=True)


def _sum_by_slot(view: PlanView, sums: _Gradients, tiles: int, run: Any) -> None:
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


def _range_gradients(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, view: PlanView,
    given: dict[str, Any], sums: _Gradients,
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
    variant = _variant(view, query, value)
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
