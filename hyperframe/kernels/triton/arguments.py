"""From a plan to the arguments of the kernels: pointers, strides, sizes, compile-time variants.

All kernels read a plan through the same arguments, made once here. Dimensions of stride 0 are
passed on as they are, so a list that all tiles share is read from one place; when every list of a
plan is shared, the plan becomes one tile of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ...blockplan import BlockPlan
from ...plan import TilePlan
from ...tables import int_table, kept
from . import common
from .beside import Beside
from .configs import padded, power_of_two
from .lists import block_lists_kernel, places_kernel

__all__ = [
    "LIST",
    "RANK",
    "WEIGHT",
    "ListSource",
    "PlanView",
    "alike",
    "is_wide",
    "kernel_arguments",
    "number_of_tiles",
    "places_of",
    "strides_of",
    "view_of",
    "views_of",
]

# the kernels' own constants, as plain numbers
CONSECUTIVE, ORDERED, BLOCKED = (
    form.value for form in (common.CONSECUTIVE, common.ORDERED, common.BLOCKED)
)


_LONGEST_RUN = 128  # rows that see nearly the same keys, so that few blocks need a test


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanView:
    """One plan as the kernels see it.

    Attributes:
        rows: where the rows of a tile come from (`CONSECUTIVE`, `ORDERED`, `BLOCKED`).
        plan_heads: heads with lists (or orders) of their own.
        group: query heads that share a tile.
        num_tiles: tiles of a head.
        tile_slots: slots for positions of a tile, at most.
        list_slots: length of the lists, or of the exact part of those of blocks.
        covers_all_rows: every row lies in a tile, so that nothing has to be filled beforehand.
        order: arguments that say which rows a tile owns.
        lists: arguments that say which keys a tile holds, and their weights.
        features: arguments of the compile-time features.
        variant: the compile-time features by name.
        source: of a block plan, that and what its lists are made of.
    """

    rows: int
    plan_heads: int
    group: int
    num_tiles: int
    tile_slots: int
    list_slots: int
    covers_all_rows: bool
    order: dict[str, Any]
    lists: dict[str, Any]
    features: dict[str, Any]
    variant: dict[str, Any]
    source: ListSource | None = None

    @property
    def blocks(self) -> BlockPlan | None:
        """The plan, if it is a block plan."""
        return None if self.source is None else self.source.plan

    @property
    def places(self) -> int:
        """Rows of a tile, at most."""
        return self.tile_slots * self.group

    @property
    def is_plain(self) -> bool:
        """Whether all rows of a tile see all keys of its list."""
        names = ("HAS_BAND", "IS_CAUSAL", "NUM_EXCLUDED", "SUMMARIES")
        return not any(self.variant[name] for name in names)

    @property
    def is_simple(self) -> bool:
        """Whether `tile_forward_kernel` can do it: short runs of rows, one weight for a slot."""
        names = ("HAS_VALUE_WEIGHT", "HAS_CAP", "HAS_FLOOR", "NUM_EXCLUDED", "SUMMARIES")
        apart = self.variant["HAS_WEIGHT"] and self.lists["weight_slot"] != 1
        is_run = self.rows == CONSECUTIVE and self.tile_slots <= _LONGEST_RUN
        return is_run and not (apart or any(self.variant[name] for name in names))

    @property
    def num_summaries(self) -> int:
        """Summary keys of the plan."""
        count: int = self.features["num_summaries"]
        return count


def strides_of(tensor: torch.Tensor | None, names: tuple[str, ...]) -> dict[str, int]:
    """Return strides by name; 0 where a dimension has one element, or without a tensor."""
    if tensor is None:
        return dict.fromkeys(names, 0)
    shape, strides = tensor.shape, tensor.stride()
    return {name: 0 if shape[i] == 1 else strides[i] for i, name in enumerate(names)}


def _unit(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with a last stride of 1."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def view_of(plan: TilePlan | BlockPlan, nothing: torch.Tensor) -> PlanView:
    """Return the kernels' view of a plan; `nothing` stands for absent tensors."""
    return views_of([plan], nothing)[0]


def views_of(
    plans: Sequence[TilePlan | BlockPlan], nothing: torch.Tensor, beside: Beside | None = None
) -> list[PlanView]:
    """Return the kernels' view of every plan.

    The lists of block plans are laid out together, and beside what follows if that is given.
    """
    sources = [ListSource.of(plan) for plan in plans if isinstance(plan, BlockPlan)]
    lists = _block_lists(sources, nothing, beside)
    blocks = (_block_view(*both, nothing) for both in zip(sources, lists, strict=True))
    return [
        next(blocks) if isinstance(plan, BlockPlan) else _tile_view(plan, nothing) for plan in plans
    ]


_NO_FEATURES = {
    "HAS_WEIGHT": False, "HAS_VALUE_WEIGHT": False, "HAS_CAP": False, "HAS_FLOOR": False,
    "HAS_BAND": False, "IS_CAUSAL": False, "NUM_EXCLUDED": 0, "SUMMARIES": False,
}  # fmt: skip
LIST = ("index_batch", "index_head", "index_tile")
RANK = ("rank_batch", "rank_head")
WEIGHT = ("weight_batch", "weight_head", "weight_tile", "weight_slot")
_VALUE_WEIGHT = ("vw_batch", "vw_head", "vw_tile", "vw_slot")
_ORDER = ("order_batch", "order_head")
_POINTERS = (
    "cap_ptr", "ex_rank_ptr", "ex_start_ptr", "ex_stop_ptr", "summary_key_ptr", "summary_value_ptr",
)  # fmt: skip


def _block_view(source: ListSource, lists: _Lists, nothing: torch.Tensor) -> PlanView:
    plan = source.plan
    order = _unit(plan.query_order)
    index, weight, count = lists
    uniform = _weigh_alike(plan)
    covered = sum(rectangle[1] - rectangle[0] for rectangle in plan.rectangles)
    return PlanView(
        rows=BLOCKED, plan_heads=plan.num_query_heads, group=1, num_tiles=plan.tiles.shape[0],
        tile_slots=plan.max_rows, list_slots=max(1, plan.max_keys),
        covers_all_rows=covered == plan.num_queries,
        order={"table_ptr": plan.tiles, "order_ptr": order, **strides_of(order, _ORDER)},
        lists={
            "index_ptr": index, "value_weight_ptr": nothing, "counts_ptr": count,
            "exact_slots": _padded(max(1, plan.max_keys)), **strides_of(index, LIST),
            "weight_ptr": nothing if weight is None else weight, **strides_of(weight, WEIGHT),
            **strides_of(None, _VALUE_WEIGHT),
        },
        features={
            **dict.fromkeys(_POINTERS, nothing), "num_summaries": 0, "left": 0, "right": 0,
            "position_offset": 0,
        },
        variant={**_NO_FEATURES, "HAS_WEIGHT": not uniform}, source=source,
    )  # fmt: skip


def _weigh_alike(plan: BlockPlan) -> bool:
    """Whether all samples of a rectangle have one weight, as those of a uniform sampler do."""
    weight = plan.sample_log_weight
    return weight is None or weight.shape[-1] <= 1 or weight.stride(-1) == 0


class ListSource(NamedTuple):
    """What the lists of a block plan are made of, and what they have in common with others."""

    plan: BlockPlan
    order: torch.Tensor
    sample: torch.Tensor | None
    rank: torch.Tensor | None
    weight: torch.Tensor | None
    shared: dict[str, Any]

    @classmethod
    def of(cls, plan: BlockPlan) -> ListSource:
        """Return that of a plan."""
        order, exact = _unit(plan.key_order), _padded(max(1, plan.max_keys))
        samples = power_of_two(plan.num_samples) if plan.num_samples else 0
        sample, rank, weight = plan.sample_index, plan.key_rank, plan.sample_log_weight
        if not samples:
            sample = rank = weight = None
        sample = None if sample is None else _unit(sample)
        rank = None if rank is None else _unit(rank)
        shared = {
            **strides_of(order, _ORDER),
            **strides_of(sample, ("sample_batch", "sample_head")), **strides_of(rank, RANK),
            **strides_of(weight, ("weight_batch", "weight_head")),
            # as it is, also of a plan with one rectangle: it may share the launch of others
            "sample_rectangle": 0 if sample is None else sample.stride(2),
            "weight_rectangle": 0 if weight is None else weight.stride(2),
            "weight_slot": 0 if weight is None or weight.shape[3] == 1 else weight.stride(3),
            "heads": order.shape[0] * order.shape[1], "key_heads": order.shape[1],
            "num_keys": plan.num_keys, "num_samples": plan.num_samples, "exact_slots": exact,
            "list_slots": exact + samples, "WEIGHTS": not _weigh_alike(plan),
            "BLOCK": min(256, exact), "SAMPLES": samples,
        }  # fmt: skip
        return cls(plan, order, sample, rank, weight, shared)


_Lists = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]


def _block_lists(
    sources: Sequence[ListSource], nothing: torch.Tensor, beside: Beside | None
) -> list[_Lists]:
    """Return keys and log weights `[batch, key_heads, T, L]` and lengths of the lists of all tiles.

    For every plan; those of one form are laid out in one launch. Of samples that weigh alike there
    is one weight for a rectangle: `[batch, key_heads, R, 1]`.
    """
    made: list[_Lists] = []
    for source in sources:
        order, shared = source.order, source.shared
        shape = (*order.shape[:2], source.plan.tiles.shape[0], shared["list_slots"])
        index = torch.empty(shape, dtype=torch.int32, device=order.device)
        weight = source.weight
        if shared["WEIGHTS"]:
            weight = torch.empty(shape, dtype=torch.float32, device=order.device)
        made.append((index, weight, torch.empty(shape[:3], dtype=torch.int32, device=order.device)))
    with nullcontext() if beside is None else beside.here():
        for numbers in alike([source.shared for source in sources]):
            several = [(sources[number], *made[number]) for number in numbers]
            shared = sources[numbers[0]].shared
            sizes, tiles = number_of_tiles([source.plan for source, *_ in several], nothing)
            programs = shared["heads"] * tiles
            if programs == 0:
                continue
            block_lists_kernel[(programs, len(several))](
                **shared, tiles_ptr=sizes, num_tiles=tiles, PLANS=len(several),
                tables=tuple(source.plan.tiles for source, *_ in several),
                orders=tuple(source.order for source, *_ in several),
                samples=tuple(_or(source.sample, nothing) for source, *_ in several),
                ranks=tuple(_or(source.rank, nothing) for source, *_ in several),
                weights=tuple(_or(source.weight, nothing) for source, *_ in several),
                indices=tuple(index for _, index, _, _ in several),
                log_weights=tuple(
                    _or(weight, nothing) if shared["WEIGHTS"] else nothing
                    for _, _, weight, _ in several
                ),
                counts=tuple(count for *_, count in several),
            )  # fmt: skip
    return made


def _or(tensor: torch.Tensor | None, nothing: torch.Tensor) -> torch.Tensor:
    return nothing if tensor is None else tensor


def alike(forms: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Return the numbers of equal forms, together."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, form in enumerate(forms):
        groups.setdefault(tuple(form.values()), []).append(number)
    return list(groups.values())


def number_of_tiles(plans: Sequence[BlockPlan], nothing: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return how many tiles several plans have, on the device, and the largest number."""
    counts = tuple(plan.tiles.shape[0] for plan in plans)
    # (a table is only read where there are several)
    return _tile_counts(counts, plans[0].tiles.device) if len(plans) > 1 else nothing, max(counts)


@kept
def _tile_counts(counts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return int_table([(count,) for count in counts], 1, device)


def places_of(
    views: Sequence[PlanView], query: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor
) -> list[dict[str, Any]]:
    """Return row, log normaliser and delta of every place of the tiles, as arguments, by view.

    Views of block plans of one form share a launch.
    """
    batch, heads, rows = lse.shape
    made: list[dict[str, Any]] = []
    forms: list[dict[str, Any]] = []
    for number, view in enumerate(views):
        place_tile = _padded(view.places)
        shape = (batch, view.plan_heads, view.num_tiles, place_tile)
        made.append({
            "place_row_ptr": torch.empty(shape, dtype=torch.int32, device=lse.device),
            "place_lse_ptr": torch.empty(shape, device=lse.device),
            "place_delta_ptr": torch.empty(shape, device=lse.device), "place_tile": place_tile,
        })  # fmt: skip
        forms.append({
            **{name: stride for name, stride in view.order.items() if name in _ORDER},
            "heads": batch * view.plan_heads, "plan_heads": view.plan_heads, "query_heads": heads,
            "num_queries": rows, "place_tile": place_tile, "GROUP": view.group, "ROWS": view.rows,
            "BLOCK": 128 if place_tile % 128 == 0 else place_tile,
            # blocks have a table that says how many rows a tile has
            "tile_slots": view.tile_slots if view.blocks is None else 0,
            "single": number if view.blocks is None else -1,
        })  # fmt: skip
    for numbers in alike(forms):
        shared = {name: size for name, size in forms[numbers[0]].items() if name != "single"}
        plans = [view.blocks for view in (views[number] for number in numbers) if view.blocks]
        sizes, tiles = query, views[numbers[0]].num_tiles
        if plans:
            sizes, tiles = number_of_tiles(plans, query)
        programs = shared["heads"] * tiles * (shared["place_tile"] // shared["BLOCK"])
        if programs == 0:
            continue
        places_kernel[(programs, len(numbers))](
            **shared, lse_ptr=lse, delta_ptr=delta, tiles_ptr=sizes, num_tiles=tiles,
            PLANS=len(numbers),
            tables=tuple(views[number].order["table_ptr"] for number in numbers),
            orders=tuple(views[number].order["order_ptr"] for number in numbers),
            place_rows=tuple(made[number]["place_row_ptr"] for number in numbers),
            place_lses=tuple(made[number]["place_lse_ptr"] for number in numbers),
            place_deltas=tuple(made[number]["place_delta_ptr"] for number in numbers),
        )  # fmt: skip
    return made


def _padded(count: int) -> int:
    """Return the count rounded up to whole blocks: of 128, or of a smaller power of two."""
    block = min(128, padded(count))
    return -(-count // block) * block


def _tile_view(plan: TilePlan, nothing: torch.Tensor) -> PlanView:
    index = _unit(plan.key_index)
    if plan.num_keys + plan.num_summaries == 0:
        index = index[..., :0]  # no list can name a key
    lists = (index, plan.key_count, plan.heavy_count, plan.band_count, plan.log_weight,
             plan.value_log_weight)  # fmt: skip
    _, heads, tiles, slots = index.shape
    tile_slots = plan.tile_size
    shared = all(x is None or x.shape[2] == 1 or x.stride(2) == 0 for x in lists)
    if shared and tiles > 1:
        # one list for all tiles: one tile of all rows
        tile_slots, tiles = tile_slots * tiles, 1
        names = ("key_count", "heavy_count", "band_count", "log_weight", "value_log_weight")
        given = {name: getattr(plan, name) for name in names}
        once: dict[str, Any] = {
            name: None if x is None else x[:, :, :1] for name, x in given.items()
        }
        index = index[:, :, :1]
        plan = replace(plan, key_index=index, tile_size=tile_slots, **once)
    counts = [plan.key_count, plan.heavy_count]
    counts.append(plan.heavy_count if plan.band_count is None else plan.band_count)
    order = None if plan.query_order is None else _unit(plan.query_order)
    excluded = plan.excluded
    left, right = plan.band or (0, 0)

    def or_nothing(tensor: torch.Tensor | None) -> torch.Tensor:
        return nothing if tensor is None else tensor.contiguous()

    return PlanView(
        rows=CONSECUTIVE if order is None else ORDERED, plan_heads=heads,
        group=plan.num_query_heads // heads, num_tiles=tiles, tile_slots=tile_slots,
        list_slots=slots, covers_all_rows=order is None and slots > 0,
        order={
            "table_ptr": nothing, "order_ptr": or_nothing(order), **strides_of(order, _ORDER),
        },
        lists={
            "index_ptr": index, "exact_slots": 0,
            "weight_ptr": nothing if plan.log_weight is None else plan.log_weight,
            "value_weight_ptr": nothing if plan.value_log_weight is None else plan.value_log_weight,
            # (no more than there are: nothing is read behind a list)
            "counts_ptr": torch.stack([count.int() for count in counts], dim=-1).clamp_(max=slots),
            **strides_of(index, LIST), **strides_of(plan.log_weight, WEIGHT),
            **strides_of(plan.value_log_weight, _VALUE_WEIGHT),
        },
        features={
            "cap_ptr": or_nothing(plan.log_cap), "floor_ptr": or_nothing(plan.log_floor),
            "ex_rank_ptr": nothing if excluded is None else excluded.key_rank.contiguous(),
            "ex_start_ptr": nothing if excluded is None else excluded.start.contiguous(),
            "ex_stop_ptr": nothing if excluded is None else excluded.stop.contiguous(),
            "summary_key_ptr": or_nothing(plan.summary_key),
            "summary_value_ptr": or_nothing(plan.summary_value),
            "num_summaries": plan.num_summaries, "left": left, "right": right,
            "position_offset": plan.position_offset,
        },
        variant={
            "HAS_WEIGHT": plan.log_weight is not None,
            "HAS_VALUE_WEIGHT": plan.value_log_weight is not None,
            "HAS_CAP": plan.log_cap is not None, "HAS_FLOOR": plan.log_floor is not None,
            "HAS_BAND": plan.band is not None, "IS_CAUSAL": plan.is_causal,
            "NUM_EXCLUDED": 0 if excluded is None else excluded.key_rank.shape[2],
            "SUMMARIES": plan.num_summaries > 0,
        },
    )  # fmt: skip


def is_wide(tensor: torch.Tensor) -> bool:
    """Whether offsets within a head need 64 bits."""
    return tensor.shape[2] * tensor.stride(2) + tensor.shape[3] >= 2**31


def kernel_arguments(
    view: PlanView, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> dict[str, Any]:
    """Return what every attention kernel takes for a plan and the three inputs."""
    return {
        "q_ptr": query, "k_ptr": key, "v_ptr": value,
        **strides_of(query, ("q_batch", "q_head", "q_row")),
        **strides_of(key, ("k_batch", "k_head", "k_row")),
        **strides_of(value, ("v_batch", "v_head", "v_row")),
        **view.features, **view.variant, **view.lists, "table_ptr": view.order["table_ptr"],
        "plan_heads": view.plan_heads, "query_heads": query.shape[1], "key_heads": key.shape[1],
        "heads_per_key": view.plan_heads // key.shape[1],
        "num_tiles": view.num_tiles, "tile_slots": view.tile_slots,
        "num_queries": query.shape[2], "num_keys": key.shape[2],
        "WIDE": any(is_wide(x) for x in (query, key, value)),
        "scale": scale, "nan": float("nan"), "GROUP": view.group,
        "D": query.shape[-1], "D_V": value.shape[-1],
    }  # fmt: skip
