"""The best columns of rows: by definition."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.kernels.select import select_top


@given(
    length=st.integers(0, 30), count=st.integers(0, 12), values=st.integers(-1, 6),
    dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 999),
)  # fmt: skip
def test_the_columns_are_those_that_a_sort_puts_first(
    length: int, count: int, values: int, dtype: torch.dtype, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, values, (2, 3, length), generator=g).to(dtype)
    scores[torch.rand(scores.shape, generator=g) < 0.1] = float("nan")
    stop = torch.randint(0, length + 3, (3,), generator=g)
    index, best, taken = select_top(scores, stop, count=count)
    assert index.dtype == taken.dtype == torch.int32
    assert best.dtype == dtype
    for batch in range(2):
        for row in range(3):
            values_ = scores[batch, row].tolist()
            there = [at for at in range(min(length, int(stop[row]))) if values_[at] >= 0]
            expected = sorted(sorted(there, key=lambda at: -values_[at])[:count])
            assert taken[batch, row] == len(expected)
            rest = count - len(expected)
            assert index[batch, row].tolist() == expected + [length] * rest
            assert best[batch, row].tolist() == [values_[at] for at in expected] + [-1.0] * rest
