"""The shift of the exponentials: rows whose later keys leave it far behind are still exact."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hyperframe.kernels import reference, triton_backend
from hyperframe.plan import TilePlan
from tests.kernels.triton.test_attention import square_block_plan

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = pytest.mark.skipif(
    triton_backend.why_not(DEVICE) is not None, reason=str(triton_backend.why_not(DEVICE))
)
ROWS, KEYS, D = 24, 300, 16  # several blocks of keys for any configuration


def steps(*logits: float, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Inputs whose logits (of scale 1) lie near `logits`, in equally long runs of keys."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn((1, 2, ROWS, D), generator=generator) * 0.1
    k = torch.randn((1, 2, KEYS, D), generator=generator)
    v = torch.randn((1, 2, KEYS, D), generator=generator)
    q[..., 0] = 1.0
    run = -(-KEYS // len(logits))
    k[..., 0] = torch.tensor(logits).repeat_interleave(run)[:KEYS]
    return [x.to(DEVICE, dtype) for x in (q, k, v)]


def plan_of_all(**changes: object) -> TilePlan:
    index = torch.arange(KEYS, dtype=torch.int32, device=DEVICE).expand(1, 2, 1, KEYS)
    count = torch.full((1, 2, 1), KEYS, device=DEVICE)
    plan = TilePlan(
        key_index=index, key_count=count, heavy_count=count, tile_size=ROWS, num_query_heads=2,
        num_queries=ROWS, num_keys=KEYS, disjoint=True,
    )  # fmt: skip
    return replace(plan, **changes)  # type: ignore[arg-type]


RISING = {
    "nothing to do": (0.0, 3.0, -2.0),
    "higher than the shift allows": (0.0, 60.0),
    "far beyond what float32 holds": (0.0, 200.0, 500.0),
    "the first block decides": (300.0, 0.0, -300.0),
    "low everywhere": (-900.0, -905.0),
}


@pytest.mark.parametrize("case", RISING)
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_far_above_or_below_the_first_one(case: str, weighted: bool) -> None:
    q, k, v = steps(*RISING[case])
    weight = torch.linspace(0, 2, KEYS, device=DEVICE).expand(1, 2, 1, KEYS)
    plan = plan_of_all(log_weight=weight if weighted else None)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    found = triton_backend.attend_all(*tensors, [plan], scale=1.0)
    expected = reference.attend(*tensors, plan, scale=1.0)
    torch.testing.assert_close(found.out, expected.out.float(), rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(found.lse, expected.lse.float(), rtol=1e-5, atol=1e-4)
    slope = torch.randn(found.out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    # float32 holds logits of hundreds to 1e-5 or so, and weights with them; keys are as large
    tolerance = 2e-3 + 1e-4 * max(abs(x) for x in RISING[case])
    for one, other in zip(
        torch.autograd.grad(found.out, tensors, slope),
        torch.autograd.grad(expected.out, tensors, slope.to(expected.out.dtype)), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# the interpreter computes no products of bfloat16
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16][: 2 if ON_GPU else 1])
def test_what_16_bits_do_not_hold_is_done_again(dtype: torch.dtype) -> None:
    """Shifted weights of `e^12` are finite in float32, and infinite in float16."""
    q, k, v = steps(0.0, 12.0, dtype=dtype)
    found = triton_backend.attend_all(q, k, v, [plan_of_all()], scale=1.0)
    expected = reference.attend(q, k, v, plan_of_all(), scale=1.0)
    assert found.out.isfinite().all()
    torch.testing.assert_close(found.out, expected.out.to(dtype), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("low", [-500.0, 500.0])
def test_rows_that_see_nothing_of_the_first_block(low: float) -> None:
    """Rows at the front see later slots only: their logits decide, not the shift of 0."""
    q, k, v = steps(low, low + 3)
    index = torch.arange(KEYS, dtype=torch.int32, device=DEVICE).flip(0).contiguous()
    plan = plan_of_all(key_index=index.expand(1, 2, 1, KEYS), is_causal=True, query_offset=ROWS)
    found = triton_backend.attend_all(q, k, v, [plan], scale=1.0)
    expected = reference.attend(q, k, v, plan, scale=1.0)
    torch.testing.assert_close(found.out, expected.out.float(), rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(found.lse, expected.lse.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("low", [-10.0, -20.0, -41.0, 9.0])
@pytest.mark.parametrize("rows", [24, 136])  # for the kernel of short runs, and for the other one
def test_rows_that_see_nothing_of_the_first_block_in_float16(rows: int, low: float) -> None:
    """Weights of `e^-10` and less lose digits in float16, or vanish, where the shift is 0."""
    generator = torch.Generator().manual_seed(0)
    slots = 512  # whole blocks of any configuration
    q = torch.randn((1, 2, rows, D), generator=generator) * 0.1
    k, v = torch.randn((2, 1, 2, slots, D), generator=generator)
    q[..., 0], k[..., 0] = 1.0, low
    tensors = [x.to(DEVICE, torch.float16).requires_grad_() for x in (q, k, v)]
    index = torch.arange(slots, dtype=torch.int32, device=DEVICE).flip(0).expand(1, 2, 1, slots)
    count = torch.full((1, 2, 1), slots, device=DEVICE)
    plan = TilePlan(
        key_index=index, key_count=count, heavy_count=count, tile_size=rows, num_query_heads=2,
        num_queries=rows, num_keys=slots, disjoint=True, is_causal=True, query_offset=100,
    )  # fmt: skip
    found = triton_backend.attend_all(*tensors, [plan], scale=1.0)
    expected = reference.attend(*tensors, plan, scale=1.0)
    error = (found.out - expected.out).norm(dim=-1) / expected.out.norm(dim=-1)
    assert error.max() < 2e-3
    torch.testing.assert_close(found.lse, expected.lse.float(), rtol=1e-4, atol=1e-3)
    slope = torch.randn(found.out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for one, other in zip(
        torch.autograd.grad(found.out, tensors, slope.half()),
        torch.autograd.grad(expected.out, tensors, slope.to(expected.out.dtype)), strict=True,
    ):  # fmt: skip
        assert (one - other).norm() < 1e-2 * other.norm()


@pytest.mark.parametrize("later", [-400.0, 0.0, 90.0, 400.0])
def test_a_state_far_from_the_plan_that_joins_it(later: float) -> None:
    q, k, v = steps(0.0, later)
    half = KEYS // 2
    plans = []
    for first, count in ((0, half), (half, KEYS - half)):
        index = torch.arange(first, first + count, dtype=torch.int32, device=DEVICE)
        used = torch.full((1, 2, 1), count, device=DEVICE)
        plans.append(
            plan_of_all(key_index=index.expand(1, 2, 1, count), key_count=used, heavy_count=used)
        )
    found = triton_backend.attend_all(q, k, v, plans, scale=1.0)
    expected = reference.attend(q, k, v, plan_of_all(), scale=1.0)
    torch.testing.assert_close(found.out, expected.out.float(), rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(found.lse, expected.lse.float(), rtol=1e-5, atol=1e-4)


def test_a_value_that_is_not_finite_reaches_its_column_alone() -> None:
    q, k, v = steps(0.0)
    v[0, 0, 7, 3] = math.inf
    out = triton_backend.attend_all(q, k, v, [plan_of_all()], scale=1.0).out
    assert out[0, 0, :, 3].isinf().all()
    out[0, 0, :, 3] = 0
    assert out.isfinite().all()


def test_blocks_whose_samples_lie_far_above() -> None:
    plan = square_block_plan(0)
    tensors = {name: x.to(DEVICE) for name, x in vars(plan).items() if isinstance(x, torch.Tensor)}
    plan = replace(plan, **tensors)
    assert plan.sample_index is not None
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn((1, heads, 20, D), generator=generator).to(DEVICE) for heads in (2, 1, 1)
    )
    q[..., 0], k[..., 0] = 1.0, 0.0
    k[:, :, plan.sample_index.flatten().long(), 0] = 200.0
    found = triton_backend.attend_all(q, k, v, [plan], scale=1.0)
    expected = reference.attend(q, k, v, plan.to_tile_plan(), scale=1.0)
    torch.testing.assert_close(found.out, expected.out.float(), rtol=2e-4, atol=2e-4)
