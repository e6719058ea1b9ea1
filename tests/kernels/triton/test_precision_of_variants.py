"""Every feature of a plan in 16 bits, at lengths that are no multiple of anything.

Errors against float64 are at most twice those of plain torch in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hyperframe.kernels import triton_backend
from hyperframe.plan import RankRanges, TilePlan
from tests.backend_laws import (
    PooledErrors,
    flat,
    in_dtype,
    on,
    plain_attention,
    plan_on,
    rounded,
    with_gradients,
)
from tests.kernels.triton.test_attention import (
    DEVICE,
    LABELS,
    ON_GPU,
    by_kernels,
    by_meaning,
    deterministic_algorithms,
    drawn_inputs,
    sized_plan,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    triton_backend.why_not(DEVICE) is not None, reason=str(triton_backend.why_not(DEVICE))
)
QUERIES, KEYS, TILE = 53, 61, 24
DTYPES = [torch.float16] + [torch.bfloat16] * ON_GPU
Change = Callable[[TilePlan, torch.Generator], TilePlan]


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def values_apart(plan: TilePlan, generator: torch.Generator) -> TilePlan:
    return replace(plan, value_log_weight=normal(generator, *plan.key_index.shape))


def capped(plan: TilePlan, generator: torch.Generator) -> TilePlan:
    return replace(plan, log_cap=normal(generator, 1, 2, QUERIES))


def floored(plan: TilePlan, generator: torch.Generator) -> TilePlan:
    return replace(plan, log_floor=1 + normal(generator, 1, 2, QUERIES))


def summarised(plan: TilePlan, generator: torch.Generator) -> TilePlan:
    index = plan.key_index.clone()
    index[..., 5:8] = KEYS + torch.arange(3)
    key, value = normal(generator, 1, 1, 3, 16), normal(generator, 1, 1, 3, 12)
    return replace(plan, key_index=index, summary_key=key, summary_value=value)


def excluding(plan: TilePlan, generator: torch.Generator) -> TilePlan:
    rank = torch.stack([torch.randperm(KEYS, generator=generator) for _ in range(2)])[None, None]
    start = torch.randint(KEYS, (1, 2, 2, QUERIES), generator=generator)
    return replace(
        plan, excluded=RankRanges(key_rank=rank, start=start, stop=(start + 15).clamp(max=KEYS))
    )


def banded(plan: TilePlan, generator: torch.Generator) -> TilePlan:
    count = plan.heavy_count // 2 + torch.randint(2, plan.heavy_count.shape, generator=generator)
    return replace(plan, band=(9, 6), band_count=count)


def causal(plan: TilePlan, generator: torch.Generator) -> TilePlan:
    index = plan.key_index.clone()
    index[..., 0] = torch.where((index == 0).any(-1), index[..., 0], 0)
    return replace(plan, key_index=index, is_causal=True)


def unweighted(plan: TilePlan, generator: torch.Generator) -> TilePlan:
    return replace(plan, log_weight=None)


# form of the lists, rows in any order, features
VARIANTS: dict[str, tuple[str, bool, tuple[Change, ...]]] = {
    "weights": ("alone", False, ()),
    "no weights": ("alone", False, (unweighted,)),
    "causal": ("alone", False, (causal,)),
    "band": ("grouped", False, (banded,)),
    "causal band": ("alone", False, (causal, banded, unweighted)),
    "order": ("alone", True, ()),
    "order, causal, excluded": ("grouped", True, (causal, excluding)),
    "shared": ("shared", False, (causal,)),
    "excluded": ("alone", False, (excluding,)),
    "summaries": ("alone", False, (summarised,)),
    "summaries, causal, excluded": ("grouped", False, (summarised, causal, excluding)),
    "values apart": ("alone", False, (values_apart,)),
    "caps": ("alone", False, (capped,)),
    "floor": ("grouped", False, (floored,)),
    "Algorithm 2": ("alone", True, (values_apart, capped, floored)),
}


def variant(name: str, seed: int) -> TilePlan:
    form, ordered, changes = VARIANTS[name]
    plan = sized_plan(form, TILE, QUERIES, KEYS, slots=37, ordered=ordered, seed=seed)
    for change in changes:
        plan = change(plan, torch.Generator().manual_seed(seed))
    return plan.validate()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_errors_are_at_most_twice_those_of_plain_torch(name: str, dtype: torch.dtype) -> None:
    errors = PooledErrors(LABELS)
    for seed in range(20 if ON_GPU else 3):
        plan = variant(name, seed)
        inputs = rounded(drawn_inputs(2, 1, QUERIES, KEYS, seed=seed), dtype)
        here = plan_on(in_dtype(plan, dtype), DEVICE)
        with deterministic_algorithms(seed % 2 == 1):
            found = flat(*with_gradients(by_kernels, on(inputs, DEVICE), here))
        assert found[0].dtype == dtype
        plain = flat(*with_gradients(plain_attention, inputs, in_dtype(plan, dtype)))
        exact = with_gradients(
            by_meaning, rounded(inputs, torch.float64), in_dtype(plan, torch.float64)
        )
        errors.add(found, plain, flat(*exact))
    errors.check()


@pytest.mark.parametrize("name", VARIANTS)
def test_offsets_of_64_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tensors of 2^31 elements and more are computed with, on small ones: the same bits."""
    from hyperframe.kernels.triton import arguments, attend

    plan = variant(name, 0)
    inputs = on(rounded(drawn_inputs(2, 1, QUERIES, KEYS), torch.float16), DEVICE)
    here = plan_on(in_dtype(plan, torch.float16), DEVICE)
    with deterministic_algorithms(True):
        expected = flat(*with_gradients(by_kernels, inputs, here))
        asked: list[torch.Size] = []

        def always(tensor: torch.Tensor) -> bool:
            asked.append(tensor.shape)
            return True

        monkeypatch.setattr(arguments, "is_wide", always)
        monkeypatch.setattr(attend, "is_wide", always)
        found = flat(*with_gradients(by_kernels, inputs, here))
    assert asked
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
