"""The kernel that scales keys against torch's operators; on a GPU, else interpreted."""

from __future__ import annotations

import os

import pytest
import torch

from hyperframe.sketching.columns import ColumnProblem, torch_scaled_keys

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from hyperframe.kernels.triton import columns as kernels  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
FLOOR = 1e-14


def problem(
    num_keys: int,
    dim: int,
    *,
    heads: int = 2,
    key_heads: int = 2,
    dtype: torch.dtype,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with strides, and a matrix of queries that know nothing of the last dimension."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads, 30, dim, generator=g, dtype=torch.float64)
    query[..., -1] = 0
    key = torch.randn(2, num_keys, key_heads, dim + 3, generator=g).transpose(1, 2)[..., 2:-1]
    return key.to(DEVICE, dtype), (query.mT @ query).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "num_keys, dim, heads, key_heads", [(1, 2, 1, 1), (37, 16, 4, 2), (20, 70, 3, 1)]
)
def test_keys_and_norms_are_those_of_torch(
    num_keys: int, dim: int, heads: int, key_heads: int, dtype: torch.dtype
) -> None:
    key, gram = problem(num_keys, dim, heads=heads, key_heads=key_heads, dtype=dtype)
    found = kernels.triton_scaled_keys(key, gram, FLOOR)
    for one, other in zip(found, torch_scaled_keys(key, gram, FLOOR), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=3e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_zero_keys_and_those_that_are_not_finite_or_not_seen_are_zero(bad: float) -> None:
    key, gram = problem(40, 8, dtype=torch.float32)
    key, expected = key.clone(), kernels.triton_scaled_keys(key, gram, FLOOR)
    key[0, 1, 7, 3] = bad
    key[:, :, 20] = 0
    key[:, 0, 21, :-1] = 0  # what is left is in the null space of the queries
    scaled, norm = kernels.triton_scaled_keys(key, gram, FLOOR)
    is_zero = torch.zeros(2, 2, 40, dtype=torch.bool, device=DEVICE)
    is_zero[0, 1, 7], is_zero[:, :, 20], is_zero[:, 0, 21] = True, True, True
    assert (scaled[is_zero] == 0).all()
    assert (norm[is_zero] == 0).all()
    assert torch.equal(scaled[~is_zero], expected[0][~is_zero])
    assert torch.equal(norm[~is_zero], expected[1][~is_zero])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_no_square_overflows_or_vanishes(size: float) -> None:
    key, gram = problem(19, 6, dtype=torch.float32)
    scaled, norm = kernels.triton_scaled_keys(key, gram, FLOOR)
    other, by = kernels.triton_scaled_keys(key * size, gram, FLOOR)
    torch.testing.assert_close(other, scaled, rtol=1e-5, atol=0)
    torch.testing.assert_close(by, norm * size, rtol=1e-5, atol=0)


def test_columns_have_energy_one_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    key, _ = problem(25, 12, dtype=torch.float32)
    query = torch.randn(2, 4, 33, 12, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    monkeypatch.setattr(
        "hyperframe.sketching.columns.torch_scaled_keys", kernels.triton_scaled_keys
    )
    made = ColumnProblem.of(query, key)
    energy = (made.key @ made.query.mT).square().sum(dim=-1)
    torch.testing.assert_close(energy, torch.ones_like(energy))


def test_no_keys_give_none() -> None:
    key, gram = problem(3, 4, dtype=torch.float32)
    scaled, norm = kernels.triton_scaled_keys(key[:, :, :0], gram, FLOOR)
    assert scaled.shape == (2, 2, 0, 4)
    assert norm.shape == (2, 2, 0)
