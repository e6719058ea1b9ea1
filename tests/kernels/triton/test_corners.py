"""Corners of the Triton backend that once went wrong, each in a plan made by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from hyperframe import kernels
from hyperframe.blockplan import BlockPlan
from hyperframe.errors import ArgumentError
from hyperframe.kernels import reference, triton_backend
from hyperframe.plan import RankRanges, TilePlan
from tests.backend_laws import deterministic_algorithms

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    triton_backend.why_not(DEVICE) is not None, reason=str(triton_backend.why_not(DEVICE))
)


def inputs(num_keys: int = 24, key_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 20, 16), (1, key_heads, num_keys, 16), (1, key_heads, num_keys, 16)]
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


def tile_plan(num_keys: int = 24, **changes: object) -> TilePlan:
    generator = torch.Generator().manual_seed(1)
    index = torch.rand((1, 2, 2, num_keys), generator=generator).argsort(-1)[..., :8].to(DEVICE)
    count = torch.full((1, 2, 2), 8, device=DEVICE)
    plan = TilePlan(
        key_index=index, key_count=count, heavy_count=count, tile_size=10, num_query_heads=4,
        num_queries=20, num_keys=num_keys, disjoint=True,
    )  # fmt: skip
    return replace(plan, **changes)  # type: ignore[arg-type]


def test_ranks_shared_by_all_key_heads_are_spread() -> None:
    q, k, v = inputs()
    rank = torch.arange(24, device=DEVICE).flip(0).view(1, 1, 1, 24)
    start = torch.full((1, 4, 1, 20), 3, device=DEVICE)
    plan = tile_plan(excluded=RankRanges(key_rank=rank, start=start, stop=start + 9))
    found = triton_backend.attend_all(q, k, v, [plan], scale=0.3)
    expected = reference.attend(q, k, v, plan, scale=0.3)
    torch.testing.assert_close(found.out, expected.out, rtol=1e-5, atol=1e-5)
    many = replace(plan.excluded, key_rank=rank.expand(-1, 4, -1, -1))  # type: ignore[type-var]
    with pytest.raises(ArgumentError, match="ranks are for 4 heads"):
        triton_backend.attend_all(q, k, v, [replace(plan, excluded=many)], scale=0.3)


def test_summaries_of_another_dtype_are_converted_and_get_their_gradient_back() -> None:
    q, k, v = (x.half() for x in inputs())
    summary = torch.randn(1, 2, 3, 16).to(DEVICE).requires_grad_()
    index = torch.arange(22, 27, device=DEVICE).expand(1, 2, 2, -1)
    count = torch.full((1, 2, 2), 5, device=DEVICE)
    plan = tile_plan(
        key_index=index, key_count=count, heavy_count=count, summary_key=summary,
        summary_value=summary.detach(),
    )  # fmt: skip
    found = triton_backend.attend_all(q, k, v, [plan], scale=0.3)
    expected = reference.attend(q, k, v, plan, scale=0.3)
    torch.testing.assert_close(found.out, expected.out, rtol=4e-3, atol=4e-3)
    slopes = [
        torch.autograd.grad(state.out.float().sum(), summary, retain_graph=True)[0]
        for state in (found, expected)
    ]
    assert slopes[0].dtype == torch.float32
    torch.testing.assert_close(slopes[0], slopes[1], rtol=2e-2, atol=2e-2)


def test_a_band_has_no_negative_side() -> None:
    with pytest.raises(ArgumentError, match="band: "):
        tile_plan(band=(-1, 2), band_count=torch.zeros((1, 2, 2), device=DEVICE).int())


@pytest.mark.parametrize("rows", [20, 300])
def test_gradients_of_an_index_outside_go_to_the_nearest_key_in_both_modes(rows: int) -> None:
    _, k, v = inputs()
    q = torch.randn(1, 4, rows, 16).to(DEVICE)
    plan = tile_plan(tile_size=rows, num_queries=rows)
    index = plan.key_index[:, :, :1].clone()
    index[..., 3] = 1000
    index[..., :3] = torch.tensor([1, 2, 4])
    index[..., 4:] = torch.tensor([6, 7, 9, 11])
    count = plan.key_count[:, :, :1]
    plan = replace(plan, key_index=index, key_count=count, heavy_count=count)
    touched = []
    for deterministic in (False, True):
        value = v.clone().requires_grad_()
        with deterministic_algorithms(deterministic):
            out = triton_backend.attend_all(q, k, value, [plan], scale=0.3).out
            (slope,) = torch.autograd.grad(out.sum(), value)
        touched.append(slope.abs().sum((0, 1, 3)).nonzero().flatten().tolist())
    assert touched == [[1, 2, 4, 6, 7, 9, 11, 23]] * 2


def test_nothing_named_nothing_touched_in_a_fixed_order_either() -> None:
    q, k, v = inputs()
    k[:, :, 0], v[:, :, 0] = torch.nan, torch.nan
    nothing = torch.zeros((1, 2, 2), device=DEVICE).int()
    k, v = k.requires_grad_(), v.requires_grad_()
    with deterministic_algorithms(True):
        plan = tile_plan(key_count=nothing, heavy_count=nothing)
        state = triton_backend.attend_all(q, k, v, [plan], scale=0.3)
        slopes = torch.autograd.grad(state.out.sum(), (k, v))
    assert (state.out == 0).all()
    assert all((slope == 0).all() for slope in slopes)


def test_rectangles_may_sample_the_same_keys() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(num_keys=20))
    order = torch.arange(20, device=DEVICE, dtype=torch.int32)
    sample = torch.tensor([3, 17, 3, 12], device=DEVICE, dtype=torch.int32).expand(1, 2, 2, -1)
    plan = BlockPlan(
        query_order=order.expand(1, 4, -1), key_order=order.expand(1, 2, -1),
        tiles=torch.tensor(
            [[0, 6, 0, 6, 0], [6, 10, 6, 10, 0], [10, 20, 10, 20, 1]], device=DEVICE
        ).int(),
        max_rows=10, max_keys=10, tile_counts=(2, 1), rectangles=((0, 10, 0, 10), (10, 20, 10, 20)),
        num_query_heads=4, num_queries=20, num_keys=20, sample_index=sample,
        sample_log_weight=torch.ones(1, device=DEVICE).expand(1, 2, 2, 4),
        key_rank=order.expand(1, 2, -1),
    )  # fmt: skip
    found = triton_backend.attend_all(q, k, v, [plan.validate()], scale=0.3)
    expected = reference.attend(q, k, v, plan.to_tile_plan(), scale=0.3)
    weights = torch.arange(found.out.numel(), device=DEVICE).view_as(found.out).sin()
    for state, other in zip(
        *(torch.autograd.grad((s.out * weights).sum(), (q, k, v)) for s in (found, expected)),
        strict=True,
    ):
        torch.testing.assert_close(state, other, rtol=1e-4, atol=1e-5)


# rows of tiles: a place without one, and a tile without any
GAPS = {
    "an empty first place": {
        "query_order": torch.tensor([[[*range(10), -1, *range(10, 19)]] * 2]),
    },
    "a tile without rows": {"tile_size": 20},
}


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's maximum
@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("name", GAPS)
def test_what_a_row_holds_reaches_no_key_that_it_does_not_attend_to(
    name: str, is_deterministic: bool
) -> None:
    tensors = inputs(num_keys=24)
    tensors[0][:, :, 0] = torch.nan
    index = torch.arange(16, device=DEVICE).view(1, 1, 2, 8).expand(1, 2, -1, -1)
    changes = {key: x.to(DEVICE) if isinstance(x, torch.Tensor) else x
               for key, x in GAPS[name].items()}  # fmt: skip
    plan = tile_plan(key_index=index, **changes)
    tensors = [x.requires_grad_() for x in tensors]
    with deterministic_algorithms(is_deterministic):
        state = triton_backend.attend_all(*tensors, [plan], scale=0.3)
        grads = torch.autograd.grad(state.out, tensors, torch.ones_like(state.out))
    for grad in grads[1:]:
        assert grad[:, :, :8].isnan().all()  # the list of the tile of row 0
        assert not grad[:, :, 8:].isnan().any()


@pytest.mark.parametrize("rows", [20, 300])
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_a_negative_index_is_the_first_key_forward_and_backward(
    rows: int, is_deterministic: bool
) -> None:
    _, k, v = inputs()
    q = torch.randn((1, 4, rows, 16), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    found = []
    for second in (-3, 0):
        index = torch.tensor([5, second, 2], device=DEVICE).expand(1, 2, 1, -1)
        count = torch.full((1, 2, 1), 3, device=DEVICE)
        plan = tile_plan(
            key_index=index, key_count=count, heavy_count=count, tile_size=rows, num_queries=rows
        )
        tensors = [x.clone().requires_grad_() for x in (q, k, v)]
        with deterministic_algorithms(is_deterministic):
            state = triton_backend.attend_all(*tensors, [plan], scale=0.3)
            grads = torch.autograd.grad(state.out, tensors, torch.ones_like(state.out))
        found.append([state.out.detach(), state.lse.detach(), *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "ask, answer",
    [
        ("pass", False),
        ("torch.backends.cuda.matmul.allow_tf32 = True", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
        ("torch.backends.fp32_precision = 'tf32'", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", False),
    ],
)
def test_tf32_by_either_of_its_names(ask: str, answer: bool) -> None:
    """After the newer name was used, PyTorch refuses to read the older one."""
    if not hasattr(torch.backends, "fp32_precision") and "fp32_precision" in ask:
        pytest.skip("this PyTorch has the older name alone")
    code = (
        f"import torch; {ask}\n"
        "from hyperframe.kernels.triton.variants import precision\n"
        "print(precision(torch.ones(1)), precision(torch.ones(1).half()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tf32" if answer else "ieee", "ieee"]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_tensors_that_do_not_belong_together_are_refused(backend: str) -> None:
    """Kernels would read beyond their ends."""
    q, k, v = inputs()
    index = torch.arange(8, device=DEVICE).expand(1, 2, 2, 8)
    count = torch.full((1, 2, 2), 8, device=DEVICE)
    plan = TilePlan(
        key_index=index, key_count=count, heavy_count=count, tile_size=10, num_query_heads=4,
        num_queries=20, num_keys=24, disjoint=True,
    )  # fmt: skip
    kernels.attend(q, k, v, plan, scale=0.3, backend=backend)
    for key, value in ((k, v[:, :, :10]), (k, v[:, :1]), (k[..., :8], v)):
        with pytest.raises(ArgumentError, match=r"value \[batch, key_heads, n_k, d_v\]"):
            kernels.attend(q, key, value, plan, scale=0.3, backend=backend)
    for heads, dim in ((1, 16), (2, 8)):
        wrong = torch.zeros(1, heads, 4, dim, device=DEVICE)
        more = replace(plan, summary_key=wrong, summary_value=wrong)
        with pytest.raises(ArgumentError, match=r"summary_key: expected .* got \(1, "):
            kernels.attend(q, k, v, more, scale=0.3, backend=backend)
    ranks = RankRanges(
        key_rank=torch.zeros(1, 2, 1, 24, device=DEVICE),
        start=torch.zeros(1, 4, 1, 20, device=DEVICE), stop=torch.zeros(1, 4, 1, 20, device=DEVICE),
    )  # fmt: skip
    for name in ("key_rank", "start", "stop"):
        short = replace(ranks, **{name: getattr(ranks, name)[..., 1:]})
        with pytest.raises(ArgumentError, match=rf"excluded\.{name}: expected shape"):
            kernels.attend(q, k, v, replace(plan, excluded=short), scale=0.3, backend=backend)
    with pytest.raises(ArgumentError, match=r"of one dtype; got .*, .* and torch\.float64"):
        kernels.attend(q, k, v.double(), plan, scale=0.3, backend=backend)
