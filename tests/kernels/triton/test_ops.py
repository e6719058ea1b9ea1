"""The operator of attention by plans: registered as torch wants, compiled, recomputed, refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from hyperframe import HyperAttention
from hyperframe.blockplan import BlockPlan
from hyperframe.errors import UnsupportedError
from hyperframe.kernels import attend, attend_all, triton_backend
from hyperframe.kernels.ops.attention import attend_plans, pack, unpack
from hyperframe.plan import RankRanges, TilePlan
from hyperframe.testing.strategies import Problem, block_plans, plans, problems
from tests.backend_laws import Plan, deterministic_algorithms, plan_on

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
runs_kernels = pytest.mark.skipif(
    triton_backend.why_not(DEVICE) is not None, reason=str(triton_backend.why_not(DEVICE))
)
# torch's own: its compiler makes an instance of the function to trace it
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
ROOT = Path(__file__).resolve().parents[3]


def inputs(*, requires_grad: bool = True, rows: int = 20) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 2, rows, 16), (1, 1, rows, 16), (1, 1, rows, 12)]
    drawn = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.to(DEVICE).requires_grad_(requires_grad) for x in drawn]


def tile_plan(*, has_floor: bool = False, rows: int = 20) -> TilePlan:
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(1, 2, 2, rows, generator=generator).argsort(dim=-1)[..., :16]
    count = torch.full((1, 2, 2), 13)
    plan = TilePlan(
        key_index=index, key_count=count, heavy_count=count - 5, tile_size=-(-rows // 2),
        num_query_heads=2, num_queries=rows, num_keys=rows, is_causal=True, disjoint=True,
        query_offset=rows - 5,  # some keys for every row: lse is finite
        log_floor=torch.zeros(1, 2, rows) if has_floor else None,
    )  # fmt: skip
    return plan_on(plan, DEVICE)  # type: ignore[return-value]


def block_plan(rows: int = 20) -> BlockPlan:
    generator = torch.Generator().manual_seed(2)
    query_order, key_order = (
        torch.rand(1, heads, rows, generator=generator).argsort(dim=-1).int() for heads in (2, 1)
    )
    index = torch.randint(rows, (1, 1, 1, 4), generator=generator)
    tiles = torch.tensor([[0, 6, 0, 6, 0], [6, rows, 6, rows, 0]], dtype=torch.int32)
    plan = BlockPlan(
        query_order=query_order, key_order=key_order, max_rows=rows - 6, max_keys=rows - 6,
        tile_counts=(2,), tiles=tiles, rectangles=((0, rows, 0, rows),), num_query_heads=2,
        num_queries=rows, num_keys=rows, sample_index=index.int(),
        key_rank=key_order.argsort(dim=-1).int(),
        sample_log_weight=torch.tensor(0.3).expand(index.shape),
    )  # fmt: skip
    return plan_on(plan, DEVICE)  # type: ignore[return-value]


SETS: dict[str, Any] = {
    "tiles": lambda: ([tile_plan()], None),
    "floor": lambda: ([tile_plan(has_floor=True)], None),
    "blocks": lambda: ([block_plan()], None),
    "blocks, tiles and leaves": lambda: ([block_plan(), tile_plan()], 6),
}


@pytest.fixture
def deterministic() -> Iterator[None]:
    with deterministic_algorithms(True):
        yield


# ---- the operator


def all_fields(plan: Any) -> dict[str, Any]:
    found = {field.name: getattr(plan, field.name) for field in fields(plan)}
    found.pop("disjoint", None)
    if isinstance(plan, TilePlan):
        found["query_offset"] = plan.position_offset
    return found


def assert_same_plan(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    other = all_fields(b)
    for name, value in all_fields(a).items():
        if isinstance(value, RankRanges):
            assert_same_plan(value, other[name])
        elif isinstance(value, torch.Tensor):
            assert value is other[name], name
        else:
            assert value == other[name], name


@given(st.data())
def test_a_packed_plan_comes_back_as_it_was(data: st.DataObject) -> None:
    problem: Problem = data.draw(problems())
    one = st.one_of(plans(problem), block_plans(problem))
    made = data.draw(st.lists(one, max_size=3))
    # one set of summaries travels with the operator: that of the only plan that has any
    with_summaries = [p for p in made if isinstance(p, TilePlan) and p.summary_key is not None]
    if with_summaries:
        made = with_summaries[:1]
    leaf = data.draw(st.sampled_from([None, 1, 7]))
    tensors, sizes = pack(made, leaf)
    assert all(x is None or isinstance(x, torch.Tensor) for x in tensors)
    assert all(type(size) is int for size in sizes)
    summaries = (made[0].summary_key, made[0].summary_value) if with_summaries else (None, None)
    found, found_leaf = unpack(tensors, sizes, *summaries)
    assert found_leaf == leaf
    for before, after in zip(made, found, strict=True):
        assert_same_plan(before, after)
        assert isinstance(after, BlockPlan) or after.disjoint


@runs_kernels
@pytest.mark.parametrize("name", ["floor", "blocks", "blocks, tiles and leaves"])
def test_the_operators_are_registered_as_torch_wants(name: str) -> None:
    made, leaf = SETS[name]()
    tensors, sizes = pack(made, leaf)
    given_inputs = inputs()
    arguments = (*given_inputs, None, None, tensors, sizes, 0.7)
    torch.library.opcheck(torch.ops.hyperframe.attend_plans.default, arguments)
    with torch.no_grad():
        out, lse, floored = torch.ops.hyperframe.attend_plans(*arguments)
    assert floored.numel() == (lse.numel() if name == "floor" else 0)
    plain = [x.detach() for x in given_inputs]
    for grad_lse in (None,) if leaf else (torch.cos(lse),):  # leaves have a path for each
        torch.library.opcheck(
            torch.ops.hyperframe.attend_plans_backward.default,
            (torch.sin(out), grad_lse, *plain, out, lse, floored, None, None, tensors, sizes, 0.7),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@runs_kernels
def test_the_operator_knows_the_shapes_with_summaries() -> None:
    made = tile_plan()
    summaries = [torch.randn(1, 1, 3, width, device=DEVICE).requires_grad_() for width in (16, 12)]
    index = made.key_index.clone()
    index[..., 0] = 22
    fields_of = {**vars(made), "key_index": index}
    fields_of |= {"summary_key": summaries[0], "summary_value": summaries[1]}
    tensors, sizes = pack([TilePlan(**fields_of)], None)
    arguments = (*inputs(), *summaries, tensors, sizes, 0.7)
    torch.library.opcheck(torch.ops.hyperframe.attend_plans.default, arguments)


# ---- gradients


def call(made: Sequence[Plan], leaf: int | None, tensors: list[torch.Tensor]) -> Any:
    return attend_all(*tensors, list(made), scale=0.5, backend="triton", leaf=leaf)


@runs_kernels
@pytest.mark.parametrize("name", SETS)
def test_either_result_may_be_the_only_one_that_is_used(name: str) -> None:
    made, leaf = SETS[name]()
    listed = [p.to_tile_plan() if isinstance(p, BlockPlan) else p for p in made]
    for used in (lambda state: state.out.square().sum(), lambda state: state.lse.square().sum()):
        results = []
        for backend, given_plans in (("triton", made), ("torch", listed)):
            tensors = inputs()
            state = attend_all(*tensors, given_plans, scale=0.5, backend=backend, leaf=leaf)
            results.append(torch.autograd.grad(used(state), tensors, allow_unused=True))
        for found, expected in zip(*results, strict=True):
            expected = torch.zeros_like(found) if expected is None else expected
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@runs_kernels
@pytest.mark.parametrize("name", ["tiles", "blocks, tiles and leaves"])
def test_inputs_without_a_gradient_get_none(name: str) -> None:
    made, leaf = SETS[name]()
    state = call(made, leaf, inputs(requires_grad=False))
    assert not state.out.requires_grad
    assert not state.lse.requires_grad
    tensors = inputs()
    full = torch.autograd.grad(call(made, leaf, tensors).out.sum(), tensors)
    for wanted in range(3):
        some = inputs(requires_grad=False)
        some[wanted].requires_grad_()
        (found,) = torch.autograd.grad(call(made, leaf, some).out.sum(), some[wanted])
        torch.testing.assert_close(found, full[wanted], rtol=1e-5, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize("name", ["tiles", "blocks"])
def test_a_second_backward_over_a_kept_graph_gives_the_same(name: str) -> None:
    made, leaf = SETS[name]()
    tensors = inputs()
    total = call(made, leaf, tensors).out.square().sum()
    first = torch.autograd.grad(total, tensors, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(total, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@runs_kernels
@pytest.mark.parametrize("name", ["tiles", "blocks"])
def test_a_gradient_of_a_gradient_is_refused_by_name(name: str) -> None:
    made, leaf = SETS[name]()
    tensors = inputs()
    state = call(made, leaf, tensors)
    slopes = torch.autograd.grad(state.out.square().sum(), tensors, create_graph=True)
    with pytest.raises(UnsupportedError, match=r"double backward.*backend='torch' has"):
        torch.autograd.grad(slopes[0].sum(), tensors)


@runs_kernels
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_call_has_the_same_bits(use_reentrant: bool) -> None:
    made, leaf = SETS["blocks"]()
    results = []
    for is_recomputed in (False, True):
        tensors = inputs()

        def run(*given_tensors: torch.Tensor) -> torch.Tensor:
            out, lse = call(made, leaf, list(given_tensors))
            return out * lse.unsqueeze(-1)

        if is_recomputed:
            out = checkpoint(run, *tensors, use_reentrant=use_reentrant)
        else:
            out = run(*tensors)
        out.square().sum().backward()
        results.append([out, *(x.grad for x in tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@runs_kernels
@pytest.mark.usefixtures("deterministic")
def test_autocast_changes_nothing() -> None:
    made, leaf = SETS["blocks, tiles and leaves"]()
    results = []
    for enabled in (False, True):
        tensors = inputs()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=enabled):
            state = call(made, leaf, tensors)
            slopes = torch.autograd.grad(state.out.square().sum() + state.lse.sum(), tensors)
        results.append([*state, *slopes])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)


# ---- compiled


def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


def assert_compiled_is_eager(function: Any) -> None:
    results = []
    for run in (function, compiled(function)):
        tensors = inputs()
        out, lse = run(*tensors)
        slopes = torch.autograd.grad(out.square().sum() + lse.cos().sum(), tensors)
        results.append([out, lse, *slopes])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize("kind", ["tiles", "blocks"])
def test_a_compiled_attend_is_one_graph_and_gives_what_eager_gives(kind: str) -> None:
    made = tile_plan() if kind == "tiles" else block_plan()

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = attend(*tensors, made, scale=0.5, backend="triton")
        return out, lse

    assert_compiled_is_eager(run)


@runs_kernels
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_compiled_call_is_one_graph_and_gives_what_eager_gives(is_causal: bool) -> None:
    attention = HyperAttention(
        detector="sort_lsh(block_size=7)", num_samples=4, min_seq_len=8, backend="triton"
    )

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return attention(*tensors, is_causal=is_causal, return_lse=True)

    assert_compiled_is_eager(run)


# ---- imports


@pytest.mark.parametrize("what", ["hyperframe", "hyperframe.kernels"])
def test_importing_does_not_import_triton(what: str) -> None:
    # torch imports what it likes: the kernels themselves have to be absent too
    code = (
        "import sys, torch; before = 'triton' in sys.modules\n"
        f"import {what}\n"
        "assert before or 'triton' not in sys.modules\n"
        "assert not any(name.startswith('hyperframe.kernels.triton.') for name in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True,
        check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_operator_exists_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, hyperframe.kernels\n"
        "torch.ops.hyperframe.attend_plans.default"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert callable(attend_plans)
