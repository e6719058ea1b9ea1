"""The fused kernels give the orders of the torch implementation; on a GPU, else interpreted.

Small integers make every projection exact, so that results are equal to the last entry. (bfloat16
is left to the GPU: the interpreter's matrix product does not know it.)
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from hyperframe.kernels.hashing import torch_hash_orders

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from hyperframe.kernels.triton import hashing as kernels  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
# small, so that few rows make several blocks in a chunk and several chunks in a run
SMALL = kernels.Tuning(chunk=32, block_rows=16, num_warps=1, num_stages=2)


def inputs(
    batch: int = 1, heads: int = 2, key_heads: int = 1, num_queries: int = 150, num_keys: int = 150,
    dim: int = 16, bits: int = 3, *, shared: bool = False, dtype: torch.dtype = torch.float32,
    low: int = -2, high: int = 2,
) -> list[torch.Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (batch, heads, num_queries, dim), (batch, key_heads, num_keys, dim),
        (1 if shared else batch, key_heads, dim, bits), (batch, key_heads, bits),
    ]  # fmt: skip
    drawn = [torch.randint(low, high + 1, shape, generator=generator) for shape in shapes]
    q, k, projection, threshold = (x.to(DEVICE) for x in drawn)
    return [q.to(dtype), k.to(dtype), projection.float(), threshold.float()]


def check(
    q: torch.Tensor, k: torch.Tensor, projection: torch.Tensor, threshold: torch.Tensor | None,
    runs: tuple[int, ...], tuning: kernels.Tuning | None = SMALL, *, alternate: bool = False,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Compare with the torch implementation, and with the definition of a permutation."""
    given = (q, k, projection, threshold, runs)
    found = kernels.triton_hash_orders(*given, tuning, alternate=alternate)
    expected = torch_hash_orders(*given, alternate=alternate)
    for name, ours, theirs in zip(("query", "key", "rank"), found, expected, strict=True):
        assert ours.dtype == torch.int32
        assert torch.equal(ours, theirs), name
    if tuning is not None and (alternate or len(runs) > 1):
        # sorted chunks change the way of the rows, not where they arrive
        other = replace(tuning, sorts=not tuning.sorts)
        again = kernels.triton_hash_orders(*given, other, alternate=alternate)
        assert all(torch.equal(*both) for both in zip(found, again, strict=True))
    for order in found[:2]:
        rows = torch.arange(order.shape[-1], device=DEVICE, dtype=torch.int32)
        assert torch.equal(order.sort(dim=-1).values, rows.expand(order.shape))
    return found


CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "one run": ({}, (150,)),
    "runs longer than the rows": ({}, (1000,)),
    "whole chunks": ({"num_queries": 128, "num_keys": 128}, (32, 64, 128)),
    "chunks cut short": ({}, (50, 100, 200, 1000)),
    "runs of one block": ({}, (16, 48)),
    "runs in any order": ({}, (100, 25, 150, 50)),
    "the same run twice": ({}, (64, 64)),
    "batch": ({"batch": 2, "heads": 3, "key_heads": 3, "num_queries": 70}, (35, 140)),
    "grouped": ({"batch": 2, "heads": 4, "key_heads": 2, "num_keys": 70}, (40, 80)),
    "shared planes": ({"batch": 2, "heads": 4, "key_heads": 2, "shared": True}, (75, 150)),
    "more keys": ({"num_queries": 20, "num_keys": 200}, (20, 100)),
    "more queries": ({"num_queries": 200, "num_keys": 20}, (40, 200)),
    "one row": ({"num_queries": 1, "num_keys": 1}, (1, 8)),
    "one key": ({"num_keys": 1}, (64,)),
    "wide": ({"dim": 100, "num_queries": 40, "num_keys": 40}, (20, 40)),
}


@pytest.mark.parametrize("has_threshold", [False, True], ids=["zero", "threshold"])
@pytest.mark.parametrize("case", CASES)
def test_orders_are_those_of_torch(case: str, has_threshold: bool) -> None:
    sizes, runs = CASES[case]
    q, k, projection, threshold = inputs(**sizes)
    check(q, k, projection, threshold if has_threshold else None, runs)


@pytest.mark.parametrize("case", CASES)
def test_alternate_runs_are_sorted_alone(case: str) -> None:
    sizes, runs = CASES[case]
    q, k, projection, threshold = inputs(**sizes)
    check(q, k, projection, threshold, runs, alternate=True)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [1, 20, 33])
def test_any_number_of_projections_and_dimensions(bits: int, dim: int) -> None:
    q, k, projection, threshold = inputs(num_queries=70, num_keys=55, dim=dim, bits=bits)
    check(q, k, projection, threshold, (64, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [16, 64, 72, 256])
def test_the_chosen_tuning(dim: int, dtype: torch.dtype) -> None:
    q, k, projection, threshold = inputs(num_keys=260, dim=dim, bits=7, dtype=dtype)
    assert kernels.supports(q, k, projection, (65, 130, 260))
    check(q, k, projection, threshold, (65, 130, 260), tuning=None)


def test_strides_do_not_matter() -> None:
    q, k, projection, threshold = inputs(batch=2, heads=4, key_heads=2)
    q = torch.nn.functional.pad(q.transpose(1, 2), (0, 3))[..., :-3].transpose(1, 2)
    k = k.mT.contiguous().mT
    projection = projection.mT.contiguous().mT
    check(q, k, projection, threshold.mT.contiguous().mT, (50, 150))
    check(q[:1].expand(2, -1, -1, -1), k, projection, threshold, (50, 150))


def test_equal_rows_keep_their_positions() -> None:
    q, k, projection, _ = inputs()
    same = k[:, :, :1].expand(k.shape)
    zeros = torch.zeros_like(q)
    query_order, key_order, key_rank = check(zeros, same, projection, None, (60, 150))
    rows = torch.arange(150, device=DEVICE, dtype=torch.int32)
    for order in (query_order, key_order, key_rank):
        assert torch.equal(order, rows.expand(order.shape))


def test_rows_of_two_codes_are_parted() -> None:
    q, k, _, _ = inputs(dim=1)
    sign = torch.where(torch.arange(150, device=DEVICE) % 2 == 0, 1.0, -1.0).view(1, 1, 150, 1)
    q = k = sign.expand(1, 1, 150, 1)
    query_order, _, _ = check(q, k, torch.ones(1, 1, 1, 1, device=DEVICE), None, (150,))
    rows = torch.arange(150, device=DEVICE, dtype=torch.int32)
    assert torch.equal(query_order.flatten(), torch.cat([rows[1::2], rows[::2]]))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_leave_the_others_alone(value: float) -> None:
    q, k, projection, _ = inputs(dim=3)
    q[:, :, 17], k[:, :, 40, 0] = value, value
    projection = projection.abs() + 1  # no infinity times zero
    check(q, k, projection, None, (50, 150))


SUPPORTED = {"key_heads": 2, "num_queries": 256, "num_keys": 128}


@pytest.mark.parametrize(
    "sizes, runs",
    [({"bits": 9}, (64,)), ({"dim": 257}, (64,)), ({"dtype": torch.float64}, (64,)),
     ({"num_keys": 0}, (64,)), ({}, ()), ({}, (64, 96)), ({}, (16, 32)), ({}, (128, 200))],
)  # fmt: skip
def test_what_the_kernels_do_not_take_is_known_beforehand(
    sizes: dict[str, Any], runs: tuple[int, ...]
) -> None:
    q, k, projection, _ = inputs(**SUPPORTED)
    assert kernels.supports(q, k, projection, (64, 128, 300))
    q, k, projection, _ = inputs(**{**SUPPORTED, **sizes})
    assert not kernels.supports(q, k, projection, runs)


@pytest.mark.parametrize("rows, chunk", [(1 << 17, 512), (1 << 12, 128), (1 << 20, 1024)])
def test_chunks_are_as_long_as_leaves_enough_of_them(rows: int, chunk: int) -> None:
    q = torch.empty(1, device="meta").expand(1, 12, rows, 64)
    assert kernels.Tuning.of(q, q, (rows,)).chunk == chunk
    # a chunk does not reach beyond the smallest run
    assert kernels.Tuning.of(q, q, (256, rows)).chunk == min(256, chunk)
