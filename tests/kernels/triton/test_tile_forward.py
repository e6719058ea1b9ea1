"""The kernel of tiles with whole lists: what it does itself, and what it leaves to the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from hyperframe.kernels import reference, triton_backend
from hyperframe.plan import TilePlan
from tests.kernels.triton.whole_lists import plan_of_whole_lists

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
pytestmark = pytest.mark.skipif(
    triton_backend.why_not(DEVICE) is not None, reason=str(triton_backend.why_not(DEVICE))
)
D, TILE, SLOTS = 16, 8, 64  # two blocks of the configuration for float32


def problem(
    *, group: int = 1, queries: int = 27, keys: int = 80, causal: bool = True,
    band: tuple[int, int] | None = (5, 2), weighted: bool = True, slots: int = SLOTS, seed: int = 0,
    dim: int = D, tile: int = TILE, dtype: torch.dtype = torch.float32,
) -> tuple[list[torch.Tensor], TilePlan]:  # fmt: skip
    """Inputs and a plan whose tiles hold a run of keys (banded), other keys, and samples."""
    generator = torch.Generator().manual_seed(seed)
    heads = 2
    q = torch.randn((1, heads * group, queries, dim), generator=generator)
    k, v = torch.randn((2, 1, heads, keys, dim), generator=generator)
    plan = plan_of_whole_lists(
        generator, DEVICE, heads=heads, group=group, queries=queries, keys=keys, slots=slots,
        tile=tile, band=band, weighted=weighted, causal=causal,
    )  # fmt: skip
    return [x.to(DEVICE, dtype) for x in (q, k, v)], plan


@contextmanager
def watched_launches() -> Iterator[list[tuple[Any, Any, dict[str, Any]]]]:
    """List kernels, what they are compiled for, and their arguments."""
    from hyperframe.kernels.triton import attend

    seen: list[tuple[Any, Any, dict[str, Any]]] = []
    launch = attend.launch

    def watched(kernel: Any, key: Any, config: Any, programs: Any, arguments: Any) -> Any:
        seen.append((kernel, key, arguments(config)))
        return launch(kernel, key, config, programs, arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend, "launch", watched)
        yield seen


def run(inputs: list[torch.Tensor], plan: TilePlan) -> tuple[list[torch.Tensor], list[bool]]:
    """Output, lse, and which tiles of the heads were left to the other kernel."""
    from hyperframe.kernels.triton import attend

    with watched_launches() as seen:
        out, lse, _ = attend.forward(*inputs, [plan], None, 0.25)
    left = [
        (given["bits_ptr"] >> 62) & 1 for kernel, _, given in seen if kernel is attend.rest_kernel
    ]
    (apart,) = left
    return [out, lse], apart.flatten().bool().tolist()


def assert_exact(inputs: list[torch.Tensor], plan: TilePlan, found: list[torch.Tensor]) -> None:
    exact = reference.attend(*(x.double() for x in inputs), plan, scale=0.25)
    for part, name in zip(found, ("out", "lse"), strict=True):
        expected = getattr(exact, name)
        assert torch.equal(torch.isinf(part), torch.isinf(expected))
        torch.testing.assert_close(part.double(), expected, rtol=2e-5, atol=2e-5)


CASES: dict[str, dict[str, Any]] = {
    "causal band and weights": {},
    "no weights": {"weighted": False},
    "causal alone": {"band": None},
    "band without causality": {"causal": False},
    "nothing to test": {"causal": False, "band": None},
    "heads that share tiles": {"group": 3},
    "more keys than queries": {"queries": 9, "keys": 100},
}


@pytest.mark.parametrize("case", CASES)
def test_whole_lists_are_done_here(case: str) -> None:
    inputs, plan = problem(**CASES[case])
    plan = with_a_key_for_all(plan, 20)
    found, left = run(inputs, plan)
    assert not any(left)
    assert_exact(inputs, plan, found)


def that_end_anywhere(plan: TilePlan, slots: int) -> TilePlan:
    """Cut the tensors to so many slots, and each list where it likes; behind it, nothing is so."""
    generator = torch.Generator().manual_seed(2)
    heavy = int(plan.heavy_count[0, 0, 0])
    shape = plan.key_count.shape
    count = torch.randint(heavy, slots + 1, shape, generator=generator).to(DEVICE)
    # at the end of a block, behind it, and before and at the end of the tensor
    count.view(-1)[:4] = torch.tensor([heavy, heavy + 1, slots - 1, slots], device=DEVICE)
    index, weight = plan.key_index[..., :slots].clone(), plan.log_weight
    if weight is not None:
        used = torch.arange(slots, device=DEVICE) < count[..., None]
        weight = torch.where(used, weight[..., :slots], float("nan"))
    return replace(plan, key_index=index, key_count=count, log_weight=weight)


def with_a_key_for_all(plan: TilePlan, slot: int) -> TilePlan:
    """Let every row see a key, in that slot: sums stay near the shift, and are not done again."""
    first = torch.where(plan.key_index[..., slot] == 0, 1, 0)
    index = plan.key_index.clone()
    index[..., slot] = first
    return replace(plan, key_index=index, disjoint=False).deduplicated()


@pytest.mark.parametrize("case", CASES)
def test_lists_that_do_not_end_with_a_block_are_left(case: str) -> None:
    inputs, plan = problem(**CASES[case])
    plan = that_end_anywhere(with_a_key_for_all(plan, 20), SLOTS)
    plan.key_index[0, 0, 1, -5:] = 1 << 30  # not used, not read
    found, left = run(inputs, plan)
    assert left == (plan.key_count % 32 != 0).flatten().tolist()
    assert_exact(inputs, plan, found)


def test_tensors_that_do_not_end_with_a_block_are_for_the_general_kernel() -> None:
    inputs, plan = problem()
    plan = that_end_anywhere(plan, SLOTS - 11)
    with watched_launches() as seen:
        found = triton_backend.attend_all(*inputs, [plan], scale=0.25)
    assert [key[0] for _, key, _ in seen] == ["forward"]
    assert_exact(inputs, plan, [found.out, found.lse])


def test_more_slots_than_there_are_are_not_read() -> None:
    inputs, plan = problem(causal=False)
    found, _ = run(inputs, replace(plan, key_count=plan.key_count + 1000))
    assert_exact(inputs, plan, found)


def test_keys_out_of_range_are_not_read() -> None:
    inputs, plan = problem(causal=False)
    wrong = plan.key_index.clone()
    wrong[0, 0, 1, 40] = 1 << 28
    wrong[0, 1, 3, 7] = -(1 << 28)
    found, left = run(inputs, replace(plan, key_index=wrong))
    assert left == [number in (1, 7) for number in range(8)]
    wrong[0, 0, 1, 40], wrong[0, 1, 3, 7] = 79, 0  # the nearest keys there are
    assert_exact(inputs, replace(plan, key_index=wrong), found)


@pytest.mark.parametrize("height", [60.0, 400.0])
def test_rows_that_leave_the_range_of_the_first_block_are_done_again(height: float) -> None:
    (q, k, v), plan = problem(causal=False, band=None, weighted=False)
    q[..., 0], k[..., 0] = 1.0, 0.0
    later = plan.key_index[0, 1, 2, -1].long()  # of the last block of one tile
    k[0, 1, later, 0] = height / 0.25
    found, left = run([q, k, v], plan)
    assert left[6]
    exact = reference.attend(q.double(), k.double(), v.double(), plan, scale=0.25)
    torch.testing.assert_close(found[1].double(), exact.lse, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found[0].double(), exact.out, rtol=2e-4, atol=2e-4)


def test_a_list_without_a_key() -> None:
    inputs, plan = problem()
    count = plan.key_count.clone()
    count[0, 0, 1] = 0
    none = torch.minimum(plan.heavy_count, count)
    assert plan.band_count is not None
    plan = replace(
        plan, key_count=count, heavy_count=none, band_count=torch.minimum(plan.band_count, none)
    )
    found, _ = run(inputs, plan)
    assert_exact(inputs, plan, found)
    assert torch.isinf(found[1][0, 0, 8:16]).all()
