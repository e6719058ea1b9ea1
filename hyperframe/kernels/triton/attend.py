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
from . import variants
from .arguments import PlanView, is_wide, kernel_arguments, places_of, view_of, views_of
from .beside import Beside
from .configs import Config, choose, launch, padded
from .forward import forward_kernel
from .hopper import hopper_kernel
from .lists import delta_kernel
from .plan_gradients import Gradients, gradient_of_rows, range_gradients, tile_gradients
from .sample_gradients import add_sample_gradients
from .tile_forward import survey_kernel, tile_forward_kernel
from .tile_rest import rest_kernel

__all__ = ["backward", "forward"]

_FEWEST_PROGRAMS = 768  # that fill a GPU if all of them have something to do

Plan = TilePlan | BlockPlan


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


def _forward_plan(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, view: PlanView, out: torch.Tensor,
    lse: torch.Tensor, floored: torch.Tensor, scale: float, *, merge: bool, heads: range,
) -> None:  # fmt: skip
    if query.shape[0] * query.shape[2] * view.num_tiles * view.list_slots == 0:
        return  # nothing to add, and what is not covered was filled before
    given = {
        "floor_ptr": query, **kernel_arguments(view, query, key, value, scale), **view.order,
        **variants.shape(query, value), "ROWS": view.rows, "MERGE": merge,
        "out_ptr": out, "lse_ptr": lse, "floored_ptr": floored,
        "o_batch": out.stride(0), "o_head": out.stride(1), "o_row": out.stride(2),
        "first_head": heads.start,
    }  # fmt: skip
    if view.is_simple and not merge and _forward_tiles(query, key, value, view, given):
        return
    launch(
        forward_kernel, ("forward", merge, *variants.variant(view, query, value)),
        choose(
            "merging forward" if merge else "forward", query, value, view.places, view.list_slots,
            is_plain=view.is_plain,
        ),
        lambda config: (variants.grid(query, view, config)[0], len(heads), query.shape[0]),
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
        kernel, (name, *variants.variant(view, query, value)), config,
        lambda config: variants.grid(query, view, config), run,
    )  # fmt: skip
    launch(
        rest_kernel, ("rest forward", *variants.variant(view, query, value)),
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
    sums = Gradients(query, key, value, views, leaf, delta)
    if leaf is not None:
        sums.start(leaf_backward(grad_out, query, key, value, out, lse, leaf=leaf, scale=scale))
    given_of = []
    for view, places in zip(views, places_of(views, query, lse, delta), strict=True):
        given = {
            **kernel_arguments(view, query, key, value, scale), **variants.shape(query, value),
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
                gradient_of_rows(query, value, view, given, sums, scatter=False)
        elif view.blocks is None:
            tile_gradients(query, key, value, view, given, sums)
    for view, given in zip(views, given_of, strict=True):
        if view.blocks is not None:
            range_gradients(query, key, value, view, given, sums)
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
