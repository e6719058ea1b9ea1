"""Tile plans: refusals, and what a plan means entry by entry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hyperframe import plan as plan_module
from hyperframe.errors import ArgumentError
from hyperframe.kernels import attend
from hyperframe.plan import RankRanges, TilePlan

NAN = math.nan


def plan(
    keys: list[list[int]], heavy: list[int] | None = None, used: list[int] | None = None,
    **changes: Any,
) -> TilePlan:  # fmt: skip
    """A plan of one batch item and head; tiles of two rows, six keys, unless told otherwise."""
    index = torch.tensor([[keys]]).view(1, 1, len(keys), -1)
    counts = used if used is not None else [len(row) for row in keys]
    fields: dict[str, Any] = {
        "key_index": index,
        "key_count": torch.tensor([[counts]]),
        "heavy_count": torch.tensor([[heavy if heavy is not None else counts]]),
        "tile_size": 2,
        "num_query_heads": 1,
        "num_queries": 2 * len(keys),
        "num_keys": 6,
    }
    return TilePlan(**fields | changes)


def dense(tile_plan: TilePlan, **options: Any) -> list[list[float]]:
    rows: list[list[float]] = tile_plan.to_dense(**options)[0, 0].tolist()
    return rows


def assert_rows(rows: list[list[float]], expected: list[list[float]]) -> None:
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(expected, dtype=torch.float32))


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


SHAPES = {
    "key_index": (torch.zeros(1, 2, 3), r"key_index: expected \[batch, heads, tiles, L\]"),
    "key_count": (zeros(1, 1, 3), r"key_count: expected shape \(1, 1, 2\) to match key_index"),
    "heavy_count": (zeros(1, 2, 2), r"heavy_count: expected shape \(1, 1, 2\)"),
    "log_weight": (zeros(1, 1, 2, 3), r"log_weight: expected shape \(1, 1, 2, 2\)"),
    "value_log_weight": (zeros(1, 1, 1, 2), r"value_log_weight: expected shape \(1, 1, 2, 2\)"),
    "query_order": (zeros(1, 1, 3), r"query_order: expected shape \(1, 1, 4\)"),
    "log_cap": (zeros(1, 1, 3), r"log_cap: expected shape \(1, 1, 4\)"),
    "log_floor": (zeros(1, 2, 4), r"log_floor: expected shape \(1, 1, 4\)"),
    "num_queries": (5, r"tile_size: 2 tiles of 2 rows do not cover the 5 queries"),
    "band": ((1, 1), r"band and band_count: give both or neither"),
    "band_count": (zeros(1, 1, 2), r"band and band_count: give both or neither"),
    "summary_key": (zeros(1, 1, 2, 4), r"summary_key and summary_value: give both or neither"),
}


@pytest.mark.parametrize("field", SHAPES)
def test_a_field_that_does_not_fit_is_refused_by_name(field: str) -> None:
    value, message = SHAPES[field]
    with pytest.raises(ArgumentError, match=message):
        plan([[0, 1], [2, 3]], **{field: value})


def test_heads_that_do_not_divide_the_query_heads_are_refused() -> None:
    index = torch.zeros(1, 2, 1, 1, dtype=torch.int64)
    count = torch.ones(1, 2, 1, dtype=torch.int64)
    with pytest.raises(ArgumentError, match="its 2 heads do not divide the 3 query heads"):
        TilePlan(
            key_index=index, key_count=count, heavy_count=count, tile_size=4, num_query_heads=3,
            num_queries=4, num_keys=2,
        )  # fmt: skip


VALUES = {
    "too many": ({"used": [3, 1]}, r"band_count <= heavy_count <= key_count <= L does not hold"),
    "heavier than used": ({"heavy": [2, 2], "used": [1, 2]}, r"<= L does not hold"),
    "negative": ({"heavy": [-1, 0]}, r"<= L does not hold"),
    "more banded than heavy": (
        {"heavy": [1, 1], "band": (0, 0), "band_count": torch.tensor([[[2, 0]]])},
        r"<= L does not hold",
    ),
    "key outside": ({"keys": [[0, 6], [1, 2]]}, r"key_index: 6 is outside 0\.\.5 \(num_keys 6"),
    "key negative": ({"keys": [[0, -1], [1, 2]]}, r"key_index: -1 is outside 0\.\.5"),
    "row outside": (
        {"query_order": torch.tensor([[[0, 1, 2, 4]]])},
        r"query_order: rows outside -1\.\.3",
    ),
    "row below": (
        {"query_order": torch.tensor([[[0, 1, 2, -2]]])},
        r"query_order: rows outside -1\.\.3",
    ),
    "row twice": (
        {"query_order": torch.tensor([[[2, 1, -1, 2]]])},
        r"query_order: a row is owned by two slots",
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_that_cannot_be_are_found_by_validate(case: str) -> None:
    changes, message = VALUES[case]
    made = plan(**{"keys": [[0, 1], [2, 3]]} | changes)
    with pytest.raises(ArgumentError, match=message):
        made.validate()


def test_a_valid_plan_validates_to_itself() -> None:
    made = plan(
        [[0, 99], [6, 5]], used=[1, 2], query_order=torch.tensor([[[3, -1, -1, 0]]]),
        summary_key=zeros(1, 1, 1, 4), summary_value=zeros(1, 1, 1, 4),
    )  # fmt: skip
    assert made.validate() is made


def test_unused_slots_have_weight_zero_whatever_they_hold() -> None:
    made = plan(
        [[1, -7, 2**40], [2**62, 3, 5]], used=[1, 0], log_weight=torch.tensor([0.0, NAN, NAN])
        .expand(1, 1, 2, -1),
    )  # fmt: skip
    assert dense(made) == [[0, 1, 0, 0, 0, 0]] * 2 + [[0] * 6] * 2


def test_exact_slots_weigh_one_and_sampled_slots_their_weight() -> None:
    weight = torch.tensor([[[[0.0, math.log(3), math.log(0.5)]]]])
    made = plan([[4, 0, 2]], heavy=[1], log_weight=weight)
    assert_rows(dense(made), [[3, 0, 0.5, 0, 1, 0]] * 2)
    assert_rows(dense(made, part="heavy"), [[0, 0, 0, 0, 1, 0]] * 2)
    assert_rows(dense(made, part="sampled"), [[3, 0, 0.5, 0, 0, 0]] * 2)


def test_value_weights_are_those_of_the_numerator() -> None:
    made = plan(
        [[4, 0]], heavy=[1], log_weight=torch.tensor([[[[0.0, math.log(3)]]]]),
        value_log_weight=torch.tensor([[[[0.0, math.log(2)]]]]),
    )  # fmt: skip
    assert_rows(dense(made), [[3, 0, 0, 0, 1, 0]] * 2)
    assert_rows(dense(made, for_values=True), [[2, 0, 0, 0, 1, 0]] * 2)


def test_a_sampled_key_that_is_also_exact_is_not_counted_twice() -> None:
    weight = torch.full((1, 1, 1, 4), math.log(5))
    weight[..., :2] = 0
    for values in (None, 2 * weight):
        made = plan([[4, 1, 4, 3]], heavy=[2], log_weight=weight, value_log_weight=values)
        assert_rows(dense(made), [[0, 1, 0, 5, 1, 0]] * 2)
        assert made.to_dense(for_values=True)[0, 0, :, 4].tolist() == [1, 1]


def test_exact_duplicates_count_once_and_sampled_ones_as_often_as_drawn() -> None:
    made = plan([[2, 2, 2, 5, 5, 2]], heavy=[3])
    assert dense(made) == [[0, 0, 1, 0, 0, 2]] * 2


def test_a_banded_copy_of_an_exact_key_is_dropped() -> None:
    # rows 0 and 1 stand at the positions 4 and 5; the band is the own position
    made = plan([[4, 5, 4]], band=(0, 0), band_count=torch.tensor([[[2]]]))
    assert dense(made) == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]]


def test_a_sampled_copy_of_a_banded_key_counts_for_the_rows_outside_the_band() -> None:
    made = plan([[4, 5, 4]], heavy=[2], band=(0, 0), band_count=torch.tensor([[[2]]]))
    # row 1 does not hold key 4: its sampled copy stands
    assert dense(made) == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]]
    assert dense(made, part="heavy") == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]
    assert dense(made, part="sampled") == [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0]]


def test_a_sampled_key_inside_the_band_counts_nothing_though_no_slot_holds_it() -> None:
    # another plan holds it, or the list was cut: the band decides, not the list
    made = plan([[4]], heavy=[0], band=(0, 0), band_count=torch.tensor([[[0]]]))
    assert dense(made) == [[0] * 6, [0, 0, 0, 0, 1, 0]]


def test_causal_rows_see_keys_up_to_their_position() -> None:
    made = plan([[0, 3, 4, 5]], is_causal=True)
    assert dense(made) == [[1, 0, 0, 1, 1, 0], [1, 0, 0, 1, 1, 1]]
    assert dense(plan([[0, 3, 4, 5]], is_causal=True, query_offset=3))[0] == [1, 0, 0, 1, 0, 0]
    # rows before every key
    assert dense(plan([[0]], is_causal=True, query_offset=-2)) == [[0] * 6] * 2


def test_summaries_stand_behind_the_keys_and_outside_position_band_and_ranges() -> None:
    everything = torch.tensor([[[0, 0]]]).view(1, 1, 1, 2)
    made = plan(
        [[7, 6, 0]], heavy=[1], used=[2], is_causal=True, band=(9, 9),
        band_count=torch.tensor([[[0]]]), query_offset=-5, summary_key=zeros(1, 1, 2, 4),
        summary_value=zeros(1, 1, 2, 4),
        excluded=RankRanges(
            key_rank=torch.arange(6).view(1, 1, 1, 6), start=everything, stop=everything + 6
        ),
    )  # fmt: skip
    assert made.num_summaries == 2
    assert dense(made) == [[0] * 6 + [1, 1]] * 2


def test_a_banded_summary_is_in_no_band() -> None:
    made = plan(
        [[6]], band=(9, 9), band_count=torch.tensor([[[1]]]), summary_key=zeros(1, 1, 1, 4),
        summary_value=zeros(1, 1, 1, 4),
    )  # fmt: skip
    assert dense(made) == [[0] * 7] * 2


def test_excluded_ranges_leave_out_exact_and_sampled_entries() -> None:
    ranges = RankRanges(
        key_rank=torch.tensor([[[[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]]]]),
        start=torch.tensor([[[[0, 0], [0, 5]]]]), stop=torch.tensor([[[[2, 0], [1, 6]]]]),
    )  # fmt: skip
    made = plan([[0, 4, 5, 1]], heavy=[2], excluded=ranges)
    # row 0 leaves out the keys 5 and 4 (ranks 0, 1 of the first order) and 0 (of the second)
    assert dense(made) == [[0, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 0]]


def test_rows_follow_the_query_order_and_rows_without_a_slot_stay_empty() -> None:
    made = plan([[0], [1]], query_order=torch.tensor([[[3, -1, -1, 1]]]))
    assert dense(made) == [[0] * 6, [0, 1, 0, 0, 0, 0], [0] * 6, [1, 0, 0, 0, 0, 0]]


def test_a_list_of_a_key_head_is_that_of_every_query_head_in_its_group() -> None:
    made = plan(
        [[3]], num_query_heads=2, key_index=torch.tensor([[[[3]]]]),
        key_count=torch.ones(1, 1, 1), heavy_count=torch.ones(1, 1, 1),
    )  # fmt: skip
    weights = made.to_dense()
    assert weights.shape == (1, 2, 2, 6)
    assert torch.equal(weights[:, 0], weights[:, 1])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_rows_without_keys_return_zero_and_minus_infinity(backend: str) -> None:
    made = plan([[0], [1]], used=[0, 1], query_order=torch.tensor([[[3, -1, -1, 1]]]))
    q, k, v = torch.randn(1, 1, 4, 3), torch.randn(1, 1, 6, 3), torch.randn(1, 1, 6, 2)
    out, lse = attend(q, k, v, made, scale=1.0, backend=backend)
    assert torch.equal(out[0, 0, [0, 2, 3]], torch.zeros(3, 2))
    assert torch.equal(lse[0, 0, [0, 2, 3]], torch.full((3,), -math.inf))
    torch.testing.assert_close(out[0, 0, 1], v[0, 0, 1])
    torch.testing.assert_close(lse[0, 0, 1], q[0, 0, 1] @ k[0, 0, 1])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("slots", [0, 1])
def test_a_floor_does_not_fill_rows_without_keys(backend: str, slots: int) -> None:
    # row 0 sees no key, row 1 sees key 0; no slots at all is the same for both
    made = plan(
        [[0] * slots], heavy=[0], is_causal=True, query_offset=-1, log_floor=torch.ones(1, 1, 2)
    )
    q, k, v = torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 6, 3), torch.ones(1, 1, 6, 2)
    out, lse = attend(q, k, v, made, scale=1.0, backend=backend)
    filled = [-math.inf, 1.0] if slots else [-math.inf] * 2
    assert lse[0, 0].tolist() == filled
    expected = torch.tensor(filled).neg().exp().nan_to_num(posinf=0).view(2, 1).expand(2, 2)
    torch.testing.assert_close(out[0, 0], expected)


def test_deduplication_keeps_shared_lists_shared() -> None:
    tiles, slots = 7, 5
    index = torch.tensor([3, 1, 3, 1, 0]).expand(2, 3, tiles, slots)
    count = torch.tensor(slots).expand(2, 3, tiles)
    made = TilePlan(
        key_index=index, key_count=count, heavy_count=torch.tensor(2).expand(2, 3, tiles),
        tile_size=4, num_query_heads=3, num_queries=25, num_keys=4,
        log_weight=torch.zeros(slots).expand(2, 3, tiles, slots),
        value_log_weight=torch.zeros(slots).expand(2, 3, tiles, slots),
    ).deduplicated()  # fmt: skip
    assert made.disjoint
    for weight in (made.log_weight, made.value_log_weight):
        assert weight is not None
        assert weight.stride(2) == 0
        assert weight.untyped_storage().nbytes() <= 4 * 2 * 3 * slots
        assert weight[0, 0, 0].tolist() == [0, 0, -math.inf, -math.inf, 0]
    assert made.key_index.data_ptr() == index.data_ptr()
    assert made.deduplicated() is made


def test_weights_of_their_own_unshare_only_themselves() -> None:
    tiles = 4
    made = TilePlan(
        key_index=torch.tensor([2, 2]).expand(1, 1, tiles, 2),
        key_count=torch.tensor(2).expand(1, 1, tiles),
        heavy_count=torch.tensor(1).expand(1, 1, tiles), tile_size=1, num_query_heads=1,
        num_queries=tiles, num_keys=3, log_weight=torch.randn(1, 1, tiles, 2),
    ).deduplicated()  # fmt: skip
    assert made.log_weight is not None
    assert made.log_weight[..., 1].tolist() == [[[-math.inf] * tiles]]
    assert made.key_index.stride(2) == 0


class LargestInteger(TorchDispatchMode):
    """Remembers the bytes of the largest int64 tensor that an operation stored."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dtype == torch.int64:
                self.size = max(self.size, x.untyped_storage().nbytes())
        return out


def test_deduplication_in_chunks_is_the_same_and_holds_no_int64_array_of_all_lists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 40)
    counts = torch.randint(0, 17, (3, *shape), generator=generator, dtype=torch.int32)
    band_count, heavy_count, key_count = counts.sort(dim=0).values
    made = TilePlan(
        key_index=torch.randint(0, 12, (*shape, 16), generator=generator, dtype=torch.int32),
        key_count=key_count, heavy_count=heavy_count, band_count=band_count, band=(3, 1),
        tile_size=1, num_query_heads=3, num_queries=40, num_keys=12,
        log_weight=torch.randn(*shape, 16, generator=generator),
    )  # fmt: skip
    expected = made.deduplicated().log_weight
    assert expected is not None
    assert made.log_weight is not None
    assert not torch.equal(expected, made.log_weight)
    monkeypatch.setattr(plan_module, "_CHUNK_BYTES", 4096)
    with LargestInteger() as record:
        found = made.deduplicated().log_weight
    assert found is not None
    assert torch.equal(found, expected)
    assert record.size <= 4096  # all lists in int64 are 30 KB


def test_a_plan_of_empty_lists_is_deduplicated() -> None:
    made = plan([[], []]).deduplicated()
    assert made.disjoint
