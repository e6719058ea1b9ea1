"""The torch backend: numbers far apart, gradients of the normaliser, memory."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from hyperframe.kernels import attend
from hyperframe.kernels.exact import full_plan
from hyperframe.plan import TilePlan

BACKENDS = ["reference", "torch"]


def sampled_plan(count: int, **fields: object) -> TilePlan:
    """One row, `count` sampled keys of weight 1."""
    return TilePlan(
        key_index=torch.arange(count).view(1, 1, 1, count),
        key_count=torch.full((1, 1, 1), count), heavy_count=torch.zeros(1, 1, 1), tile_size=1,
        num_query_heads=1, num_queries=1, num_keys=count, disjoint=True, **fields,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logit", [60.0, 300.0, 5000.0])
def test_a_cap_far_below_the_logits_keeps_its_normaliser(backend: str, logit: float) -> None:
    # one shift for the sum and the numerator would take the capped sum to 0 and lse to -inf
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([logit, logit]).view(1, 1, 2, 1)
    v = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
    plan = sampled_plan(2, log_cap=torch.full((1, 1, 1), 2.0))
    out, lse = attend(q, k, v, plan, scale=1.0, backend=backend)
    torch.testing.assert_close(lse.item(), 2 + math.log(2), rtol=1e-6, atol=0)
    assert not torch.isnan(out).any()
    if logit == 60:
        torch.testing.assert_close(out.item(), math.exp(58) / 2, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("floor", [-400.0, 0.0, 400.0])
def test_a_floor_far_from_the_sum_decides_or_does_nothing(backend: str, floor: float) -> None:
    q, k = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 2, 1)
    v = torch.ones(1, 1, 2, 1)
    plan = sampled_plan(2, log_floor=torch.full((1, 1, 1), floor))
    out, lse = attend(q, k, v, plan, scale=1.0, backend=backend)
    expected = max(floor, math.log(2))
    torch.testing.assert_close(lse.item(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.item(), 2 * math.exp(-expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_numerator_without_a_row_sum_is_empty(backend: str) -> None:
    # the only key has no weight in the row sum and one in the numerator
    plan = sampled_plan(
        1, log_weight=torch.full((1, 1, 1, 1), -math.inf),
        value_log_weight=torch.zeros(1, 1, 1, 1),
    )  # fmt: skip
    tensors = [torch.ones(1, 1, 1, 1, requires_grad=True) for _ in range(3)]
    out, lse = attend(*tensors, plan, scale=1.0, backend=backend)
    assert out.item() == 0
    assert lse.item() == -math.inf
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert [gradient.item() for gradient in gradients] == [0, 0, 0]


def test_the_gradient_of_the_normaliser_is_the_mean_key() -> None:
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    _, lse = attend(q, k, v, full_plan(q, k, is_causal=True), scale=0.5, backend="torch")
    grad_q, grad_k, grad_v = torch.autograd.grad(lse.sum(), (q, k, v))
    hidden = ~torch.ones(9, 9, dtype=torch.bool).tril()
    share = (0.5 * q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1)
    torch.testing.assert_close(grad_q, 0.5 * share @ k)
    torch.testing.assert_close(grad_k, 0.5 * share.mT @ q)
    assert torch.equal(grad_v, torch.zeros_like(v))


def test_backward_twice_over_a_kept_graph_gives_the_same() -> None:
    q, k, v = (torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3))
    out, lse = attend(q, k, v, full_plan(q, k, is_causal=True), scale=0.5, backend="torch")
    total = out.sum() + lse.sum()
    first = torch.autograd.grad(total, (q, k, v), retain_graph=True)
    second = torch.autograd.grad(total, (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("norm", [1.0, 5.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_large_scores_are_as_precise_as_those_of_plain_torch(
    dtype: torch.dtype, norm: float
) -> None:
    """Errors pooled over 20 problems: one problem's error is that of a few large entries.

    A backward that takes the weights from the stored normaliser, in float32, is off by its
    rounding in whole rows: 2.5 times plain torch's error at scores of hundreds.
    """
    hidden = ~torch.ones(32, 32, dtype=torch.bool).tril()
    ours, plain = torch.zeros(2, 3, dtype=torch.float64)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        q, k, v, grad = (torch.randn(1, 2, 32, 16, generator=generator) for _ in range(4))
        tensors, grad = [tensor.to(dtype) for tensor in (norm * q, k, v)], grad.to(dtype)
        plan = full_plan(q, k, is_causal=True)

        def gradients(
            backend: str, tensors: list[torch.Tensor], plan: TilePlan = plan,
            grad: torch.Tensor = grad,
        ) -> list[torch.Tensor]:  # fmt: skip
            q, k, v = leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            if backend == "plain":
                logits = (0.7 * (q @ k.mT)).masked_fill(hidden, -torch.inf)
                out, lse = logits.softmax(-1) @ v, logits.logsumexp(-1)
            else:
                out, lse = attend(q, k, v, plan, scale=0.7, backend=backend)
            total = (out * grad.to(out)).sum().double() + lse.sum()
            return [found.double() for found in torch.autograd.grad(total, leaves)]

        exact = gradients("reference", [tensor.double() for tensor in tensors])
        for errors, backend in ((ours, "torch"), (plain, "plain")):
            found = gradients(backend, tensors)
            errors += torch.stack(
                [(a - b).square().mean() for a, b in zip(found, exact, strict=True)]
            )
    assert (ours.sqrt() <= 1.5 * plain.sqrt()).all(), (ours / plain).sqrt()


MEMORY = """
import resource, sys
import torch
from hyperframe.kernels import torch_backend
from hyperframe.plan import RankRanges, TilePlan

torch.set_num_threads(1)

def run(case, heads, rows, keys, dim):
    q, k, v = (torch.randn(1, heads, length, dim) for length in (rows, keys, keys))
    tile, excluded = 64, None
    if case == "shared":
        index = torch.randperm(keys)[:512].int().expand(1, heads, rows // tile, -1)
    elif case == "per tile":
        index = torch.randint(keys, (1, heads, rows // tile, 512), dtype=torch.int32)
    elif case == "one tile":
        tile, index = rows, torch.randperm(keys)[:2048].int().expand(1, heads, 1, -1)
    elif case == "excluded":
        tile = 16
        index = torch.randint(keys, (1, heads, rows // tile, 16), dtype=torch.int32)
        bound = torch.zeros(1, heads, 1, rows, dtype=torch.int64)
        rank = torch.arange(keys).expand(1, heads, 1, -1)
        excluded = RankRanges(key_rank=rank, start=bound, stop=bound)
    count = torch.tensor(index.shape[-1], dtype=torch.int32).expand(index.shape[:3])
    plan = TilePlan(
        key_index=index, key_count=count, heavy_count=count, tile_size=tile,
        num_query_heads=heads, num_queries=rows, num_keys=keys, excluded=excluded,
        disjoint=case != "per tile")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out, lse = torch_backend.attend(q, k, v, plan, scale=dim ** -0.5)
    assert torch.isfinite(lse).all()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

case, sizes = sys.argv[1], [int(x) for x in sys.argv[2:]]
run(case, 1, 128, 4096, 8)  # libraries load
print(run(case, *sizes) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize(
    "case, heads, rows, keys, dim",
    [
        ("shared", 8, 32_768, 32_768, 64),
        ("per tile", 8, 32_768, 32_768, 64),
        # memory is bounded chunk by chunk: fewer heads need as much, in less time
        ("one tile", 2, 32_768, 32_768, 64),
        # ranks of all keys, gathered for every tile, would be 4 GiB
        ("excluded", 8, 8_192, 131_072, 16),
    ],
)
def test_the_forward_needs_little_memory_beside_its_inputs(
    case: str, heads: int, rows: int, keys: int, dim: int
) -> None:
    sizes = [str(x) for x in (heads, rows, keys, dim)]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, case, *sizes], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1 << 30


@pytest.mark.parametrize("corrected", [False, True])
def test_gradients_have_gradients(corrected: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(1, 2, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    plan = full_plan(q, k, is_causal=True)
    if corrected:
        plan = replace(
            plan, heavy_count=torch.full((1, 2, 1), 2),
            log_weight=torch.randn(1, 2, 1, 5, generator=generator),
            log_cap=torch.full((1, 2, 5), -0.1), log_floor=torch.full((1, 2, 5), 0.3),
        )  # fmt: skip
    assert torch.autograd.gradgradcheck(
        lambda *x: tuple(attend(*x, plan, scale=0.5, backend="torch")), (q, k, v)
    )
