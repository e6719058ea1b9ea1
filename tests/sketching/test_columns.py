"""Columns of energy 1: energies against the dense product, zero columns, and values of any size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.sketching import columns
from hyperframe.sketching.columns import ColumnProblem


def tensors(
    seed: int = 0, *, num_queries: int = 20, num_keys: int = 17, dim: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, num_queries, dim, generator=g, dtype=torch.float64)
    return query + 2, torch.randn(2, 2, num_keys, dim, generator=g, dtype=torch.float64)


def products(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """`[heads, n_k, n_q]`, in float64."""
    group = query.shape[1] // key.shape[1]
    key = key.double().repeat_interleave(group, dim=1)
    return (key @ query.double().transpose(-1, -2)).flatten(0, 1)


def logits(problem: ColumnProblem) -> torch.Tensor:
    return problem.key @ problem.query.transpose(-1, -2)


@given(
    num_queries=st.integers(1, 30), num_keys=st.integers(1, 30), dim=st.integers(1, 8),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_columns_have_energy_one_and_their_norms_lead_back(
    num_queries: int, num_keys: int, dim: int, seed: int
) -> None:
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys, dim=dim)
    problem = ColumnProblem.of(query, key)
    found = logits(problem)
    torch.testing.assert_close(
        found.square().sum(dim=-1), torch.ones(8, num_keys, dtype=torch.float64)
    )
    back = found * problem.norm.unsqueeze(-1)
    factor = query.abs().flatten(2).amax(dim=-1).flatten().view(-1, 1, 1)
    torch.testing.assert_close(back * factor, products(query, key))


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = tensors()
    expected = ColumnProblem.of(query, key)
    monkeypatch.setattr(columns, "_CHUNK_BYTES", 1)
    for found, whole in zip(ColumnProblem.of(query, key), expected, strict=True):
        torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_zero_and_change_no_other(bad: float) -> None:
    query, key = tensors()
    zeroed_query, zeroed_key = query.clone(), key.clone()
    zeroed_query[0, 1, 4], zeroed_key[1, 0, 3] = 0, 0
    query[0, 1, 4, 2], key[1, 0, 3, 0] = bad, bad
    expected = ColumnProblem.of(zeroed_query, zeroed_key)
    for found, whole in zip(ColumnProblem.of(query, key), expected, strict=True):
        assert torch.equal(found, whole)
    assert (expected.key[4:6, 3] == 0).all()
    assert (expected.norm[4:6, 3] == 0).all()


def test_columns_without_energy_are_zero() -> None:
    query, key = tensors(dim=4)
    query[..., 3], key[:, :, 2, :3] = 0, 0  # a key in the null space of the queries
    key[:, :, 5] = 0
    problem = ColumnProblem.of(query.float(), key.float())
    assert (problem.key[:, [2, 5]] == 0).all()
    energy = logits(problem).square().sum(dim=-1)
    others = [j for j in range(17) if j not in (2, 5)]
    torch.testing.assert_close(energy[:, others], torch.ones(8, 15))
    assert (ColumnProblem.of(torch.zeros_like(query), key).key == 0).all()


@pytest.mark.parametrize("size", [1e-25, 1e30])
def test_no_square_overflows_or_vanishes(size: float) -> None:
    query, key = (x.float() for x in tensors())
    problem = ColumnProblem.of(query, key)
    scaled = ColumnProblem.of(query * size, key * size)
    torch.testing.assert_close(logits(scaled), logits(problem))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    query, key = (x.to(dtype) for x in tensors())
    found = ColumnProblem.of(query, key)
    expected = ColumnProblem.of(query.float(), key.float())
    for tensor, whole in zip(found, expected, strict=True):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, whole)
