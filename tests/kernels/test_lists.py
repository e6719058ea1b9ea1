"""The best distinct keys of lists against their plain definition."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.errors import ArgumentError
from hyperframe.kernels import lists
from hyperframe.kernels.lists import best_distinct


def by_hand(
    index: list[int], weight: list[float] | None, *, limit: int, k: int, count: int, start: int,
    stop: int,
) -> list[int]:  # fmt: skip
    """Keys of one list, in Python numbers."""
    totals: dict[int, float] = {}
    for slot, key in enumerate(index[: max(0, count)]):
        mass = 0.0 if weight is None else weight[slot]
        if start <= key < min(stop, limit) and mass >= 0:
            totals[key] = totals.get(key, 0.0) + mass
    return sorted(sorted(totals, key=lambda key: (-totals[key], key))[:k])


def check(
    index: torch.Tensor, weight: torch.Tensor | None, *, limit: int, k: int,
    count: torch.Tensor | None = None, start: int = 0, stop: torch.Tensor | None = None,
    is_sorted: bool = False,
) -> None:  # fmt: skip
    kept, held = best_distinct(
        index, weight, limit=limit, k=k, count=count, start=start, stop=stop, is_sorted=is_sorted
    )
    shape = index.shape[:-1]
    assert kept.dtype == held.dtype == torch.int32
    assert kept.shape == (*shape, k)
    counts = torch.full(shape, index.shape[-1]) if count is None else count.expand(shape)
    stops = torch.full(shape, limit) if stop is None else stop.expand(shape)
    for at in product(*map(range, shape)):
        expected = by_hand(
            index[at].tolist(), None if weight is None else weight[at].tolist(), limit=limit, k=k,
            count=int(counts[at]), start=start, stop=int(stops[at]),
        )  # fmt: skip
        assert kept[at].tolist() == expected + [limit] * (k - len(expected))
        assert int(held[at]) == len(expected)


@given(
    length=st.integers(0, 40), limit=st.integers(0, 30), k=st.integers(1, 45),
    start=st.integers(0, 9), weights=st.sampled_from([None, "whole", "any"]),
    is_long=st.booleans(), cut=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_choice_is_the_one_that_is_written_down(
    length: int, limit: int, k: int, start: int, weights: str | None, is_long: bool, cut: bool,
    seed: int,
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(-2, limit + 4, (2, 3, length), generator=g)
    index = index if is_long else index.int()
    weight = None
    if weights == "whole":  # many ties
        weight = torch.randint(-1, 3, (2, 3, length), generator=g).float()
    elif weights == "any":
        weight = torch.randn((2, 3, length), generator=g, dtype=torch.float64) + 1
    count = torch.randint(0, length + 2, (2, 1), generator=g) if cut else None
    stop = torch.randint(-1, limit + 3, (3,), generator=g) if cut else None
    check(index, weight, limit=limit, k=k, count=count, start=start, stop=stop)
    check(index[0, 0], None if weight is None else weight[0, 0], limit=limit, k=k, start=start)


def test_weights_that_are_nothing_infinite_or_no_number() -> None:
    index = torch.tensor([[4, 2, 2, 6, 6, 0, 0, 8]])
    weight = torch.tensor([[0.0, -math.inf, 1.0, math.nan, -1.0, math.inf, 2.0, -0.0]])
    for k, expected in ((1, [0]), (2, [0, 2]), (3, [0, 2, 4]), (4, [0, 2, 4, 8])):
        assert best_distinct(index, weight, limit=9, k=k)[0].tolist() == [expected]
    assert int(best_distinct(index, weight, limit=9, k=7)[1]) == 4


def test_keys_beyond_31_bits_are_unused() -> None:
    index = torch.tensor([[2**32 + 5, 2**31 - 2, -(2**40), 7]])
    kept, held = best_distinct(index, limit=2**31 - 1, k=3)
    assert kept.tolist() == [[7, 2**31 - 2, 2**31 - 1]]
    assert held.tolist() == [2]


def test_chunks_of_lists_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, 20, (5, 3, 30), generator=g)
    weight = torch.rand((5, 3, 30), generator=g)
    whole = best_distinct(index, weight, limit=20, k=6)
    monkeypatch.setattr(lists, "_CHUNK_BYTES", 1)
    chunked = best_distinct(index, weight, limit=20, k=6)
    assert all(torch.equal(a, b) for a, b in zip(whole, chunked, strict=True))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_operator_keeps_the_rules_of_torch(weighted: bool) -> None:
    index = torch.randint(0, 9, (2, 3, 12))
    weight = torch.rand(2, 3, 12) if weighted else None
    count, stop = torch.tensor([5, 12, 0]), torch.tensor([[4], [9]])
    torch.library.opcheck(
        torch.ops.hyperframe.best_distinct.default, (index, weight, count, stop, 1, 9, 4, False)
    )


def test_keeping_nothing_is_refused() -> None:
    with pytest.raises(ArgumentError, match="k=0 keeps nothing"):
        best_distinct(torch.zeros(1, 3, dtype=torch.int32), limit=3, k=0)
