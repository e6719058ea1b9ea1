"""Stratified columns by the blocks of a detector: as many draws of each, whatever their sizes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hyperframe.samplers.stratified as module
from hyperframe import HyperAttention, detectors
from hyperframe.errors import UnsupportedError
from hyperframe.masks import BlockMask, HeavyMask, KeyBlocks, ListMask
from hyperframe.samplers import Stratified, Uniform
from hyperframe.samplers.stratified import WITH_BLOCKS

BY_BLOCKS = Stratified(strata="detector")
SMALL = {
    "sort_lsh": "sort_lsh(block_size=8)", "balanced_lsh": "balanced_lsh(block_size=8)",
    "reformer_lsh": "reformer_lsh(block_size=8)",
    "pca_tree": "pca_tree(leaf_size=8, num_leaves=2, chunk_size=64)",
    "kmeans": "kmeans(block_size=8, num_blocks=2, chunk_size=64)",
    "pooled_topk": "pooled_topk(num_blocks=2, chunk_size=64)",
}  # fmt: skip

blocks_of_keys = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_blocks(sizes: list[int], *, heads: int = 1, batch: int = 1) -> KeyBlocks:
    num_keys = sum(sizes)
    order = torch.rand(batch, heads, num_keys, generator=generator(num_keys)).argsort(dim=-1)
    return KeyBlocks(order, torch.tensor([0, *itertools.accumulate(sizes)]))


def runs_of(sizes: list[int], m: int) -> list[tuple[int, int]]:
    """The runs by their definition: blocks cut evenly, or put together."""
    edge, blocks = [0, *itertools.accumulate(sizes)], len(sizes)
    bounds = [s * blocks // m for s in range(m + 1)]
    if m < blocks:
        return [(edge[a], edge[b]) for a, b in itertools.pairwise(bounds)]
    runs = []
    for b, size in enumerate(sizes):
        count = (b + 1) * m // blocks - b * m // blocks
        cuts = [edge[b] + i * size // count for i in range(count + 1)]
        runs += itertools.pairwise(cuts)
    return runs


# ------------------------------------------------------------------------------- what is drawn


@given(sizes=blocks_of_keys, m=st.integers(1, 20), seed=st.integers(0, 1000))
def test_a_draw_is_a_key_of_its_run_and_weighs_its_length(
    sizes: list[int], m: int, seed: int
) -> None:
    blocks = some_blocks(sizes, heads=2, batch=3)
    sample = BY_BLOCKS.sample_blocks(blocks, num_samples=m, generator=generator(seed))
    assert sample.index.shape == sample.log_weight.shape == (3, 2, m)
    assert sample.index.dtype == torch.int64
    assert sample.log_weight.dtype == torch.float32
    assert ((sample.index >= 0) & (sample.index < sum(sizes))).all()
    rank = blocks.order.argsort(dim=-1)
    for s, (start, stop) in enumerate(runs_of(sizes, m)):
        weight = sample.log_weight[..., s].double().exp()
        torch.testing.assert_close(weight, torch.full_like(weight, stop - start))
        if start < stop:
            place = rank.gather(-1, sample.index)[..., s]
            assert ((place >= start) & (place < stop)).all()
    # weights add up to the keys, in every draw
    total = sample.log_weight.double().exp().sum(dim=-1)
    torch.testing.assert_close(total, torch.full_like(total, sum(sizes)))


@given(sizes=blocks_of_keys, m=st.integers(1, 20))
def test_blocks_get_as_many_draws_or_one_more_whatever_their_sizes(
    sizes: list[int], m: int
) -> None:
    runs, edge = runs_of(sizes, m), [0, *itertools.accumulate(sizes)]
    assert len(runs) == m
    if m < len(sizes):
        together = [sum(a <= x < b for x in edge[:-1]) for a, b in runs]
        assert max(together) - min(together) <= 1
        return
    # (an empty run may stand at the border of two blocks: it draws nothing)
    used = [sum(a >= edge[b] and z <= edge[b + 1] and a < z for a, z in runs)
            for b in range(len(sizes))]  # fmt: skip
    quota = [(b + 1) * m // len(sizes) - b * m // len(sizes) for b in range(len(sizes))]
    assert max(quota) - min(quota) <= 1
    assert used == [min(count, size) for count, size in zip(quota, sizes, strict=True)]


@pytest.mark.parametrize(
    "sizes, m", [([4, 3], 4), ([5, 1, 3], 3), ([2, 2, 3], 2), ([1, 4], 5), ([3, 3, 2], 4), ([6], 2)]
)
def test_over_all_outcomes_every_weighted_sum_is_the_sum_over_all_keys(
    sizes: list[int], m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact: the place in each run is uniform, so the mean over all outcomes is the expectation."""
    blocks = some_blocks(sizes)
    runs = runs_of(sizes, m)
    f = torch.randn(sum(sizes), dtype=torch.float64, generator=generator())
    sums = []
    for places in itertools.product(*(range(max(1, stop - start)) for start, stop in runs)):
        u = torch.tensor(
            [(x + 0.5) / max(1, b - a) for x, (a, b) in zip(places, runs, strict=True)]
        ).double()
        monkeypatch.setattr(module, "uniform", lambda shape, device, g, u=u: u.expand(shape))
        sample = BY_BLOCKS.sample_blocks(blocks, num_samples=m)
        sums.append((sample.log_weight.double().exp() * f[sample.index]).sum())
    torch.testing.assert_close(torch.stack(sums).mean(), f.sum())
    # and the spread is that of the runs: what the docstring says of the variance
    expected = sum((b - a) ** 2 * f[blocks.order[0, 0, a:b]].var(correction=0)
                   for a, b in runs if b > a)  # fmt: skip
    torch.testing.assert_close(torch.stack(sums).var(correction=0), torch.as_tensor(expected))


@given(sizes=blocks_of_keys, more=st.integers(0, 12), seed=st.integers(0, 1000))
def test_what_is_constant_in_every_block_has_no_variance(
    sizes: list[int], more: int, seed: int
) -> None:
    blocks = some_blocks(sizes)
    level = torch.randn(len(sizes), dtype=torch.float64, generator=generator(seed))
    f = torch.empty(sum(sizes), dtype=torch.float64)
    f[blocks.order[0, 0]] = level.repeat_interleave(torch.tensor(sizes))
    sample = BY_BLOCKS.sample_blocks(
        blocks, num_samples=len(sizes) + more, generator=generator(seed)
    )
    found = (sample.log_weight.double().exp() * f[sample.index]).sum(-1)
    torch.testing.assert_close(found, f.sum().expand_as(found), rtol=1e-6, atol=1e-6)


@given(sizes=blocks_of_keys, m=st.integers(1, 20), seed=st.integers(0, 1000))
def test_the_variance_is_at_most_uniforms_times_the_longest_run_over_the_mean_one(
    sizes: list[int], m: int, seed: int
) -> None:
    n = sum(sizes)
    f = torch.randn(n, generator=generator(seed), dtype=torch.float64).exp()
    runs = [f[start:stop] for start, stop in runs_of(sizes, m) if stop > start]
    stratified = sum(len(run) ** 2 * run.var(correction=0).item() for run in runs)
    uniformly = n**2 / m * f.var(correction=0).item()
    factor = max(len(run) for run in runs) * m / n  # 1 for equal runs
    assert stratified <= factor * uniformly * (1 + 1e-9) + 1e-12


# ------------------------------------------------------------------------------- masks with blocks


def tensors(n: int = 70, *, clusters: bool = False) -> tuple[torch.Tensor, ...]:
    g = generator(n)
    query, key = torch.randn(2, 4, n, 6, generator=g), torch.randn(2, 2, n, 6, generator=g)
    if clusters:
        key = torch.randn(2, 2, 4, 6, generator=g).repeat_interleave(n // 4, dim=2)
    return query, key, torch.randn(2, 2, key.shape[2], 6, generator=g)


def masks_of(name: str) -> HeavyMask | None:
    """What a detector finds in a rectangle; None where it cannot be asked by name alone."""
    spec = SMALL.get(name, name)
    if name == "block_list":
        return None
    query, key, _ = tensors()
    return detectors.create(spec).find_rectangle(query, key, generator=generator())


def test_the_detectors_that_have_blocks_are_those_that_are_named() -> None:
    found = {name: masks_of(name) for name in detectors.names()}
    has_blocks = {name for name, mask in found.items() if mask and mask.key_blocks() is not None}
    assert has_blocks == set(WITH_BLOCKS)


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_blocks_are_a_partition_of_which_rows_hold_whole_blocks(name: str) -> None:
    mask = masks_of(name)
    assert mask is not None
    blocks = mask.key_blocks()
    assert blocks is not None
    assert (blocks.order.sort(dim=-1).values == torch.arange(70)).all()
    assert blocks.edge[0] == 0
    assert blocks.edge[-1] == 70
    assert (blocks.edge.diff() > 0).all()
    assert len(blocks.edge) > 2
    # of the first part that has blocks, a row holds all of a block or nothing
    part = next(part for part in mask.parts() if part.key_blocks() is not None)
    order = blocks.order.long().repeat_interleave(2, dim=1).unsqueeze(2).expand(-1, -1, 70, -1)
    held = part.to_dense().gather(-1, order)
    for start, stop in itertools.pairwise(blocks.edge.tolist()):
        one = held[..., start:stop]
        assert (one.all(dim=-1) | ~one.any(dim=-1)).all()


def test_blocks_of_unequal_rectangles_and_keys_in_none_of_them() -> None:
    order = torch.arange(12).view(1, 1, 12)
    mask = BlockMask(
        batch_size=1, num_query_heads=1, num_queries=12, num_keys=12, query_order=order,
        key_order=order.flip(-1), rectangles=((6, 12, 5, 10), (0, 6, 0, 4)), block_size=3,
    )  # fmt: skip
    blocks = mask.key_blocks()
    assert blocks.edge.tolist() == [0, 2, 4, 5, 7, 10, 12]
    assert blocks.order is mask.key_order


def test_smaller_tiles_keep_the_blocks_and_other_keys_lose_them() -> None:
    query, key, _ = tensors()
    mask = detectors.create(SMALL["pca_tree"]).find(query, key)
    assert isinstance(mask, ListMask)
    blocks, again = mask.key_blocks(), mask.retile(16).key_blocks()
    assert blocks is not None
    assert again is not None
    assert torch.equal(blocks.order, again.order)
    assert torch.equal(blocks.edge, again.edge)
    assert mask.restricted(0, 70, 0, 30).key_blocks() is None


# ------------------------------------------------------------------------------- attention


def attention(detector: str, **options: Any) -> HyperAttention:
    return HyperAttention(
        detector=detector, sampler=BY_BLOCKS, **{"num_samples": 10, "min_seq_len": 0, **options}
    )


@pytest.mark.parametrize("assembly", ["residual", "paper"])
@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_every_backend_attends_by_the_same_sample(name: str, assembly: str) -> None:
    chosen = attention(SMALL[name], assembly=assembly, backend="torch")
    for is_causal, changes in ((False, {}), (True, {"causal": "recursive", "min_seq_len": 12})):
        one = chosen.replace(**changes)
        out = one(*tensors(), is_causal=is_causal)
        other = one.replace(backend="reference")(*tensors(), is_causal=is_causal)
        torch.testing.assert_close(out, other, rtol=2e-4, atol=2e-5)
        again = one(*tensors(), is_causal=is_causal)
        assert torch.equal(out, again)
        assert not torch.equal(out, one.replace(seed=1)(*tensors(), is_causal=is_causal))


def test_keys_that_are_equal_in_every_block_make_row_sums_exact() -> None:
    """Values, too, where they are; uniform draws from the same keys are far off."""
    query, key, _ = tensors(64, clusters=True)
    value = key.roll(1, dims=-1)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, enable_gqa=True
    )  # fmt: skip
    detector = "pca_tree(leaf_size=16, num_leaves=1)"
    chosen = attention(detector, num_samples=8)
    error = (chosen(query, key, value) - exact).norm() / exact.norm()
    uniformly = chosen.replace(sampler=Uniform())(query, key, value)
    assert error < 1e-5 < 0.05 < (uniformly - exact).norm() / exact.norm()


@pytest.mark.statistical
def test_row_sums_and_numerators_are_unbiased() -> None:
    """Hoeffding, per row: 2000 draws of sums in [0, b]; 64 rows, two-sided, together below 1e-6."""
    draws, n = 2000, 32
    g = generator(5)
    query, key = (0.7 * torch.randn(1, 1, n, 4, generator=g) for _ in range(2))
    value = torch.rand(1, 1, n, 1, generator=g)
    detector = "sort_lsh(block_size=9)"  # blocks of 8, 5 samples: unequal numbers of draws
    chosen = attention(detector, num_samples=5)
    logits = 0.5 * query @ key.mT
    bound = n * logits.exp().amax(dim=-1)  # no draw weighs more than all keys
    # every batch item draws for itself
    many = [x.expand(draws, -1, -1, -1) for x in (query, key, value)]
    out, lse = chosen(*many, return_lse=True, generator=generator(6))
    sums = lse.double().exp()
    products = out.squeeze(-1) * sums
    assert (sums[0] != sums[1]).any()
    radius = bound * math.sqrt(math.log(2 * 64 / 1e-6) / (2 * draws))
    exact = logits.double().exp()
    for found, expected in (
        (sums.mean(0), exact.sum(-1)[0]),
        (products.mean(0), (exact @ value.double()).squeeze(-1)[0]),
    ):
        assert ((found - expected).abs() <= radius).all()
    assert (radius < 0.7 * exact.sum(-1)).all()  # the bound says something


@pytest.mark.parametrize("detector", [SMALL["sort_lsh"], SMALL["pca_tree"]])
def test_no_later_key_or_value_moves_a_row_of_the_recursion(detector: str) -> None:
    query, key, value = tensors(90)
    chosen = attention(detector, num_samples=6, causal="recursive", min_seq_len=9)
    before = chosen(query, key, value, is_causal=True, return_lse=True)
    for cut in (20, 37, 70):
        other_key, other_value = key.clone(), value.clone()
        other_key[:, :, cut:] *= -3
        other_value[:, :, cut:] += 5
        after = chosen(query, other_key, other_value, is_causal=True, return_lse=True)
        for mine, its in zip(before, after, strict=True):
            assert torch.equal(mine[:, :, :cut], its[:, :, :cut])
        assert not torch.equal(before[0][:, :, cut:], after[0][:, :, cut:])


def test_strict_rectangles_of_leaves_depend_on_earlier_queries_alone() -> None:
    query, key, value = tensors(90)
    chosen = attention(
        SMALL["pca_tree"], num_samples=6, causal="recursive", min_seq_len=9, strict_causal=True
    )
    before = chosen(query, key, value, is_causal=True)
    for cut in (20, 37, 70):
        other = query.clone()
        other[:, :, cut:] *= -3
        after = chosen(other, key, value, is_causal=True)
        assert torch.equal(before[:, :, :cut], after[:, :, :cut])


def test_of_no_more_keys_than_samples_all_are_taken() -> None:
    query, key, value = tensors(20)
    out = attention("sort_lsh(block_size=3)", num_samples=20)(query, key, value)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(out, exact)


# ------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "detector", ["sliding_window", "heavy_columns", "strided", "quest", "expander_sketch"]
)
def test_a_detector_without_blocks_is_refused_with_those_that_have_some(detector: str) -> None:
    with pytest.raises(UnsupportedError, match=r"no blocks of keys; sort_lsh, .* and pooled_topk"):
        attention(detector)(*tensors())


def test_a_union_with_one_that_has_blocks_is_taken() -> None:
    out = attention(f"sliding_window(width=5) | {SMALL['pca_tree']}")(*tensors())
    assert out.isfinite().all()


def test_a_single_causal_pass_is_refused_with_what_works() -> None:
    with pytest.raises(UnsupportedError, match=r"a single causal pass has none.*'recursive'"):
        attention(SMALL["sort_lsh"])(*tensors(), is_causal=True)


def test_a_sample_without_a_mask_is_refused() -> None:
    query, key, value = tensors()
    draw = BY_BLOCKS.draws(query, key, value, num_samples=4)
    assert draw is not None
    prefixes = torch.tensor([30, 70])
    for ask in (
        lambda: BY_BLOCKS.sample(query, key, value, num_samples=4),
        lambda: BY_BLOCKS.sample_prefixes(query, key, value, num_samples=4, prefixes=prefixes),
        lambda: draw(None),
    ):
        with pytest.raises(UnsupportedError, match="was asked for a sample without one"):
            ask()
    assert BY_BLOCKS.sample_rectangles(
        query, key, value, num_samples=4, rectangles=((8, 16, 0, 8),)
    ) is None  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("is_causal", [False, True])
def test_it_compiles_to_one_graph(is_causal: bool) -> None:
    chosen = attention(
        SMALL["sort_lsh"], backend="torch", causal="recursive", min_seq_len=20 if is_causal else 0
    )
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: chosen(*x, is_causal=is_causal), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*tensors()), chosen(*tensors(), is_causal=is_causal))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sort_lsh", "pca_tree", "kmeans"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_triton_backend_attends_by_the_same_sample(name: str, is_causal: bool) -> None:
    """One mask and one sample for both backends: the same seed on the same device."""
    inputs = [x.cuda() for x in tensors(90)]
    outs = [
        attention(
            SMALL[name], backend=backend, causal="recursive", min_seq_len=12 if is_causal else 0
        )(*inputs, is_causal=is_causal)
        for backend in ("torch", "triton")
    ]
    torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-3)
