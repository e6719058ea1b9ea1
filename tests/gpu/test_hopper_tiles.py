"""The kernel of tiles that is scheduled by hand, for one kind of GPU: tested as the other is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from hyperframe.kernels import reference, triton_backend
from hyperframe.plan import TilePlan
from tests.kernels.triton.test_attention import poison
from tests.kernels.triton.test_tile_forward import (
    CASES,
    problem,
    run,
    that_end_anywhere,
    with_a_key_for_all,
)

pytestmark = pytest.mark.gpu
SCALE = 0.25  # of `run`


@pytest.fixture(autouse=True)
def launches() -> Iterator[list[str]]:
    """Watch which kernels of tiles run; there has to be a GPU that they are for."""
    from hyperframe.kernels.triton import attend

    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper alone")
    seen: list[str] = []
    launch = attend.launch

    def watched(kernel: Any, key: Any, *rest: Any) -> Any:
        seen.append(key[0])
        return launch(kernel, key, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend, "launch", watched)
        yield seen


def large(case: str = "nothing to test", **sizes: Any) -> tuple[list[torch.Tensor], TilePlan]:
    """Return a case of the other kernel in sizes for this one: whole lists of 256 slots."""
    more = {"queries": 211, "keys": 700, "slots": 256, "dim": 64, "tile": 64} | sizes
    return problem(**{**CASES[case], "dtype": torch.bfloat16, **more})


def assert_exact(inputs: list[torch.Tensor], plan: TilePlan, found: list[torch.Tensor]) -> None:
    """Compare with float64: no more than the roundings of weights and output."""
    exact = reference.attend(*(x.double() for x in inputs), plan, scale=SCALE)
    out, lse = (part.double() for part in found)
    assert torch.equal(torch.isinf(lse), torch.isinf(exact.lse))
    torch.testing.assert_close(lse, exact.lse, rtol=1e-5, atol=1e-4)
    bits = 2**-8 if inputs[0].dtype == torch.bfloat16 else 2**-11
    errors = (out - exact.out).norm(dim=-1)
    assert (errors <= 2 * bits * exact.out.norm(dim=-1) + bits).all()
    assert errors.norm() <= bits * exact.out.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tile", [64, 100, 128])
@pytest.mark.parametrize("case", CASES)
def test_whole_lists(
    case: str, tile: int, dim: int, dtype: torch.dtype, launches: list[str]
) -> None:
    inputs, plan = large(case, dim=dim, dtype=dtype, tile=tile)
    plan = with_a_key_for_all(plan, 100)
    found, left = run(inputs, plan)
    assert "hopper tiles" in launches
    if dtype == torch.bfloat16:  # float16 ends 11 nats above the shift
        assert not any(left)
    assert_exact(inputs, plan, found)


@pytest.mark.parametrize("slots", [64, 128, 192])
def test_lists_of_few_blocks(slots: int, launches: list[str]) -> None:
    inputs, plan = large(slots=slots)
    found, _ = run(inputs, plan)
    assert "hopper tiles" in launches
    assert_exact(inputs, plan, found)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", CASES)
def test_lists_that_do_not_end_with_a_block_are_left(
    case: str, dim: int, launches: list[str]
) -> None:
    inputs, plan = large(case, dim=dim)
    plan = that_end_anywhere(with_a_key_for_all(plan, 100), 256)
    plan.key_index[0, 0, 1, -5:] = 1 << 30  # not used, not read
    found, left = run(inputs, plan)
    assert "hopper tiles" in launches
    assert left == (plan.key_count % 64 != 0).flatten().tolist()
    assert_exact(inputs, plan, found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_other_types_go_to_the_other_kernel(
    dtype: torch.dtype, launches: list[str]
) -> None:
    inputs, plan = large()
    assert plan.log_weight is not None
    plan = replace(plan, log_weight=plan.log_weight.to(dtype))
    found, _ = run(inputs, plan)
    assert "hopper tiles" not in launches
    assert_exact(inputs, plan, found)


def test_keys_out_of_range_are_not_read(launches: list[str]) -> None:
    inputs, plan = large()
    wrong = plan.key_index.clone()
    wrong[0, 0, 1, 40] = 1 << 28
    wrong[0, 1, 3, 7] = -(1 << 28)
    found, left = run(inputs, replace(plan, key_index=wrong))
    assert "hopper tiles" in launches
    assert left == [number in (1, 7) for number in range(8)]
    wrong[0, 0, 1, 40], wrong[0, 1, 3, 7] = 699, 0  # the nearest keys there are
    assert_exact(inputs, replace(plan, key_index=wrong), found)


def test_rows_that_leave_the_range_of_the_first_block_are_done_again(launches: list[str]) -> None:
    (q, k, v), plan = large(weighted=False)
    q[..., 0], k[..., 0] = 1.0, 0.0
    later = plan.key_index[0, 1, 2, -1].long()  # of the last block of one tile
    k[0, 1, later, 0] = 400 / SCALE
    found, left = run([q, k, v], plan)
    assert "hopper tiles" in launches
    assert left[6]
    assert_exact([q, k, v], plan, found)


def test_a_list_without_a_key(launches: list[str]) -> None:
    inputs, plan = large()
    count = plan.key_count.clone()
    count[0, 0, 1] = 0
    plan = replace(plan, key_count=count, heavy_count=torch.minimum(plan.heavy_count, count))
    found, _ = run(inputs, plan)
    assert "hopper tiles" in launches
    assert_exact(inputs, plan, found)
    assert torch.isinf(found[1][0, 0, 64:128]).all()


def test_rows_that_copies_cannot_begin_at_go_to_the_other_kernel(launches: list[str]) -> None:
    (q, k, v), plan = large()
    wide = torch.zeros((*k.shape[:3], k.shape[3] + 4), dtype=k.dtype, device=k.device)
    wide[..., 4:] = k
    found, _ = run([q, wide[..., 4:], v], plan)
    assert "hopper tiles" not in launches
    assert "tile forward" in launches
    assert_exact([q, k, v], plan, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_is_as_exact_as_torch(case: str, dtype: torch.dtype, launches: list[str]) -> None:
    inputs, plan = large(case, queries=631, keys=653, dim=128, dtype=dtype)
    plan = that_end_anywhere(with_a_key_for_all(plan, 100), 256)
    found, _ = run(inputs, plan)
    assert "hopper tiles" in launches
    exact = reference.attend(*(x.double() for x in inputs), plan, scale=SCALE).out
    from hyperframe.kernels import torch_backend

    plain = torch_backend.attend(*inputs, plan, scale=SCALE).out
    ours, theirs = ((x.double() - exact).norm() / exact.norm() for x in (found[0], plain))
    assert ours <= 2 * theirs


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", CASES)
def test_all_memory_is_written_before_it_is_read(
    case: str, dim: int, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by the backward, which adds up in memory of its own."""
    inputs, plan = large(case, dim=dim)
    plan = with_a_key_for_all(plan, 100)
    slope = torch.randn_like(inputs[0])
    asked_for = poison(monkeypatch)
    leaves = [x.requires_grad_() for x in inputs]
    state = triton_backend.attend_all(*leaves, [plan], scale=SCALE)
    gradients = torch.autograd.grad(state.out, leaves, slope)
    assert asked_for
    assert {"hopper tiles", "tile backward"} <= set(launches)
    monkeypatch.undo()
    exact_leaves = [x.detach().double().requires_grad_() for x in inputs]
    exact = reference.attend(*exact_leaves, plan, scale=SCALE)
    assert_exact(inputs, plan, [state.out.detach(), state.lse.detach()])
    for found, true in zip(
        gradients, torch.autograd.grad(exact.out, exact_leaves, slope.double()), strict=True
    ):
        assert (found.double() - true).norm() < 0.02 * true.norm()
