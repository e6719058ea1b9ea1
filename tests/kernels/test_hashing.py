"""Codes and orders against their plain definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.errors import ArgumentError
from hyperframe.kernels.hashing import HashOrders, hash_orders


def inputs(
    batch: int = 2, heads: int = 4, key_heads: int = 2, num_queries: int = 37, num_keys: int = 53,
    dim: int = 5, bits: int = 3, *, seed: int = 0, shared: bool = False,
) -> list[torch.Tensor]:  # fmt: skip
    """Small integers: every product is exact, many are ties of the threshold."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, heads, num_queries, dim), (batch, key_heads, num_keys, dim),
        (1 if shared else batch, key_heads, dim, bits), (batch, key_heads, bits),
    ]  # fmt: skip
    return [torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes]


def code_of(row: list[float], planes: list[list[float]], threshold: list[float]) -> int:
    """Definition 1 for one row, in Python numbers."""
    pattern = 0
    for j, limit in enumerate(threshold):
        product = sum(x * plane[j] for x, plane in zip(row, planes, strict=True))
        pattern += (product > limit) << j
    rank = 0
    while pattern:
        rank, pattern = rank ^ pattern, pattern >> 1
    return rank


def plain_order(codes: list[int], run: int, parity: int | None = None) -> list[int]:
    if parity is not None:  # the runs of the other parity are not sorted
        codes = [code if row // run % 2 == parity else 0 for row, code in enumerate(codes)]
    return sorted(range(len(codes)), key=lambda row: (row // run, codes[row]))  # stable


def check(found: HashOrders, q: torch.Tensor, k: torch.Tensor, projection: torch.Tensor,
          threshold: torch.Tensor | None, runs: tuple[int, ...], *,
          alternate: bool = False) -> None:  # fmt: skip
    odd, even = (1, 0) if alternate else (None, None)
    batch, heads, key_heads, bits = *q.shape[:2], k.shape[1], projection.shape[-1]
    projection = projection.expand(batch, -1, -1, -1)
    zeros = [0.0] * bits
    for b in range(batch):
        for h in range(heads):
            planes = projection[b, h // (heads // key_heads)].tolist()
            codes = [code_of(row, planes, zeros) for row in q[b, h].tolist()]
            for level, run in enumerate(runs):
                assert found.query_order[level, b, h].tolist() == plain_order(codes, run, odd)
        for h in range(key_heads):
            limit = zeros if threshold is None else threshold[b, h].tolist()
            codes = [code_of(row, projection[b, h].tolist(), limit) for row in k[b, h].tolist()]
            for level, run in enumerate(runs):
                order = plain_order(codes, run, even)
                assert found.key_order[level, b, h].tolist() == order
                assert [order[place] for place in found.key_rank[level, b, h]] == list(
                    range(len(order))
                )


@given(
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 4), st.integers(1, 6)),
    st.lists(st.integers(1, 25), max_size=3), st.booleans(), st.booleans(), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_rows_are_sorted_by_code_and_position_inside_runs(
    heads: tuple[int, int, int], sizes: tuple[int, int, int, int], runs: list[int],
    shared: bool, has_threshold: bool, alternate: bool, seed: int,
) -> None:  # fmt: skip
    batch, key_heads, group = heads
    q, k, projection, threshold = inputs(
        batch, key_heads * group, key_heads, *sizes, seed=seed, shared=shared
    )
    given_threshold = threshold if has_threshold else None
    found = hash_orders(
        q, k, projection, runs=tuple(runs), key_threshold=given_threshold, alternate=alternate
    )
    assert all(tensor.dtype == torch.int32 for tensor in found)
    assert found.query_order.shape == (len(runs), *q.shape[:3])
    assert found.key_order.shape == found.key_rank.shape == (len(runs), *k.shape[:3])
    check(found, q, k, projection, given_threshold, tuple(runs), alternate=alternate)


@pytest.mark.parametrize("bits", [1, 8, 15, 16, 31, 40, 60, 62])
def test_codes_of_any_length_fit_whatever_the_number_of_runs(bits: int) -> None:
    q, k, projection, threshold = inputs(1, 2, 1, 37, 53, 40, bits)
    runs = (53, 10, 3, 1)
    found = hash_orders(q, k, projection, runs=runs, key_threshold=threshold)
    check(found, q, k, projection, threshold, runs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_strides_and_gradients_do_not_matter(dtype: torch.dtype) -> None:
    q, k, projection, threshold = inputs()
    expected = hash_orders(q, k, projection, runs=(20, 53), key_threshold=threshold)
    q, k = (
        torch.nn.functional.pad(x.to(dtype).transpose(1, 2), (0, 3))[..., :-3].transpose(1, 2)
        for x in (q, k)
    )
    found = hash_orders(
        q.requires_grad_(), k.mT.contiguous().mT.requires_grad_(), projection.requires_grad_(),
        runs=(20, 53), key_threshold=threshold,
    )  # fmt: skip
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad


def test_autocast_does_not_change_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, projection = (
        torch.randn(shape, generator=generator)
        for shape in [(1, 2, 400, 16), (1, 2, 400, 16), (1, 2, 16, 7)]
    )
    expected = hash_orders(q, k, projection, runs=(400,))
    with torch.autocast("cpu", torch.bfloat16):
        found = hash_orders(q, k, projection, runs=(400,))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_operator_keeps_the_rules_of_torch() -> None:
    q, k, projection, threshold = inputs()
    for limit in (None, threshold):
        torch.library.opcheck(
            torch.ops.hyperframe.hash_orders.default, (q, k, projection, limit, [20, 53], False)
        )


def test_it_compiles_into_one_graph() -> None:
    q, k, projection, threshold = inputs()

    def sort(q: torch.Tensor, k: torch.Tensor) -> HashOrders:
        runs = (k.shape[2], 20)
        return hash_orders(q, k, projection, runs=runs, key_threshold=threshold)

    compiled = torch.compile(sort, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (53, 41):
        found, expected = compiled(q, k[:, :, :length]), sort(q, k[:, :, :length])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("bits", [0, 63])
def test_a_code_that_does_not_fit_is_refused(bits: int) -> None:
    q, k, _, _ = inputs()
    with pytest.raises(ArgumentError, match=f"{bits} projections do not give a 64-bit code"):
        hash_orders(q, k, torch.zeros(1, 2, 5, bits), runs=(8,))


def test_a_run_without_rows_is_refused() -> None:
    q, k, projection, _ = inputs()
    with pytest.raises(ArgumentError, match=r"runs=\(8, 0\) holds a size below 1"):
        hash_orders(q, k, projection, runs=(8, 0))
