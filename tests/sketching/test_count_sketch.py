"""CountSketch: the map written down as a matrix, linearity, and the bounds of its estimates."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.sketching import count_sketch
from hyperframe.sketching.count_sketch import BRANCHING, CountSketch, level_sizes, sketch_size

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(num_rows: int, width: int = 16, repetitions: int = 3, seed: int = 0) -> CountSketch:
    return CountSketch.draw(
        2, num_rows=num_rows, width=width, repetitions=repetitions, device=CPU,
        generator=generator(seed),
    )  # fmt: skip


def matrices(drawn: CountSketch) -> list[torch.Tensor]:
    """The map by its definition, a matrix for every level: `[heads, repetitions, buckets, n]`."""
    found = []
    for level, nodes in enumerate(drawn.levels):
        buckets = nodes if level == 0 else drawn.width
        matrix = torch.zeros(2, drawn.repetitions, buckets, drawn.num_rows, dtype=torch.float64)
        below = BRANCHING ** (len(drawn.levels) - 1 - level)
        for repetition in range(drawn.repetitions):
            signs = drawn.signs(repetition, torch.float64)
            for head in range(2):
                for row in range(drawn.num_rows):
                    bucket = node = row // below
                    if level:
                        order = drawn.orders[level - 1][head, repetition]
                        members = len(order) // (drawn.width // BRANCHING)
                        place = int((order == node // BRANCHING).nonzero())
                        bucket = place // members * BRANCHING + node % BRANCHING
                    matrix[head, repetition, bucket, row] = signs[head, row]
        found.append(matrix)
    return found


@pytest.mark.parametrize("num_rows", [1, 7, 16, 17, 129, 400])
def test_sketches_are_those_of_the_definition(num_rows: int) -> None:
    drawn = draw(num_rows)
    x = torch.randn(2, num_rows, 3, generator=generator(1), dtype=torch.float64)
    sketches = drawn.apply(x)
    expected = [torch.einsum("hrbn,hnm->hrbm", matrix, x) for matrix in matrices(drawn)]
    assert len(sketches) == len(expected) == len(drawn.orders) + 1
    for sketch, by_hand in zip(sketches, expected, strict=True):
        torch.testing.assert_close(sketch[..., : by_hand.shape[2], :], by_hand)
    assert sum(sketch[0, :, :, 0].numel() for sketch in sketches) == sketch_size(num_rows, 16, 3)


@given(
    num_rows=st.integers(1, 300), cut=st.integers(0, 300), width=st.sampled_from([8, 16, 40]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_sketches_are_linear_and_those_of_parts_merge(
    num_rows: int, cut: int, width: int, seed: int
) -> None:
    drawn = draw(num_rows, width, seed=seed)
    x, y = torch.randn(2, 2, num_rows, 2, generator=generator(seed), dtype=torch.float64).unbind()
    for both, one, other in zip(
        drawn.apply(2 * x + y), drawn.apply(x), drawn.apply(y), strict=True
    ):
        torch.testing.assert_close(both, 2 * one + other)
    first, last = x.clone(), x.clone()
    first[:, cut:], last[:, :cut] = 0, 0
    for whole, part, rest in zip(
        drawn.apply(x), drawn.apply(first), drawn.apply(last), strict=True
    ):
        torch.testing.assert_close(whole, part + rest)


@given(num_rows=st.integers(1, 20_000), width=st.integers(1, 60))
def test_levels_grow_by_the_branching_down_to_all_rows(num_rows: int, width: int) -> None:
    sizes = level_sizes(num_rows, BRANCHING * width)
    assert sizes[0] <= BRANCHING * width
    assert all(BRANCHING * above == below for above, below in pairwise(sizes))
    assert num_rows <= sizes[-1] < num_rows + BRANCHING ** (len(sizes) - 1)
    if len(sizes) > 1:
        assert sizes[0] * BRANCHING > BRANCHING * width


def test_every_node_is_in_one_block_and_blocks_are_full_alike() -> None:
    drawn = draw(2000, width=64, repetitions=4)
    for level, order in enumerate(drawn.orders):
        nodes, blocks = drawn.levels[level], drawn.blocks(level)
        members = order.shape[-1] // 8
        assert blocks.shape == (2, 4, nodes)
        for head in range(2):
            for repetition in range(4):
                counts = blocks[head, repetition].bincount(minlength=8)
                assert counts.max() <= members
                held = order[head, repetition].view(8, members)
                for block in range(8):
                    own = held[block][held[block] < nodes].sort().values
                    expected = (blocks[head, repetition] == block).nonzero().flatten()
                    assert torch.equal(own, expected)


def test_heads_and_repetitions_are_drawn_apart() -> None:
    drawn = draw(1000, repetitions=4)
    signs = torch.stack([drawn.signs(r, torch.float64) for r in range(4)], dim=1).flatten(0, 1)
    assert len({tuple(row.tolist()) for row in signs}) == 8
    assert len({tuple(row.tolist()) for row in drawn.orders[-1].flatten(0, 1)}) == 8


def test_a_few_heads_at_a_time_give_the_same_sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, x = draw(300), torch.randn(2, 300, 3, generator=generator(1))
    expected = drawn.apply(x)
    monkeypatch.setattr(count_sketch, "_CHUNK_BYTES", 1)
    for found, whole in zip(drawn.apply(x), expected, strict=True):
        assert torch.equal(found, whole)


@pytest.mark.statistical
def test_point_queries_err_no_more_than_the_variance_allows() -> None:
    # one repetition errs by more than sqrt(8 E b / w) with probability 1/8 at most (Chebyshev),
    # where E is the energy of the other rows that are the same child of their parents; the median
    # of 15 does only if 8 of them do: 6435 / 8^8 at most, so 0.46 of 1,200 estimates are expected
    # to fail, and more than 45 do in less than one of a hundred draws (Markov)
    num_rows, width = 600, 64
    drawn = draw(num_rows, width, repetitions=15, seed=5)
    x = torch.randn(2, num_rows, 1, generator=generator(2), dtype=torch.float64)
    x[:, 77] = 30
    found = drawn.estimate(drawn.apply(x)[-1], torch.arange(num_rows).expand(2, -1))
    failed = 0
    for child in range(BRANCHING):
        same = slice(child, num_rows, BRANCHING)
        energy = x[:, same].square().sum(dim=1, keepdim=True) - x[:, same].square()
        bound = (8 * energy * BRANCHING / width).sqrt()
        failed += int(((found - x)[:, same].abs() > bound).sum())
    assert failed <= 45


def test_without_hashed_levels_point_queries_are_exact() -> None:
    drawn = draw(40, width=64)
    x = torch.randn(2, 40, 3, generator=generator(1), dtype=torch.float64)
    row = torch.arange(40).expand(2, -1)
    torch.testing.assert_close(drawn.estimate(drawn.apply(x)[-1], row), x)


@pytest.mark.statistical
def test_a_bucket_holds_its_rows_energy_half_of_the_time_whatever_else_is_there() -> None:
    # two equal rows below one node: their sum is as large as one of them in half of 40,000 draws
    # of signs (standard deviation 100; six of them: a false alarm once in 10^9)
    drawn = CountSketch.draw(
        20_000, num_rows=9, width=8, repetitions=2, device=CPU, generator=generator(3)
    )
    x = torch.zeros(9, 1, dtype=torch.float64)
    x[:2] = 1
    top, lowest = drawn.apply(x.expand(20_000, -1, -1))
    assert abs(int((top[:, :, 0].square() >= 1).sum()) - 20_000) <= 600
    # below, they are apart
    assert bool((lowest[:, :, :2].square() == 1).all())
