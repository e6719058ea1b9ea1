"""Gradients of tiles with whole lists: sums in 16 bits, and what is left to the other kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hyperframe.kernels import reference, triton_backend
from hyperframe.plan import TilePlan
from tests.kernels.triton.whole_lists import plan_of_whole_lists

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = pytest.mark.skipif(
    triton_backend.why_not(DEVICE) is not None, reason=str(triton_backend.why_not(DEVICE))
)
D, TILE, SLOTS, SCALE = 32, 8, 64, 0.25  # two blocks of the configuration for float32
FLOAT, HALF = 1e-5, 2e-3  # norm of the error, relative; of float16, of some terms, 2^-11 each


def problem(
    *, group: int = 1, queries: int = 19, keys: int = 80, causal: bool = True, slots: int = SLOTS,
    band: tuple[int, int] | None = (5, 2), weighted: bool = True, tile: int = TILE, seed: int = 0,
    heads: int = 2,
) -> tuple[list[torch.Tensor], TilePlan]:  # fmt: skip
    """Queries, keys, values, a gradient, and a plan whose lists end with a block."""
    generator = torch.Generator().manual_seed(seed)
    q, slope = torch.randn((2, 1, heads * group, queries, D), generator=generator)
    k, v = torch.randn((2, 1, heads, keys, D), generator=generator)
    plan = plan_of_whole_lists(
        generator, DEVICE, heads=heads, group=group, queries=queries, keys=keys, slots=slots,
        tile=tile, band=band, weighted=weighted, causal=causal,
    )  # fmt: skip
    # (slopes for which no power of two happens to be 1)
    return [x.to(DEVICE) for x in (q, k, v, slope * 0.01)], plan


@pytest.fixture(autouse=True)
def _float32_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # bfloat16 is what these sums are for, which the interpreter has no products of
    monkeypatch.setattr("hyperframe.kernels.triton.key_sums.HALF_SUMS_OF", (torch.float32,))


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> list[list[bool]]:
    """Which tiles of the heads every backward left to the other kernel."""
    from hyperframe.kernels.triton import configs, plan_gradients
    from hyperframe.kernels.triton.backward_rows import backward_rows_kernel

    left: list[list[bool]] = []
    launch = configs.launch

    def watched(kernel: Any, key: Any, config: Any, programs: Any, arguments: Any) -> Any:
        if kernel is backward_rows_kernel and (sent := arguments(config))["REST"]:
            left.append(((sent["bits_ptr"] >> 62) & 1).flatten().bool().tolist())
        return launch(kernel, key, config, programs, arguments)

    monkeypatch.setattr(plan_gradients, "launch", watched)
    return left


def gradients(inputs: list[torch.Tensor], plans: list[TilePlan]) -> list[torch.Tensor]:
    *qkv, slope = inputs
    qkv = [x.detach().requires_grad_() for x in qkv]
    q, k, v = qkv
    out = triton_backend.attend_all(q, k, v, plans, scale=SCALE).out
    return list(torch.autograd.grad(out, qkv, slope))


def exact_gradients(inputs: list[torch.Tensor], plan: TilePlan) -> list[torch.Tensor]:
    *qkv, slope = (x.double() for x in inputs)
    qkv = [x.detach().requires_grad_() for x in qkv]
    q, k, v = qkv
    out = reference.attend(q, k, v, plan, scale=SCALE).out
    return list(torch.autograd.grad(out, qkv, slope))


def assert_close(found: list[torch.Tensor], exact: list[torch.Tensor], error: float) -> None:
    for part, expected in zip(found, exact, strict=True):
        assert (part.double() - expected).norm() <= error * expected.norm()


CASES: dict[str, dict[str, Any]] = {
    "causal band and weights": {},
    "no weights": {"weighted": False},
    "causal alone": {"band": None},
    "band without causality": {"causal": False},
    "nothing to test": {"causal": False, "band": None},
    "heads that share tiles": {"group": 3},
    "more keys than queries": {"queries": 9, "keys": 100},
    "several programs for a tile": {"tile": 50, "queries": 60},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_whole_lists(case: str, apart: list[list[bool]]) -> None:
    inputs, plan = problem(**CASES[case])
    found = gradients(inputs, [plan])
    assert len(apart) == 1
    assert not any(apart[0])
    assert_close(found, exact_gradients(inputs, plan), HALF)


def test_lists_that_do_not_end_with_a_block_are_left(apart: list[list[bool]]) -> None:
    inputs, plan = problem(causal=False)
    count = plan.key_count.clone()
    count[0, 1, 2] -= 5
    plan = replace(plan, key_count=count)
    plan.key_index[0, 1, 2, -5:] = 1 << 30  # not used, not read
    found = gradients(inputs, [plan])
    assert apart == [[number == 5 for number in range(6)]]
    assert_close(found, exact_gradients(inputs, plan), HALF)


def test_gradients_of_keys_out_of_range_go_to_the_nearest(apart: list[list[bool]]) -> None:
    inputs, plan = problem(causal=False)
    wrong = plan.key_index.clone()
    wrong[0, 0, 1, 40], wrong[0, 1, 2, 7] = 1 << 28, -(1 << 28)
    found = gradients(inputs, [replace(plan, key_index=wrong)])
    assert apart == [[number in (1, 5) for number in range(6)]]
    wrong[0, 0, 1, 40], wrong[0, 1, 2, 7] = 79, 0
    assert_close(found, exact_gradients(inputs, replace(plan, key_index=wrong)), HALF)


def test_a_key_of_more_slots_than_a_row_of_sums_takes() -> None:
    # the first of two tiles names each of 3 keys in more slots than the 64 that a row takes
    inputs, plan = problem(queries=16, causal=False, band=None, keys=300, slots=256, heads=1)
    plan = replace(plan, key_index=plan.key_index % 3, disjoint=False)
    assert plan.key_index[0, 0, 0].bincount().min() > 64
    assert_close(gradients(inputs, [plan]), exact_gradients(inputs, plan), HALF)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_tiles_without_rows_add_nothing() -> None:
    inputs, plan = problem(causal=False, band=None)
    inputs = [inputs[0][:, :, :TILE], *inputs[1:3], inputs[3][:, :, :TILE]]
    few = replace(plan, num_queries=TILE)
    assert_close(gradients(inputs, [few]), exact_gradients(inputs, few), HALF)
    inputs[0][0, 0, 0] = torch.nan  # which the places of the other tiles name
    _, dk, dv = gradients(inputs, [few])
    named = torch.zeros(80, dtype=torch.bool, device=DEVICE)
    named[plan.key_index[0, 0, 0].long()] = True
    for slope in (dk, dv):
        assert slope[0, 0, ~named].isfinite().all()


def test_sums_are_as_large_as_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from hyperframe.kernels.triton.key_sums import HalfSums

    kept: list[tuple[HalfSums, torch.Tensor, torch.Tensor]] = []
    finish = HalfSums.finish

    def watched(sums: HalfSums, dk: torch.Tensor, dv: torch.Tensor, scale: float) -> None:
        finish(sums, dk, dv, scale)
        kept.append((sums, dk, dv))

    monkeypatch.setattr(HalfSums, "finish", watched)
    (q, k, v, slope), plan = problem(heads=1, group=2)
    q[0, 1, 3, 5] = 9.0
    gradients([q, k, v, slope], [plan])
    ((sums, dk, dv),) = kept
    assert sums.rows == 64 * 2 * TILE
    out = reference.attend(q.double(), k.double(), v.double(), plan, scale=SCALE).out
    delta = (out * slope).sum(-1).abs()
    largest, norm, value_norm = q.abs().amax(-1), slope.norm(dim=-1), v.norm(dim=-1).max()
    bounds = [slope.abs().max(), (largest * norm).max(), (largest * delta).max(), value_norm]
    torch.testing.assert_close(
        sums.bound, torch.stack([x.float() for x in bounds]), rtol=1e-4, atol=1e-6
    )
    bound = bounds[1] * value_norm + bounds[2]
    for total, part, most in ((sums.sum_k, dk, bound * SCALE), (sums.sum_v, dv, slope.abs().max())):
        power = float((total[: part[0, 0].shape[0]].norm() / part.norm()).log2().round().exp2())
        assert 16384 < power * float(most) * sums.rows <= 32768 * 1.0001


def test_keys_that_no_tile_names_get_nothing() -> None:
    inputs, plan = problem(keys=300)
    _, dk, dv = gradients(inputs, [plan])
    for head in range(2):
        named = torch.zeros(300, dtype=torch.bool, device=DEVICE)
        named[plan.key_index[0, head].flatten().long()] = True
        for slope in (dk, dv):
            assert not slope[0, head, ~named].any()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_a_row_that_is_not_a_number_spoils_its_own_tile_alone() -> None:
    inputs, plan = problem(causal=False, band=None, keys=600)
    inputs[0][0, 1, 12] = torch.nan  # in the second tile of the second head
    dq, dk, dv = gradients(inputs, [plan])
    assert dq[0, 0].isfinite().all()
    assert dq[0, 1].isfinite().all(-1).tolist() == [row != 12 for row in range(19)]
    for slope in (dk, dv):
        spoilt = torch.zeros(600, dtype=torch.bool, device=DEVICE)
        spoilt[plan.key_index[0, 1, 1].long()] = True
        assert slope[0, 0].isfinite().all()
        assert slope[0, 1, ~spoilt].isfinite().all()


def test_plans_that_are_not_alone_add_in_float32() -> None:
    inputs, plan = problem(causal=False, band=None)
    assert plan.log_weight is not None
    odd = plan.key_index % 2 == 1
    here, there = (
        replace(plan, log_weight=plan.log_weight.masked_fill(hidden, float("-inf")))
        for hidden in (odd, ~odd)
    )
    found = gradients(inputs, [here, there])
    assert_close(found, exact_gradients(inputs, plan), FLOAT)


@settings(
    max_examples=max(5, settings.default.max_examples // 5),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    power=st.integers(-30, 30), steep=st.sampled_from([0.0, 1.0, 30.0]),
    offset=st.sampled_from([0.0, 100.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_sums_in_float16_neither_overflow_nor_vanish(
    power: int, steep: float, offset: float, seed: int
) -> None:
    (q, k, v, slope), plan = problem(queries=20, keys=40, slots=32, heads=1, seed=seed)
    # all rows see one key, or all keys alike, and all that is added has one sign
    inputs = [q * steep, k, v + offset, (slope.abs() + offset) * 2.0**power]
    exact = exact_gradients(inputs, plan)
    # of two large numbers that nearly cancel: grad . value, and its mean by the weights of a row
    largest = [float(x.norm(dim=-1).max()) for x in inputs]
    rounding = 1e-6 * SCALE * largest[3] * largest[2] * 20**0.5
    allowed = [rounding * largest[1], rounding * largest[0], 0.0]
    found = gradients(inputs, [plan])
    for part, expected, more in zip(found, exact, allowed, strict=True):
        assert part.isfinite().all()
        assert (part - expected).norm() <= HALF * expected.norm() + more + 1e-30
