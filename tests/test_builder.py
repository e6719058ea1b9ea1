"""Plans from masks: nothing materialised that is shared, refusals of positions, unbiased rests."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from hyperframe.blockplan import BlockPlan
from hyperframe.builder import build_level_plans, build_plans
from hyperframe.masks import BandMask, BlockMask, HeavyMask, ListMask, RangeMask
from hyperframe.plan import TilePlan
from hyperframe.rowsums import RowSumRule
from hyperframe.samplers.uniform import Uniform
from hyperframe.samples import KeySample

CPU = torch.device("cpu")


def uniform_draw(mask: HeavyMask, *, key_heads: int, num_samples: int, generator: torch.Generator):  # type: ignore[no-untyped-def]
    """What `HyperAttention` draws: of all keys, or of the prefix of each tile."""
    query = torch.zeros(mask.batch_size, mask.num_query_heads, mask.num_queries, 1)
    key = torch.zeros(mask.batch_size, key_heads, mask.num_keys, 1)

    def draw(prefixes: torch.Tensor | None) -> KeySample:
        sampler = Uniform()
        if prefixes is None:
            return sampler.sample(query, key, key, num_samples=num_samples, generator=generator)
        return sampler.sample_prefixes(
            query, key, key, num_samples=num_samples, prefixes=prefixes, generator=generator
        )

    return draw


def band(num_queries: int, num_keys: int, *, is_causal: bool) -> BandMask:
    return BandMask(
        batch_size=1, num_query_heads=2, num_queries=num_queries, num_keys=num_keys,
        is_causal=is_causal, left=2, right=1, num_sinks=1, on_device=CPU,
    )  # fmt: skip


def ranges(num_queries: int, num_keys: int, *, is_causal: bool) -> RangeMask:
    """Runs of 4 keys; some rows hold none."""
    group = torch.arange(num_queries).expand(1, 2, -1) % -(-num_keys // 4)
    start = group * 4
    stop = torch.where(torch.arange(num_queries) % 5 == 0, 0, start + 4).clamp(max=num_keys)
    order = torch.arange(num_keys).flip(0).expand(1, 1, -1)
    return RangeMask.of_rows(
        group, start, stop, order, max_keys=4, max_groups=-(-num_keys // 4), tile_size=4,
        is_causal=is_causal,
    )  # fmt: skip


def columns(num_queries: int, num_keys: int, *, is_causal: bool) -> ListMask:
    return ListMask.columns(
        torch.tensor([[[1, num_keys - 1]]]), num_query_heads=2, num_queries=num_queries,
        num_keys=num_keys, is_causal=is_causal,
    )  # fmt: skip


def first_runs(num_queries: int, num_keys: int, *, is_causal: bool) -> RangeMask:
    whole = torch.arange(num_keys).expand(1, 1, -1)
    group = torch.zeros(1, 2, num_queries, dtype=torch.int64)
    return RangeMask.of_rows(
        group, group + 1, group + 6, whole, max_keys=5, max_groups=1, tile_size=8,
        is_causal=is_causal,
    )  # fmt: skip


def blocks(num_queries: int, num_keys: int, *, is_causal: bool) -> BlockMask:
    """Three blocks of all rows and all keys, both reversed."""
    return BlockMask(
        batch_size=1, num_query_heads=2, num_queries=num_queries, num_keys=num_keys,
        is_causal=is_causal, rectangles=((0, num_queries, 0, num_keys),),
        query_order=torch.arange(num_queries, dtype=torch.int32).flip(0).expand(1, 2, -1),
        key_order=torch.arange(num_keys, dtype=torch.int32).flip(0).expand(1, 1, -1),
        block_size=-(-num_keys // 3),
    )  # fmt: skip


FORMS = {
    "band": band,
    "blocks": blocks,
    "ranges": ranges,
    "columns": columns,
    "blocks and columns": lambda *sizes, **causal: (
        blocks(*sizes, **causal) | columns(*sizes, **causal)
    ),
    "ranges and band": lambda *sizes, **causal: ranges(*sizes, **causal) | band(*sizes, **causal),
    "two ranges": lambda *sizes, **causal: (
        ranges(*sizes, **causal) | first_runs(*sizes, **causal) | columns(*sizes, **causal)
    ),
}


@pytest.mark.statistical
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_queries, num_keys", [(11, 11), (7, 13), (13, 7)])
@pytest.mark.parametrize("form", FORMS)
def test_the_sampled_rest_weighs_one_on_average_outside_the_mask_and_nothing_inside(
    form: str, num_queries: int, num_keys: int, is_causal: bool
) -> None:
    """Every entry outside the mask has expected weight 1, entry for entry.

    A key of a list of `m` uniform draws out of `p` is drawn Binomial(m, 1/p) times, each time with
    weight p / m: over S seeds the count is Binomial(S m, 1/p). The smallest two-sided tail of all
    entries is compared with 1e-6 / (number of entries): by the union bound a correct builder
    fails with a probability of less than 1e-6 a case, 5e-5 over the 42 cases.
    """
    mask = FORMS[form](num_queries, num_keys, is_causal=is_causal)
    generator = torch.Generator().manual_seed(17)
    seeds, num_samples = 400, 3
    total = torch.zeros(1, 2, num_queries, num_keys, dtype=torch.float64)
    for _ in range(seeds):
        draw = uniform_draw(mask, key_heads=1, num_samples=num_samples, generator=generator)
        made = build_plans(mask, key_heads=1, draw=draw)
        total += torch.stack([plan.to_dense(part="sampled") for plan in made]).sum(dim=0)
    heavy = mask.to_dense()
    assert (total[heavy] == 0).all()
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool)
    # keys a tile's sample is drawn from; here all rows are in one tile
    prefix = num_keys
    if is_causal:
        visible = visible.tril(num_keys - num_queries)
    assert (total[~visible.expand_as(total)] == 0).all()
    rest = total[visible & ~heavy]
    count = (rest * num_samples / prefix).round()
    torch.testing.assert_close(count * prefix / num_samples, rest, rtol=1e-5, atol=1e-5)
    law = stats.binom(seeds * num_samples, 1 / prefix)
    tails = 2 * torch.minimum(
        torch.from_numpy(law.cdf(count.numpy())), torch.from_numpy(law.sf(count.numpy() - 1))
    )
    assert len(rest) == 0 or tails.min() > 1e-6 / total.numel()


@pytest.mark.statistical
def test_every_tile_of_a_causal_plan_samples_its_own_prefix() -> None:
    """As above over several tiles, whose prefixes differ; false alarm below 1e-6."""
    num_queries, num_keys, tile = 12, 16, 4
    mask = ListMask(
        batch_size=1, num_query_heads=1, num_queries=num_queries, num_keys=num_keys,
        is_causal=True, key_index=torch.tensor([[[[0], [5], [9]]]]),
        key_count=torch.ones(1, 1, 3, dtype=torch.int64), tile_size=tile,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    seeds, num_samples = 400, 3
    total = torch.zeros(num_queries, num_keys, dtype=torch.float64)
    for _ in range(seeds):
        draw = uniform_draw(mask, key_heads=1, num_samples=num_samples, generator=generator)
        (made,) = build_plans(mask, key_heads=1, draw=draw)
        total += made.to_dense(part="sampled")[0, 0]
    held = mask.to_dense()[0, 0]
    for row in range(num_queries):
        position = row + num_keys - num_queries
        prefix = (row // tile + 1) * tile + num_keys - num_queries
        law = stats.binom(seeds * num_samples, 1 / prefix)
        for key in range(num_keys):
            if key > position or held[row, key]:
                assert total[row, key] == 0
                continue
            count = round(total[row, key].item() * num_samples / prefix)
            tail = 2 * min(law.cdf(count), law.sf(count - 1))
            assert tail > 1e-6 / total.numel(), (row, key)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_sample_of_every_key_makes_the_plan_exact(form: str, is_causal: bool) -> None:
    mask = FORMS[form](9, 9, is_causal=is_causal)

    def draw(prefixes: torch.Tensor | None) -> KeySample:
        shape = (1, 1, 9) if prefixes is None else (1, 1, len(prefixes), 9)
        return KeySample(index=torch.arange(9).expand(shape), log_weight=torch.zeros(shape))

    made = build_plans(mask, key_heads=1, draw=draw)
    total = torch.stack([plan.to_dense() for plan in made]).sum(dim=0)
    ones = torch.ones_like(total)
    assert torch.equal(total, ones.tril() if is_causal else ones)


def stored(plan: TilePlan) -> int:
    """Bytes behind the lists of a plan."""
    tensors = (plan.key_index, plan.log_weight, plan.key_count, plan.heavy_count)
    return sum(x.untyped_storage().nbytes() for x in tensors if x is not None)


def test_columns_with_a_shared_sample_are_stored_once() -> None:
    num_queries = 1 << 20
    index = torch.arange(64).expand(1, 2, -1)
    mask = ListMask.columns(index, num_query_heads=4, num_queries=num_queries, num_keys=1 << 20)
    draw = uniform_draw(mask, key_heads=2, num_samples=64, generator=torch.Generator())
    (made,) = build_plans(mask, key_heads=2, draw=draw)
    assert made.tile_size == num_queries
    assert made.key_index.shape == (1, 2, 1, 128)  # by key head, not by query head
    assert stored(made) < 1 << 16


def test_columns_cut_into_tiles_are_stored_once() -> None:
    index = torch.arange(64).expand(1, 2, 1000, -1)
    mask = ListMask(
        batch_size=1, num_query_heads=4, num_queries=64_000, num_keys=64_000, key_index=index,
        key_count=torch.tensor(64).expand(1, 2, 1000), tile_size=64,
    )  # fmt: skip
    draw = uniform_draw(mask, key_heads=2, num_samples=64, generator=torch.Generator())
    (made,) = build_plans(mask, key_heads=2, draw=draw)
    assert made.key_index.stride(2) == 0
    assert stored(made) < 1 << 16


def test_a_window_costs_its_own_length_a_tile_and_no_head() -> None:
    mask = BandMask(
        batch_size=1, num_query_heads=8, num_queries=32_768, num_keys=32_768, is_causal=True,
        left=255, right=0, num_sinks=4, on_device=CPU,
    )  # fmt: skip
    (made,) = build_plans(mask, key_heads=8)
    assert made.key_index.shape[-1] <= 64 + 255 + 4
    entries = made.key_index.shape[2] * made.key_index.shape[-1]
    assert stored(made) <= 8 * 8 * entries * 2


def test_prefixes_end_with_the_keys_wherever_the_queries_stand() -> None:
    seen = []

    def draw(prefixes: torch.Tensor | None) -> KeySample:
        assert prefixes is not None
        seen.append(prefixes)
        shape = (1, 1, len(prefixes), 1)
        return KeySample(index=torch.zeros(shape).long(), log_weight=torch.zeros(shape))

    for offset in (-3, 0, 50):
        mask = BandMask(
            batch_size=1, num_query_heads=1, num_queries=6, num_keys=8, is_causal=True,
            query_offset=offset, left=1, right=0, on_device=CPU,
        )  # fmt: skip
        build_plans(mask, key_heads=1, draw=draw)
    assert [prefixes.tolist() for prefixes in seen] == [[3], [6], [8]]


def test_all_plans_of_a_union_stand_at_its_offset() -> None:
    shifted = {"is_causal": True, "query_offset": 3}
    window = BandMask(
        batch_size=1, num_query_heads=2, num_queries=4, num_keys=9, left=1, right=0, on_device=CPU,
        **shifted,
    )  # fmt: skip
    group = torch.zeros(1, 2, 4, dtype=torch.int64)
    runs = RangeMask.of_rows(
        group, group, group + 9, torch.arange(9).expand(1, 1, -1), max_keys=9, max_groups=1,
        tile_size=4, **shifted,
    )  # fmt: skip
    made = build_plans(runs | window, key_heads=1)
    assert [plan.position_offset for plan in made] == [3, 3]
    total = torch.stack([plan.to_dense() for plan in made]).sum(dim=0)
    assert torch.equal(total.bool(), (runs | window).to_dense())
    assert math.isclose(total.max().item(), 1.0)


@pytest.mark.parametrize("is_causal", [False, True])
def test_bands_become_one_band(is_causal: bool) -> None:
    problem = {
        "batch_size": 1, "num_query_heads": 8, "num_queries": 500, "num_keys": 512,
        "is_causal": is_causal, "on_device": CPU,
    }  # fmt: skip
    bands = [
        BandMask(left=63, right=2, num_sinks=4, **problem),  # type: ignore[arg-type]
        BandMask(left=7, right=9, num_sinks=16, **problem),  # type: ignore[arg-type]
        BandMask(left=0, right=0, **problem),  # type: ignore[arg-type]
    ]
    mask = bands[0] | bands[1] | bands[2]
    (made,) = build_plans(mask, key_heads=8)
    assert made.band == (63, 9)
    assert made.tile_size == 64
    assert made.key_index.shape[-1] <= 64 + 63 + 9 + 16
    assert stored(made) < 1 << 17
    assert torch.equal(made.to_dense().bool(), mask.to_dense())


def test_plans_hold_int32_lists_whatever_the_masks_hold() -> None:
    mask = columns(9, 9, is_causal=False) | band(9, 9, is_causal=False)
    generator = torch.Generator().manual_seed(0)
    draw = uniform_draw(mask, key_heads=1, num_samples=3, generator=generator)
    for made in build_plans(mask | ranges(9, 9, is_causal=False), key_heads=1, draw=draw):
        assert made.key_index.dtype == torch.int32


def one_sample(prefixes: torch.Tensor | None) -> KeySample:
    shape = (1, 1, 1) if prefixes is None else (1, 1, len(prefixes), 1)
    return KeySample(index=torch.zeros(shape).long(), log_weight=torch.zeros(shape))


def test_blocks_alone_become_a_block_plan_that_stores_no_list() -> None:
    mask = blocks(9, 11, is_causal=False)
    for draw in (None, one_sample):
        (made,) = build_plans(mask, key_heads=1, draw=draw)
        assert isinstance(made, BlockPlan)
        assert made.query_order.data_ptr() == mask.query_order.data_ptr()
        assert made.key_order.data_ptr() == mask.key_order.data_ptr()
        assert made.num_samples == (draw is not None)
        made.validate()


def test_uniform_samples_of_blocks_share_one_weight_and_blocks_say_what_they_hold() -> None:
    # the kernels read one number then, instead of one for each slot
    mask = blocks(9, 11, is_causal=False)
    key = torch.zeros(1, 1, 11, 4)
    draw = Uniform().draws(
        torch.zeros(1, 2, 9, 4), key, key, num_samples=4, generator=torch.Generator()
    )
    (made,) = build_plans(mask, key_heads=1, draw=draw)
    assert isinstance(made, BlockPlan)
    assert made.sample_log_weight is not None
    assert made.sample_log_weight.shape == (1, 1, 1, 4)
    assert made.sample_log_weight.stride(-1) == 0
    assert made.covers_all_keys
    few_rows = blocks(2, 11, is_causal=False)
    (made,) = build_plans(few_rows, key_heads=1, draw=draw)
    assert isinstance(made, BlockPlan)
    assert not made.validate().covers_all_keys  # some blocks have no row


def test_blocks_with_company_or_caps_or_rows_left_out_become_tile_plans() -> None:
    mask = blocks(9, 9, is_causal=False)
    bounds = torch.zeros(1, 2, 9)
    window = band(9, 9, is_causal=False)
    partial = BlockMask(
        batch_size=1, num_query_heads=2, num_queries=9, num_keys=9, rectangles=((2, 5, 0, 4),),
        query_order=mask.query_order, key_order=mask.key_order, block_size=3,
    )  # fmt: skip
    for other, rule in (
        (mask, RowSumRule(log_cap=bounds)),
        (mask, RowSumRule(log_floor=bounds)),
        (mask | mask, None),
        (mask | window, None),
        (blocks(9, 9, is_causal=True), None),
        (partial, None),  # the residual has to reach the rows outside of the rectangle
    ):
        made = build_plans(other, key_heads=1, draw=one_sample, rule=rule)
        assert all(isinstance(plan, TilePlan) for plan in made)
        heavy = torch.stack([plan.to_dense(part="heavy") for plan in made]).sum(dim=0)
        assert torch.equal(heavy, other.to_dense().double())
    (alone,) = build_plans(partial, key_heads=1)
    assert isinstance(alone, BlockPlan)
    # what replaces the normaliser does not concern the plan
    (alone,) = build_plans(mask, key_heads=1, rule=RowSumRule(log_sum=bounds))
    assert isinstance(alone, BlockPlan)


def test_rectangles_of_level_plans_have_samples_of_their_own_unless_held_entirely() -> None:
    order = torch.arange(8, dtype=torch.int32).expand(1, 1, -1)
    level = {
        "batch_size": 1, "num_query_heads": 1, "num_queries": 8, "num_keys": 8,
        "query_order": order, "key_order": order,
    }  # fmt: skip
    small = BlockMask(rectangles=((2, 4, 0, 2), (6, 8, 4, 6)), block_size=2, **level)
    large = BlockMask(rectangles=((4, 8, 0, 4),), block_size=2, **level)
    asked = []

    def draw(rectangles: tuple[tuple[int, int, int, int], ...]) -> KeySample:
        asked.append(rectangles)
        index = torch.tensor([[[[0, 3, 3]] * len(rectangles)]])[0]
        return KeySample(index=index.view(1, 1, -1, 3), log_weight=torch.zeros(1, 1, 1, 3))

    made = build_level_plans([small, large], draw)
    assert made is not None
    assert asked == [((4, 8, 0, 4),)]
    assert [plan.num_samples for plan in made] == [0, 3]
    assert made[1].to_dense()[0, 0, 4:, :4].tolist() == [[1, 1, 0, 2]] * 2 + [[1, 0, 1, 1]] * 2
    assert build_level_plans([small, large], lambda rectangles: None) is None
    assert build_level_plans([small], lambda rectangles: None) is not None
    without = build_level_plans([small, large])
    assert without is not None
    assert [plan.num_samples for plan in without] == [0, 0]
