"""Balanced trees: every point has one place, leaves are near, and clusters stay together."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hyperframe.clustering import equal_runs, gather_runs, num_equal_runs, pca_order, pca_orders


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def leaves_of(order: torch.Tensor, leaf_size: int) -> list[list[int]]:
    runs = equal_runs(len(order), num_equal_runs(len(order), leaf_size), order.device)
    index = gather_runs(order, runs).tolist()
    return [row[:size] for row, size in zip(index, runs.sizes.tolist(), strict=True)]


@given(
    length=st.integers(1, 70),
    leaf_size=st.integers(1, 80),
    dim=st.integers(1, 5),
    seed=st.integers(0, 1000),
    rounding=st.sampled_from([0.0, 1.0, 100.0]),
)
@example(length=65, leaf_size=1, dim=1, seed=0, rounding=0.0)
@example(length=64, leaf_size=8, dim=3, seed=0, rounding=100.0)
def test_every_point_has_one_place(
    length: int, leaf_size: int, dim: int, seed: int, rounding: float
) -> None:
    points = torch.randn(2, 3, length, dim, generator=generator(seed))
    if rounding:  # ties, up to all points being equal
        points = (points / rounding).round()
    order = pca_order(points, leaf_size=leaf_size)
    assert order.shape == (2, 3, length)
    assert torch.equal(order.sort(dim=-1).values, torch.arange(length).expand(2, 3, -1))


@given(length=st.integers(1, 60), leaf_size=st.integers(1, 20), seed=st.integers(0, 1000))
def test_on_a_line_leaves_are_intervals(length: int, leaf_size: int, seed: int) -> None:
    points = torch.randn(length, 1, generator=generator(seed)) * torch.tensor([3.0, 4.0])
    order = pca_order(points, leaf_size=leaf_size)
    where = points[:, 0]
    intervals = sorted(
        (float(where[leaf].min()), float(where[leaf].max())) for leaf in leaves_of(order, leaf_size)
    )
    for (_, high), (low, _) in pairwise(intervals):
        assert high <= low


@pytest.mark.parametrize("length", [64, 128, 256])
def test_the_root_splits_at_the_median_along_the_leading_direction(length: int) -> None:
    g = generator(3)
    direction = torch.nn.functional.normalize(torch.randn(8, generator=g), dim=0)
    points = 0.1 * torch.randn(length, 8, generator=g) + 5.0
    points += 4 * torch.randn(length, 1, generator=g) * direction
    order = pca_order(points, leaf_size=length // 2, num_steps=10)
    leading = torch.linalg.svd(points - points.mean(dim=0)).Vh[0]
    along = points @ leading
    below = set(along.argsort()[: length // 2].tolist())
    assert below in (set(order[: length // 2].tolist()), set(order[length // 2 :].tolist()))


@pytest.mark.parametrize("length", [96, 100, 77])
def test_equal_clusters_far_apart_are_never_mixed(length: int) -> None:
    # sizes of leaves and clusters are the same runs, so that a perfect cut exists
    g = generator(5)
    runs = equal_runs(length, 8, torch.device("cpu"))
    centres = torch.arange(8.0).unsqueeze(-1) * torch.tensor([100.0, 40.0, -20.0])
    label = torch.repeat_interleave(torch.arange(8), runs.sizes)[
        torch.randperm(length, generator=g)
    ]
    # the order of sizes along the line may be the other way round: both runs are symmetric
    points = centres[label] + torch.randn(length, 3, generator=g)
    mixed = sum(
        len({int(label[i]) for i in leaf}) - 1
        for leaf in leaves_of(pca_order(points, leaf_size=runs.longest), runs.longest)
    )
    assert mixed <= (0 if runs.is_even else 7)
    random = torch.randperm(length, generator=g)
    assert sum(len({int(label[i]) for i in leaf}) - 1 for leaf in leaves_of(random, 13)) > 20


def test_leaves_hold_points_that_are_near_one_another() -> None:
    points = torch.randn(4, 1024, 3, generator=generator(1))
    order = pca_order(points, leaf_size=16)

    def spread(order: torch.Tensor) -> float:
        leaves = points.gather(1, order.unsqueeze(-1).expand_as(points)).view(4, 64, 16, 3)
        return float((leaves - leaves.mean(dim=2, keepdim=True)).square().sum(-1).mean())

    # 64 cells in 3 dimensions are a quarter as wide as the whole
    assert spread(order) < 0.25 * spread(torch.arange(1024).expand(4, -1))


def test_trees_of_a_stack_do_not_see_one_another_and_shifts_and_scales_change_nothing() -> None:
    points = torch.randn(3, 100, 4, generator=generator(2), dtype=torch.float64)
    order = pca_order(points, leaf_size=8)
    for number in range(3):
        assert torch.equal(pca_order(points[number], leaf_size=8), order[number])
    assert torch.equal(pca_order(points + 17.0, leaf_size=8), order)
    assert torch.equal(pca_order(points * 1e90, leaf_size=8), order)


def test_building_is_deterministic_and_in_float32_at_least() -> None:
    points = torch.randn(1, 130, 4, generator=generator(2)).bfloat16()
    order = pca_order(points, leaf_size=8)
    assert torch.equal(pca_order(points.float(), leaf_size=8), order)
    assert torch.equal(pca_order(points.requires_grad_(), leaf_size=8), order)


def test_points_that_are_not_finite_are_places_like_others() -> None:
    points = torch.randn(2, 37, 3, generator=torch.Generator().manual_seed(0))
    points[0, 4] = torch.nan
    points[1, 5, 0] = torch.inf
    order = pca_order(points, leaf_size=4)
    assert torch.equal(order.sort(dim=-1).values, torch.arange(37).expand(2, -1))


@given(
    levels=st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(0, 3)), min_size=1, max_size=4
    ),
    unit=st.sampled_from([1, 3, 8]),
    seed=st.integers(0, 1000),
)
@example(levels=[(0, 1, 0), (4, 2, 3), (2, 3, 3)], unit=8, seed=0)
def test_trees_of_several_lengths_are_those_made_one_by_one(
    levels: list[tuple[int, int, int]], unit: int, seed: int
) -> None:
    g = generator(seed)
    sets, leaf_sizes = [], []
    for level, trees, depth in levels:
        length = unit << level
        sets.append(torch.randn(2, 2, trees, length, 3, generator=g, dtype=torch.float64))
        leaf_sizes.append(unit << max(0, level - depth))
    for points, leaf, order in zip(sets, leaf_sizes, pca_orders(sets, leaf_sizes), strict=True):
        assert torch.equal(order, pca_order(points, leaf_size=leaf))
