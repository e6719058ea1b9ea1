"""Which leaves a tile holds: voters, scores by mean keys, and lists."""

from __future__ import annotations

import pytest
import torch

from hyperframe.clustering import equal_runs, gather_runs, run_means
from hyperframe.detectors.leaves import (
    Leaves,
    SeenLeaves,
    best_leaves,
    leaf_scores,
    lists_of_leaves,
    tile_voters,
)
from hyperframe.kernels import leaves as module


def tensors(num_queries: int = 40, num_keys: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, num_queries, 5, generator=g, dtype=torch.float64)
    key = torch.randn(2, 2, num_keys, 5, generator=g, dtype=torch.float64)
    return query, key


def leaves_of(key: torch.Tensor, count: int) -> Leaves:
    """Equal runs of a random order of the keys."""
    order = torch.rand(key.shape[:3], generator=torch.Generator().manual_seed(1)).argsort(dim=-1)
    runs = equal_runs(key.shape[2], count, key.device)
    index = gather_runs(order, runs)
    return Leaves(index, runs.sizes, run_means(key, index, runs.sizes), runs.is_even)


def some_seen(num_tiles: int) -> SeenLeaves:
    """Of 7 leaves, 4 far ones and 3 near ones; no tile but the first one sees the same."""
    tile = torch.arange(num_tiles)
    near = torch.stack([4 + tile % 3, 4 + (tile + 1) % 3], dim=1)
    is_near = torch.stack([tile % 2 > 0, tile % 3 > 0], dim=1)
    return SeenLeaves(4, tile.clamp(max=4), near, is_near)


def seen_sets(seen: SeenLeaves) -> list[list[int]]:
    return [
        [*range(int(far)), *near[is_near].tolist()]
        for far, near, is_near in zip(seen.far, seen.near, seen.is_near, strict=True)
    ]


@pytest.mark.parametrize("num_means", [1, 3, 8, 100])
def test_voters_are_the_means_of_runs_of_the_tile(num_means: int) -> None:
    query, _ = tensors()
    voters, votes = tile_voters(query, tile_size=16, num_means=num_means)
    size = -(-16 // min(num_means, 16))
    for tile in range(3):
        rows = query[:, :, 16 * tile : 16 * tile + 16]
        runs = rows.split(size, dim=2)
        assert votes[tile].sum() == len(runs)
        assert votes[tile, : len(runs)].all()
        expected = torch.stack([run.mean(dim=2) for run in runs], dim=2)
        torch.testing.assert_close(voters[:, :, tile, : len(runs)], expected)


@pytest.mark.parametrize("num_earlier", [None, 1, 16, 30])
def test_strict_voters_come_before_the_tile_or_are_its_first_row(num_earlier: int | None) -> None:
    query, _ = tensors()
    earlier = None if num_earlier is None else tensors(num_earlier)[0] + 2.0
    voters, votes = tile_voters(
        query, tile_size=16, num_means=2, strict=True, earlier_query=earlier
    )
    assert torch.equal(voters[:, :, :, -1], query[:, :, ::16])
    assert votes[:, -1].all()
    torch.testing.assert_close(voters[:, :, 2, 0], query[:, :, 16:24].mean(dim=2))
    torch.testing.assert_close(voters[:, :, 2, 1], query[:, :, 24:32].mean(dim=2))
    assert votes[1:].all()
    before = query[:, :, :0] if earlier is None else earlier[:, :, -16:]
    for number, run in enumerate((before[:, :, :8], before[:, :, 8:])):
        assert bool(votes[0, number]) == (run.shape[2] > 0)
        if run.shape[2]:
            torch.testing.assert_close(voters[:, :, 0, number], run.mean(dim=2))


@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_scores_are_the_mass_of_leaves_of_equal_keys(scale: float) -> None:
    """By definition: every key is replaced by the mean of its leaf, and attended to exactly."""
    query, key = tensors(38)  # the last tile has no third run
    leaves, seen = leaves_of(key, 7), some_seen(5)
    voters, votes = tile_voters(query, tile_size=8, num_means=3)
    scores = leaf_scores(voters, votes, leaves, seen, scale=scale)
    for b in range(2):
        for h in range(4):
            for tile, visible in enumerate(seen_sets(seen)):
                named = [*range(4), *seen.near[tile].tolist()]
                expected = torch.full((6,), float("-inf"), dtype=torch.float64)
                if visible:
                    logits = scale * voters[b, h, tile] @ leaves.mean[b, h // 2, visible].mT
                    mass = torch.softmax(logits + leaves.sizes[visible].log(), dim=-1)
                    for leaf, value in zip(visible, mass[votes[tile]].sum(dim=0), strict=True):
                        slot = named.index(leaf) if leaf < 4 else 4 + named[4:].index(leaf)
                        expected[slot] = value.log()
                torch.testing.assert_close(scores[b, h, tile], expected)


@pytest.mark.parametrize("num_leaves", [1, 2, 5, 9])
def test_the_best_leaves_are_those_of_the_best_scores_and_lists_hold_their_keys(
    num_leaves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = tensors(38)  # the last tile has no third run
    leaves, seen = leaves_of(key, 7), some_seen(5)  # leaves of 4 and 5 keys
    voters, votes = tile_voters(query, tile_size=8, num_means=3)
    chosen = best_leaves(voters, votes, leaves, seen, scale=1.0, num_leaves=num_leaves)
    scores = leaf_scores(voters, votes, leaves, seen, scale=1.0)
    index, count = lists_of_leaves(chosen, leaves, seen)
    assert index.dtype == torch.int32
    for b in range(2):
        for h in range(4):
            for tile, visible in enumerate(seen_sets(seen)):
                by_leaf = {
                    leaf: float(scores[b, h, tile, slot])
                    for slot, leaf in enumerate([*range(4), *seen.near[tile].tolist()])
                    if leaf in visible
                }
                best = sorted(by_leaf, key=lambda leaf: -by_leaf[leaf])[:num_leaves]
                assert chosen[b, h, tile, : len(best)].tolist() == best
                keys = [
                    k
                    for leaf in best
                    for k in leaves.keys[b, h // 2, leaf, : leaves.sizes[leaf]].tolist()
                ]
                assert index[b, h, tile, : count[b, h, tile]].tolist() == keys
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    parts = best_leaves(voters, votes, leaves, seen, scale=1.0, num_leaves=num_leaves)
    assert torch.equal(chosen[:, :, 4:], parts[:, :, 4:])
    assert torch.equal(index, lists_of_leaves(parts, leaves, seen)[0])


def test_a_leaf_without_mass_is_still_better_than_one_that_is_not_seen() -> None:
    query, key = tensors(8, 8)
    leaves = leaves_of(key, 8)
    far, none = torch.tensor([7]), torch.zeros(1, 0, dtype=torch.int64)
    seen = SeenLeaves(8, far, none, none.bool())
    # logits of thousands: all masses but one round to 0
    voters, votes = tile_voters(9999 * query, tile_size=8, num_means=2)
    chosen = best_leaves(voters, votes, leaves, seen, scale=1.0, num_leaves=7)
    assert torch.equal(chosen.sort(dim=-1).values, torch.arange(7).expand(2, 4, 1, 7))
