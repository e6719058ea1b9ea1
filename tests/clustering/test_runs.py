"""Equal runs cover everything once, and differ by one at most."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.clustering import equal_runs, gather_runs, num_equal_runs, run_means

CPU = torch.device("cpu")


@given(length=st.integers(1, 60), longest=st.integers(1, 70))
def test_runs_cover_every_place_once_and_differ_by_one_at_most(length: int, longest: int) -> None:
    runs = equal_runs(length, num_equal_runs(length, longest), CPU)
    assert runs.longest == runs.sizes.max() <= longest
    assert runs.sizes.min() >= runs.longest - 1
    assert runs.is_even == bool((runs.sizes == runs.longest).all())
    places = [
        place
        for row, size in zip(runs.place.tolist(), runs.sizes.tolist(), strict=True)
        for place in row[:size]
    ]
    assert places == list(range(length))
    # no more runs than are needed
    assert -(-length // longest) == len(runs.sizes)


@given(length=st.integers(1, 40), longest=st.integers(1, 12), seed=st.integers(0, 100))
def test_means_are_those_of_the_rows_in_each_run(length: int, longest: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, length, 4, generator=g, dtype=torch.float64)
    order = torch.rand(2, 3, length, generator=g).argsort(dim=-1)
    runs = equal_runs(length, num_equal_runs(length, longest), CPU)
    index = gather_runs(order, runs)
    means = run_means(x, index, runs.sizes)
    for b in range(2):
        for h in range(3):
            start = 0
            for run, size in enumerate(runs.sizes.tolist()):
                members = order[b, h, start : start + size]
                assert torch.equal(index[b, h, run, :size], members)
                torch.testing.assert_close(means[b, h, run], x[b, h, members].mean(dim=0))
                start += size
    assert run_means(x.bfloat16(), index, runs.sizes).dtype == torch.float32
