"""Centroids: every key counted once, causality, gradients, exact where groups are single keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe import HyperAttention, samplers
from hyperframe.builder import build_plans
from hyperframe.clustering.dyadic import group_counts
from hyperframe.detectors import create
from hyperframe.errors import UnsupportedError
from hyperframe.plan import TilePlan
from hyperframe.samplers.centroid import Centroid
from hyperframe.testing import dense_attention


def tensors(
    num_queries: int, num_keys: int, *, heads: int = 4, key_heads: int = 2, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads, num_queries, 8, generator=g, dtype=torch.float64)
    key, value = (
        torch.randn(2, key_heads, num_keys, 8, generator=g, dtype=torch.float64) for _ in range(2)
    )
    return query, key, value


def plan_of(
    detector: str, num_queries: int, num_keys: int, *, num_samples: int, is_causal: bool,
    unit: int = 4,
) -> TilePlan:  # fmt: skip
    query, key, value = tensors(num_queries, num_keys)
    mask = create(detector).find(
        query, key, is_causal=is_causal, generator=torch.Generator().manual_seed(0)
    )
    draw = Centroid(unit=unit).draws(query, key, value, num_samples=num_samples)
    (plan,) = build_plans(mask, key_heads=2, draw=draw)
    assert isinstance(plan, TilePlan)
    return plan.validate()


DETECTORS = [
    "sliding_window(width=3, num_sinks=2)", "heavy_columns(num_columns=4)",
    "sliding_window(width=5) | vertical_slash(num_columns=4, num_diagonals=16, tile_size=16)",
    "pca_tree(tile_size=8, chunk_size=16, num_leaves=2)",
]  # fmt: skip


@given(
    detector=st.sampled_from(DETECTORS), num_queries=st.integers(2, 60),
    more_keys=st.integers(-9, 40), num_samples=st.integers(1, 40), is_causal=st.booleans(),
    unit=st.sampled_from([4, 16, 64]),
)  # fmt: skip
def test_exact_keys_and_groups_count_every_visible_key_once(
    detector: str, num_queries: int, more_keys: int, num_samples: int, is_causal: bool, unit: int
) -> None:
    num_keys = max(1, num_queries + more_keys)
    plan = plan_of(
        detector, num_queries, num_keys, num_samples=num_samples, is_causal=is_causal, unit=unit
    )
    counted = plan.to_dense().sum(dim=-1)
    seen = torch.full((num_queries,), num_keys)
    if is_causal:
        seen = (torch.arange(num_queries) + 1 + num_keys - num_queries).clamp(min=0)
    torch.testing.assert_close(counted, seen.double().expand_as(counted))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_queries", [40, 57])
def test_groups_of_single_keys_are_exact_attention(num_queries: int, is_causal: bool) -> None:
    query, key, value = tensors(num_queries, 57)
    attention = HyperAttention(
        detector="sliding_window(width=2)", sampler="centroid(unit=4)", num_samples=64,
        min_seq_len=0, backend="torch",
    )  # fmt: skip
    out = attention(query, key, value, is_causal=is_causal)
    expected = dense_attention(query, key, value, is_causal=is_causal)[0]
    torch.testing.assert_close(out, expected)


def test_a_held_key_leaves_its_group() -> None:
    # two groups of equal keys; one key is held exactly: the group counts the other three
    key = torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0, 5.0, 5.0, 5.0]).view(1, 1, 8, 1)
    query = torch.ones(1, 1, 8, 1)
    mask = create("heavy_columns(num_columns=1)").find(query, key)
    draw = Centroid().draws(query, key, key, num_samples=2)
    (plan,) = build_plans(mask, key_heads=1, draw=draw)
    assert isinstance(plan, TilePlan)
    held = plan.to_dense()[0, 0, 0]
    assert sorted(held[8:].tolist()) == pytest.approx([3.0, 4.0])
    assert held[:8].sum() == 1
    assert plan.summary_key is not None
    assert sorted(plan.summary_key.flatten().tolist()) == [0.0, 5.0]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_similar_keys_by_their_mean_are_closer_than_samples(backend: str) -> None:
    g = torch.Generator().manual_seed(1)
    centres = 2 * torch.randn(1, 1, 16, 8, generator=g)
    key = (centres.repeat_interleave(32, 2) + 0.05 * torch.randn(1, 1, 512, 8, generator=g))[
        :, :, torch.randperm(512, generator=g)
    ]
    query, value = torch.randn(1, 1, 512, 8, generator=g), torch.randn(1, 1, 512, 8, generator=g)
    expected = dense_attention(query, key, value)[0]

    def error(sampler: str, **options: str) -> float:
        attention = HyperAttention(
            detector="sliding_window(width=4)", sampler=sampler, num_samples=64, min_seq_len=0,
            backend=backend, **options,
        )  # fmt: skip
        return float((attention(query, key, value) - expected).norm() / expected.norm())

    assert error("centroid") < 0.25 * error("uniform")
    assert error("centroid", causal="recursive") < 0.25 * error("uniform")


@given(position=st.integers(1, 99), strict=st.booleans(), seed=st.integers(0, 9))
def test_no_later_key_or_value_moves_a_row(position: int, strict: bool, seed: int) -> None:
    query, key, value = tensors(100, 100, seed=seed)
    attention = HyperAttention(
        detector="sliding_window(width=3)",
        sampler=Centroid(metric="key" if strict else "query", unit=8), num_samples=16,
        min_seq_len=0, backend="torch", strict_causal=strict,
    )  # fmt: skip
    before = attention(query, key, value, is_causal=True)
    key, value = key.clone(), value.clone()
    key[:, :, position:] += 3
    value[:, :, position:] -= 5
    if strict:
        query = query.clone()
        query[:, :, position:] *= -2
    after = attention(query, key, value, is_causal=True)
    assert torch.equal(before[:, :, :position], after[:, :, :position])


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_gradient_flows_through_the_means(is_causal: bool) -> None:
    query, key, value = (x[:1, :, :20, :3] for x in tensors(20, 20))
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    attention = HyperAttention(
        detector="sliding_window(width=2)", sampler=Centroid(metric="key", unit=4), num_samples=4,
        min_seq_len=0, backend="torch",
    )  # fmt: skip
    # the groups depend on the keys' order along directions, which small steps do not change
    assert torch.autograd.gradcheck(
        lambda *x: attention(*x, is_causal=is_causal), inputs, eps=1e-7, atol=1e-5
    )


def test_a_sample_is_one_key_of_each_group_with_its_size() -> None:
    _, key, value = tensors(10, 37)
    query = torch.randn(2, 4, 10, 8, dtype=torch.float64)
    sample = samplers.create("centroid").sample(
        query, key, value, num_samples=5, generator=torch.Generator().manual_seed(0)
    )
    assert sample.log_weight.exp().sum(dim=-1).allclose(torch.tensor(37.0))
    assert sample.summaries is None


def test_hash_blocks_are_refused_by_name() -> None:
    query, key, value = tensors(64, 64)
    for causal in ("single_pass", "recursive"):
        attention = HyperAttention(
            detector="sort_lsh(block_size=8)", sampler="centroid", num_samples=8, min_seq_len=8,
            causal=causal,
        )  # fmt: skip
        with pytest.raises(UnsupportedError, match="centroid"):
            attention(query, key, value, is_causal=True)
    with pytest.raises(UnsupportedError, match="later"):
        HyperAttention(sampler="centroid", strict_causal=True)


@given(levels=st.integers(0, 12), unit=st.integers(1, 100), budget=st.integers(0, 400))
def test_group_counts_keep_the_budget_and_divide_the_runs(
    levels: int, unit: int, budget: int
) -> None:
    counts = group_counts(levels, unit, budget)
    assert len(counts) == levels
    assert sum(counts) <= max(budget, levels)
    assert all((unit << level) % count == 0 for level, count in enumerate(counts))
