"""From a plan to the arguments of the kernels: pointers, strides, sizes, compile-time variants.

All three kernels read a plan through the same arguments, made once here. Dimensions of stride 0 are
passed on as they are, so a list that all tiles share is read from one place; when every list of a
plan is shared, the plan becomes one tile of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...blockplan import BlockPlan
from ...plan import TilePlan

__all__ = ["PlanView", "kernel_arguments", "view_of"]

CONSECUTIVE, ORDERED, BLOCKED = 0, 1, 2


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanView:
    """One plan as the kernels see it.

    Attributes:
        rows: where the rows of a tile come from (`CONSECUTIVE`, `ORDERED`, `BLOCKED`).
        plan_heads: heads with lists (or orders) of their own.
        num_tiles: tiles of a head.
        tile_slots: slots for rows of a tile, at most.
        list_slots: length of the lists.
        range_slots: longest range of the key order, 0 without.
        rectangles: groups of equally many tiles that share samples (`BLOCKED`).
        covers_all_rows: every row lies in a tile, so that nothing has to be filled beforehand.
        arguments: keyword arguments that all kernels take.
        variant: compile-time features by name.
    """

    rows: int
    plan_heads: int
    group: int
    num_tiles: int
    tile_slots: int
    list_slots: int
    range_slots: int
    rectangles: int
    covers_all_rows: bool
    arguments: dict[str, Any]
    variant: dict[str, Any]

    @property
    def is_split(self) -> bool:
        """Whether row sum and numerator differ."""
        return any(self.variant[name] for name in ("HAS_CAP", "HAS_FLOOR", "HAS_VALUE_WEIGHT"))


def _strides(tensor: torch.Tensor | None, names: tuple[str, ...]) -> dict[str, int]:
    if tensor is None:
        return dict.fromkeys(names, 0)
    strides = [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride())]
    return dict(zip(names, strides, strict=False))


def _unit(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with a last stride of 1."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def view_of(plan: TilePlan | BlockPlan, nothing: torch.Tensor) -> PlanView:
    """Return the kernels' view of a plan; `nothing` stands for absent tensors."""
    if isinstance(plan, BlockPlan):
        return _block_view(plan, nothing)
    return _tile_view(plan, nothing)


_NO_FEATURES = {
    "HAS_WEIGHT": False, "HAS_VALUE_WEIGHT": False, "HAS_CAP": False, "HAS_FLOOR": False,
    "HAS_BAND": False, "IS_CAUSAL": False, "NUM_EXCLUDED": 0, "SUMMARIES": False,
}  # fmt: skip
_LIST = ("index_batch", "index_head", "index_tile")
_WEIGHT = ("weight_batch", "weight_head", "weight_tile", "weight_slot")
_VALUE_WEIGHT = ("vw_batch", "vw_head", "vw_tile", "vw_slot")
_ORDER = ("order_batch", "order_head")
_RANGE = ("range_batch", "range_head")


def _block_view(plan: BlockPlan, nothing: torch.Tensor) -> PlanView:
    has_list = plan.sample_index is not None and plan.sample_index.shape[-1] > 0
    index = rank = weight = None
    if has_list:
        assert plan.sample_index is not None
        assert plan.sample_rank is not None
        assert plan.sample_log_weight is not None
        index, weight = _unit(plan.sample_index), plan.sample_log_weight
        rank = plan.sample_rank
        if rank.stride() != index.stride():
            index, rank = index.contiguous(), rank.contiguous()
    order, key_order = _unit(plan.query_order), _unit(plan.key_order)
    arguments = {
        "table_ptr": plan.tiles, "order_ptr": order, "range_ptr": key_order,
        "index_ptr": nothing if index is None else index,
        "rank_ptr": nothing if rank is None else rank,
        "weight_ptr": nothing if weight is None else weight,
        "value_weight_ptr": nothing, "counts_ptr": nothing, "cap_ptr": nothing,
        "ex_rank_ptr": nothing, "ex_start_ptr": nothing, "ex_stop_ptr": nothing,
        "summary_key_ptr": nothing, "summary_value_ptr": nothing,
        **_strides(order, _ORDER), **_strides(key_order, _RANGE), **_strides(index, _LIST),
        **_strides(weight, _WEIGHT), **_strides(None, _VALUE_WEIGHT),
        "num_summaries": 0, "left": 0, "right": 0, "position_offset": 0,
    }  # fmt: skip
    covered = sum(rectangle[1] - rectangle[0] for rectangle in plan.rectangles)
    return PlanView(
        rows=BLOCKED, plan_heads=plan.num_query_heads, group=1, num_tiles=plan.tiles.shape[0],
        tile_slots=plan.max_rows, list_slots=index.shape[-1] if index is not None else 0,
        range_slots=plan.max_keys, rectangles=len(plan.rectangles),
        covers_all_rows=covered == plan.num_queries, arguments=arguments,
        variant={**_NO_FEATURES, "HAS_WEIGHT": has_list},
    )  # fmt: skip


def _tile_view(plan: TilePlan, nothing: torch.Tensor) -> PlanView:
    index = _unit(plan.key_index)
    lists = (index, plan.key_count, plan.heavy_count, plan.band_count, plan.log_weight,
             plan.value_log_weight)  # fmt: skip
    _, heads, tiles, slots = index.shape
    tile_slots = plan.tile_size
    shared = all(x is None or x.shape[2] == 1 or x.stride(2) == 0 for x in lists)
    if shared and tiles > 1:
        # one list for all tiles: one tile of all rows
        tile_slots, tiles = tile_slots * tiles, 1
        first = [None if x is None else x[:, :, :1] for x in lists]
        plan = replace(
            plan, key_index=first[0], key_count=first[1], heavy_count=first[2],
            band_count=first[3], log_weight=first[4], value_log_weight=first[5],
            tile_size=tile_slots,
        )  # fmt: skip
        index = plan.key_index
    counts = [plan.key_count, plan.heavy_count]
    counts.append(plan.heavy_count if plan.band_count is None else plan.band_count)
    order = None if plan.query_order is None else _unit(plan.query_order)
    excluded = plan.excluded
    left, right = plan.band or (0, 0)

    def or_nothing(tensor: torch.Tensor | None) -> torch.Tensor:
        return nothing if tensor is None else tensor.contiguous()

    arguments = {
        "table_ptr": nothing, "order_ptr": nothing if order is None else order,
        "range_ptr": nothing, "index_ptr": index, "rank_ptr": nothing,
        "weight_ptr": nothing if plan.log_weight is None else plan.log_weight,
        "value_weight_ptr": nothing if plan.value_log_weight is None else plan.value_log_weight,
        "counts_ptr": torch.stack([count.int() for count in counts], dim=-1),
        "cap_ptr": or_nothing(plan.log_cap), "floor_ptr": or_nothing(plan.log_floor),
        "ex_rank_ptr": or_nothing(excluded and excluded.key_rank),
        "ex_start_ptr": or_nothing(excluded and excluded.start),
        "ex_stop_ptr": or_nothing(excluded and excluded.stop),
        "summary_key_ptr": or_nothing(plan.summary_key),
        "summary_value_ptr": or_nothing(plan.summary_value),
        **_strides(order, _ORDER), **_strides(None, _RANGE), **_strides(index, _LIST),
        **_strides(plan.log_weight, _WEIGHT), **_strides(plan.value_log_weight, _VALUE_WEIGHT),
        "num_summaries": plan.num_summaries, "left": left, "right": right,
        "position_offset": plan.position_offset,
    }  # fmt: skip
    return PlanView(
        rows=CONSECUTIVE if order is None else ORDERED, plan_heads=heads,
        group=plan.num_query_heads // heads, num_tiles=tiles, tile_slots=tile_slots,
        list_slots=slots, range_slots=0, rectangles=1, covers_all_rows=order is None and slots > 0,
        arguments=arguments,
        variant={
            "HAS_WEIGHT": plan.log_weight is not None,
            "HAS_VALUE_WEIGHT": plan.value_log_weight is not None,
            "HAS_CAP": plan.log_cap is not None, "HAS_FLOOR": plan.log_floor is not None,
            "HAS_BAND": plan.band is not None, "IS_CAUSAL": plan.is_causal,
            "NUM_EXCLUDED": 0 if excluded is None else excluded.key_rank.shape[2],
            "SUMMARIES": plan.num_summaries > 0,
        },
    )  # fmt: skip


def kernel_arguments(
    view: PlanView, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> dict[str, Any]:
    """Return what every kernel takes for a plan and the three inputs."""
    return {
        "q_ptr": query, "k_ptr": key, "v_ptr": value,
        **_strides(query, ("q_batch", "q_head", "q_row")),
        **_strides(key, ("k_batch", "k_head", "k_row")),
        **_strides(value, ("v_batch", "v_head", "v_row")),
        **view.arguments, **view.variant,
        "plan_heads": view.plan_heads, "query_heads": query.shape[1], "key_heads": key.shape[1],
        "num_tiles": view.num_tiles, "tile_slots": view.tile_slots,
        "num_queries": query.shape[2], "num_keys": key.shape[2], "num_slots": view.list_slots,
        "scale": scale, "GROUP": view.group, "D": query.shape[-1], "D_V": value.shape[-1],
        "ROWS": view.rows,
    }  # fmt: skip
