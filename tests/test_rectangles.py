"""The rectangles of the causal recursion tile the strictly lower block triangle."""

from __future__ import annotations

import pytest
import torch

from hyperframe.rectangles import (
    causal_levels,
    even_runs,
    leaf_size,
    level_rectangles,
    odd_runs,
)


def cover(length: int, leaf: int) -> torch.Tensor:
    """How often each (query, key) pair lies in a leaf or in a rectangle."""
    counts = torch.zeros(length, length, dtype=torch.int64)
    for start in range(0, length, leaf):
        stop = min(start + leaf, length)
        counts[start:stop, start:stop] += torch.ones(stop - start, stop - start).long().tril()
    for level in causal_levels(length, leaf):
        size = level.size
        for number in range(level.full + (level.ragged > 0)):
            start = 2 * size * number
            rows = size if number < level.full else level.ragged
            counts[start + size : start + size + rows, start : start + size] += 1
    return counts


@pytest.mark.parametrize("longest", [1, 2, 3, 7, 16])
def test_leaves_and_rectangles_cover_the_lower_triangle_exactly_once(longest: int) -> None:
    for length in range(1, 50):
        counts = cover(length, leaf_size(length, longest))
        assert torch.equal(counts, torch.ones_like(counts).tril()), length


@pytest.mark.parametrize("length", [63, 100, 257])
def test_any_leaf_length_covers_too(length: int) -> None:
    for leaf in (1, 5, 31, 64, length - 1, length, length + 1):
        counts = cover(length, leaf)
        assert torch.equal(counts, torch.ones_like(counts).tril()), leaf


# torch's own: its compiler makes an instance of the function to trace it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_levels_of_a_length_that_the_compiler_does_not_know_are_part_of_the_graph() -> None:
    def count(x: torch.Tensor) -> torch.Tensor:
        levels = causal_levels(x.shape[0], 3)
        return x * sum(level.full for level in levels) + sum(level.ragged for level in levels)

    torch._dynamo.reset()
    compiled = torch.compile(count, fullgraph=True, dynamic=True, backend="eager")
    for length in (10, 23):
        x = torch.ones(length)
        assert torch.equal(compiled(x), count(x))


@pytest.mark.parametrize("length", [1, 10, 23, 64, 97])
@pytest.mark.parametrize("leaf", [1, 3, 8])
def test_the_rectangles_of_a_level_are_its_odd_runs_and_the_even_runs_before_them(
    length: int, leaf: int
) -> None:
    for level in causal_levels(length, leaf):
        rectangles = level_rectangles(level, length)
        assert len(rectangles) == level.full + (level.ragged > 0)
        runs = torch.arange(length).split(level.size)
        expected = [
            (int(odd[0]), int(odd[-1]) + 1, int(even[0]), int(even[-1]) + 1)
            for even, odd in zip(runs[::2], runs[1::2], strict=False)
        ]
        assert list(rectangles) == expected
        cut = rectangles[-1][1] - rectangles[-1][0]
        assert cut == (level.ragged or level.size)


@pytest.mark.parametrize("longest", [1, 3, 8, 100])
def test_leaves_are_a_power_of_two_in_number_and_none_is_too_long(longest: int) -> None:
    for length in range(1, 70):
        leaf = leaf_size(length, longest)
        assert 1 <= leaf <= max(1, min(longest, length))
        halvings = 0
        while -(-length // 2**halvings) > leaf:
            halvings += 1
        assert -(-length // 2**halvings) == leaf
        # one halving less would be too long
        assert halvings == 0 or -(-length // 2 ** (halvings - 1)) > longest


def test_runs_are_the_query_and_key_sides_of_whole_rectangles() -> None:
    positions = torch.arange(23).view(1, 1, 23, 1).expand(2, 3, -1, 1)
    for level in causal_levels(23, 3):
        if not level.full:
            continue
        queries, keys = odd_runs(positions, level), even_runs(positions, level)
        assert queries.shape == keys.shape == (2 * level.full, 3, level.size, 1)
        for number in range(level.full):
            first = 2 * level.size * number
            expected = torch.arange(first, first + level.size)
            assert torch.equal(keys[number, 0, :, 0], expected)
            assert torch.equal(queries[number, 0, :, 0], expected + level.size)
        # batch item 1 stands behind all rectangles of batch item 0
        assert torch.equal(queries[: level.full], queries[level.full :])
