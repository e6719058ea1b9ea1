"""The Triton kernels compute what a plan means: on a GPU, or in the interpreter on a CPU.

A GPU compiles every combination of features, head sizes and dtypes, for seconds each; so the tests
draw few of them there, and many in the interpreter. (bfloat16 is left to the GPU: the interpreter's
matrix product does not know it.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, reject, settings
from hypothesis import strategies as st

from hyperframe.blockplan import BlockPlan
from hyperframe.errors import ArgumentError
from hyperframe.kernels import attend, attend_all, triton_backend
from hyperframe.plan import TilePlan
from hyperframe.state import AttentionState, merge
from hyperframe.testing.strategies import (
    PLAN_FEATURES,
    AttentionInputs,
    Problem,
    attention_inputs,
    block_plans,
    plans,
    problems,
)
from tests.backend_laws import (
    SCALE,
    Plan,
    PooledErrors,
    deterministic_algorithms,
    flat,
    gradients_of,
    in_dtype,
    leaves,
    on,
    plain_attention,
    plan_on,
    rounded,
    with_gradients,
)

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
# the interpreter takes a second for what a GPU does in no time, and shrinking runs many kernels
EXAMPLES = settings.default.max_examples if ON_GPU else 3
PHASES = list(Phase) if ON_GPU else [Phase.explicit, Phase.reuse, Phase.generate]
LABELS = ("out", "lse", "dq", "dk", "dv", "dsummary_key", "dsummary_value")
SMOOTH = ["plain", "ties", "duplicates", "zero_rows", "planted", "constant"]

pytestmark = pytest.mark.skipif(
    triton_backend.why_not(DEVICE) is not None, reason=str(triton_backend.why_not(DEVICE))
)
few_examples = settings(max_examples=EXAMPLES, phases=PHASES)

# the sizes that a GPU compiles for
ONE = Problem(
    batch=2, query_heads=4, key_heads=2, num_queries=15, num_keys=20, head_dim=16, value_dim=12
)
SQUARE = replace(ONE, batch=2 if ON_GPU else 1, num_queries=20)
SMALL = replace(SQUARE, batch=1, query_heads=2, key_heads=1)
SIZES = st.just(ONE) if ON_GPU else problems(max_length=7, max_heads=2)
SQUARE_SIZES = st.just(SQUARE) if ON_GPU else problems(max_length=7, max_heads=2, is_square=True)
FEATURES: list[tuple[str, ...]] = [(feature,) for feature in PLAN_FEATURES]
if ON_GPU:
    FEATURES = [
        ("order", "weights"), ("value_weights", "caps", "floor"), ("summaries", "excluded"),
        ("causal", "band"), ("grouped", "shared"), ("disjoint",),
    ]  # fmt: skip


def drawn_plans(problem: Problem, *required: str, **options: Any) -> st.SearchStrategy[TilePlan]:
    if ON_GPU:  # neither other features nor other strides
        options = {"features": (), "min_slots": 16, "max_slots": 16} | options
    return plans(problem, required=required, **options)


@pytest.fixture(params=[False, True], ids=["atomic", "deterministic"])
def deterministic(request: pytest.FixtureRequest) -> Iterator[bool]:
    with deterministic_algorithms(request.param):
        yield request.param


def by_kernels(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, *, scale: float
) -> AttentionState:
    return attend(query, key, value, plan, scale=scale, backend="triton")


def by_meaning(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, *, scale: float
) -> AttentionState:
    return attend(query, key, value, plan, scale=scale, backend="reference")


def assert_close(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float = 2e-4
) -> None:
    for label, a, b in zip(LABELS, found, expected, strict=False):
        size = max(1.0, b.abs().max().item() if b.numel() else 0.0)
        torch.testing.assert_close(
            a.double(), b.double(), rtol=tolerance, atol=tolerance * size,
            msg=lambda text, n=label: f"{n}: {text}",
        )  # fmt: skip


def compare(inputs: AttentionInputs, plan: Plan, tolerance: float = 2e-4) -> None:
    """In float32, against the reference in float64."""
    inputs = rounded(inputs, torch.float32)
    state, gradients = with_gradients(
        by_kernels, on(inputs, DEVICE), plan_on(in_dtype(plan, torch.float32), DEVICE)
    )
    exact, exact_gradients = with_gradients(
        by_meaning, rounded(inputs, torch.float64), in_dtype(plan, torch.float64)
    )
    assert torch.equal(torch.isinf(state.lse).cpu(), torch.isinf(exact.lse))
    if bool((exact.out.abs() >= 1e3).any()):
        reject()  # caps far below a logit
    assert_close(flat(state, gradients), flat(exact, exact_gradients), tolerance)


@pytest.mark.parametrize("features", FEATURES, ids="+".join)
@few_examples
@given(data=st.data(), deterministic=st.booleans())
def test_every_feature_is_the_reference(
    features: tuple[str, ...], data: st.DataObject, deterministic: bool
) -> None:
    problem = data.draw(SIZES)
    inputs = data.draw(attention_inputs(problem, structures=SMOOTH))
    plan = data.draw(drawn_plans(problem, *features))
    with deterministic_algorithms(deterministic):
        compare(inputs, plan)


# ---- block plans


def weighing_alike(plan: BlockPlan) -> BlockPlan:
    """The plan with one weight for all samples, of stride 0: that of a uniform sampler."""
    if plan.sample_log_weight is None:
        return plan
    weight = torch.tensor(0.4).expand(plan.sample_log_weight.shape)
    return replace(plan, sample_log_weight=weight)


@pytest.mark.parametrize("is_uniform", [False, True], ids=["weights", "uniform"])
@settings(max_examples=2 * EXAMPLES, phases=PHASES)
@given(data=st.data(), deterministic=st.booleans())
def test_blocks_and_their_samples_are_the_reference(
    is_uniform: bool, data: st.DataObject, deterministic: bool
) -> None:
    problem = data.draw(SIZES)
    plan = data.draw(block_plans(problem, max_samples=4 if ON_GPU else 6))
    inputs = data.draw(attention_inputs(problem, structures=SMOOTH))
    with deterministic_algorithms(deterministic):
        compare(inputs, weighing_alike(plan) if is_uniform else plan)


def long_block_plan(*, samples: int, is_uniform: bool, seed: int = 0) -> BlockPlan:
    """Two rectangles in blocks that are longer than a program takes, of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def order(heads: int, length: int) -> torch.Tensor:
        return torch.rand(1, heads, length, generator=generator).argsort(dim=-1).int()

    query_order, key_order = order(2, 150), order(1, 149)
    tiles = [[0, 70, 0, 66, 0], [70, 71, 66, 68, 0], [80, 140, 75, 130, 1]]
    rectangles = ((0, 71, 0, 68), (80, 140, 68, 149))
    index = torch.randint(149, (1, 1, 2, samples), generator=generator)
    index[..., 1] = index[..., 0]  # twice
    index[..., 2] = key_order[..., 5].long()  # held by the first tile
    log_weight = torch.randn(index.shape, generator=generator)
    log_weight[..., 4] = -math.inf
    if is_uniform:
        log_weight = torch.tensor(0.7).expand(index.shape)
    return BlockPlan(
        query_order=query_order, key_order=key_order, tiles=torch.tensor(tiles, dtype=torch.int32),
        max_rows=70, max_keys=66, tile_counts=(2, 1), rectangles=rectangles, num_query_heads=2,
        num_queries=150, num_keys=149, sample_index=index.int(), sample_log_weight=log_weight,
        key_rank=key_order.argsort(dim=-1).int(),
    ).validate()  # fmt: skip


def drawn_inputs(
    heads: int, key_heads: int, num_queries: int, num_keys: int, d: int = 16, d_v: int = 12,
    batch: int = 1, seed: int = 0,
) -> AttentionInputs:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, num_queries, d), (key_heads, num_keys, d), (key_heads, num_keys, d_v)]
    q, k, v = (torch.randn(batch, *shape, generator=generator) for shape in shapes)
    return AttentionInputs(query=q, key=k, value=v, structure="plain", seed=seed)


@pytest.mark.parametrize("is_uniform", [False, True], ids=["weights", "uniform"])
@pytest.mark.parametrize("samples", [5, 70] if ON_GPU else [70])
def test_blocks_longer_than_a_program_takes(samples: int, is_uniform: bool) -> None:
    plan = long_block_plan(samples=samples, is_uniform=is_uniform)
    compare(drawn_inputs(2, 1, 150, 149), plan)
    # rows in no tile
    state = by_kernels(*on(drawn_inputs(2, 1, 150, 149), DEVICE), plan_on(plan, DEVICE), scale=1.0)
    left_out = torch.cat([plan.query_order[..., 71:80], plan.query_order[..., 140:]], dim=-1)
    left_out = left_out.long().to(DEVICE)
    assert (state.lse.gather(-1, left_out) == -math.inf).all()
    assert (state.out.gather(2, left_out.unsqueeze(-1).expand(-1, -1, -1, 12)) == 0).all()


def test_a_sample_of_one_rectangle_does_not_reach_another() -> None:
    # weights differ between the rectangles only: still one weight for each of them
    plan = long_block_plan(samples=5, is_uniform=True)
    weight = torch.tensor([0.5, -2.0]).view(1, 1, 2, 1).expand(1, 1, 2, 5)
    compare(drawn_inputs(2, 1, 150, 149), replace(plan, sample_log_weight=weight))
    nothing = torch.tensor([-math.inf, 0.3]).view(1, 1, 2, 1).expand(1, 1, 2, 5)
    compare(drawn_inputs(2, 1, 150, 149), replace(plan, sample_log_weight=nothing))


# ---- several plans and leaves in one state


def leaf_plan(problem: Problem, leaf: int) -> TilePlan:
    """Causal attention inside runs of `leaf` rows, as explicit lists."""
    length = problem.num_keys
    tiles = -(-length // leaf)
    shape = (problem.batch, problem.key_heads, tiles)
    index = torch.arange(tiles * leaf).view(tiles, leaf)
    count = (index < length).sum(-1).expand(shape)
    return TilePlan(
        key_index=index.expand(*shape, leaf), key_count=count, heavy_count=count, tile_size=leaf,
        num_query_heads=problem.query_heads, num_queries=length, num_keys=length, is_causal=True,
        disjoint=True,
    )  # fmt: skip


@pytest.mark.parametrize("by_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.hypothesis
def test_plans_and_leaves_share_one_softmax(by_lse: bool) -> None:
    kinds = ["blocks", "tiles"] if ON_GPU else ["blocks", "tiles", "tiles", "split"]

    @settings(max_examples=EXAMPLES, phases=PHASES)
    @given(st.data(), st.booleans())
    def check(data: st.DataObject, deterministic: bool) -> None:
        with deterministic_algorithms(deterministic):
            check_one(data)

    def check_one(data: st.DataObject) -> None:
        problem = data.draw(SQUARE_SIZES)
        inputs = data.draw(attention_inputs(problem, structures=["plain", "ties"]))
        made: list[Plan] = []
        for kind in data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3)):
            if kind == "blocks":
                made.append(weighing_alike(data.draw(block_plans(problem, max_samples=4))))
            elif kind == "tiles":
                features = set(PLAN_FEATURES) - {"value_weights", "caps", "floor", "summaries"}
                options = {"features": features} if not ON_GPU else {}
                made.append(data.draw(drawn_plans(problem, "order", "weights", **options)))
            else:
                made.append(data.draw(plans(problem, features=["floor", "weights"])))
        leaf = data.draw(st.sampled_from([None, 1, 4, problem.num_keys, problem.num_keys + 3]))

        inputs = rounded(inputs, torch.float32)
        tensors, _ = leaves(on(inputs, DEVICE), made[0])
        here = [plan_on(plan, DEVICE) for plan in made]
        state = attend_all(*tensors, here, scale=SCALE, backend="triton", leaf=leaf)
        found = flat(state, gradients_of(state, tensors, inputs.seed, by_lse=by_lse))

        tensors, _ = leaves(rounded(inputs, torch.float64), made[0])
        everything = made if leaf is None else [*made, leaf_plan(problem, leaf)]
        exact = merge(*(by_meaning(*tensors, plan, scale=SCALE) for plan in everything))
        assert torch.equal(torch.isinf(state.lse).cpu(), torch.isinf(exact.lse))
        assert_close(found, flat(exact, gradients_of(exact, tensors, inputs.seed, by_lse=by_lse)))

    check()


def test_leaves_alone_are_causal_runs() -> None:
    inputs = drawn_inputs(4, 2, 20, 20)
    tensors = [x.requires_grad_() for x in on(inputs, DEVICE)]
    state = attend_all(*tensors, [], scale=SCALE, backend="triton", leaf=6)
    found = flat(state, gradients_of(state, tensors, 0))
    plan = leaf_plan(replace(SMALL, query_heads=4, key_heads=2), 6)
    exact, gradients = with_gradients(by_meaning, rounded(inputs, torch.float64), plan)
    assert_close(found, flat(exact, gradients))


def test_no_plans_and_no_leaves_are_refused() -> None:
    with pytest.raises(ArgumentError, match="no states were given"):
        attend_all(*on(drawn_inputs(1, 1, 2, 2), DEVICE), [], scale=1.0, backend="triton")


# ---- sizes


def sized_plan(
    form: str, tile_size: int, num_queries: int, num_keys: int, slots: int, *,
    ordered: bool = False, seed: int = 0,
) -> TilePlan:  # fmt: skip
    """Lists of distinct keys, a quarter of each sampled, and rows in any order if asked for."""
    generator = torch.Generator().manual_seed(tile_size + seed)
    heads = 1 if form == "grouped" else 2
    tiles = -(-num_queries // tile_size)
    lists = (1, heads, 1 if form == "shared" else tiles)
    index = torch.rand((*lists, num_keys), generator=generator).argsort(dim=-1)[..., :slots]
    count = torch.randint(slots // 2, slots + 1, lists, generator=generator)
    weight = torch.randn((*lists, slots), generator=generator)
    weight = torch.where(torch.arange(slots) < (count // 2).unsqueeze(-1), 0.0, weight)
    order = None
    if ordered:
        order = torch.rand(1, heads, tiles * tile_size, generator=generator).argsort(dim=-1)
        order = torch.where(order < num_queries, order, -1)

    def by_tile(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.expand(-1, -1, tiles, *tensor.shape[3:])

    return TilePlan(
        key_index=by_tile(index), key_count=by_tile(count), heavy_count=by_tile(count // 2),
        log_weight=by_tile(weight), query_order=order, tile_size=tile_size, num_query_heads=2,
        num_queries=num_queries, num_keys=num_keys, disjoint=True,
    )  # fmt: skip


# a multiple of what a program takes, one more and one less, and far less
TILE_SIZES = [*((size, form) for size in (1, 65, 300) for form in ("alone", "grouped", "shared"))]
TILE_SIZES += [(16, "grouped"), (63, "alone"), (64, "grouped")]


@pytest.mark.parametrize("tile_size, form", TILE_SIZES)
def test_tiles_of_any_size(tile_size: int, form: str) -> None:
    # tiles of 256 rows or more have their keys' gradients summed by key
    num_queries = {1: 7, 16: 33, 300: 310}.get(tile_size, 70)
    plan = sized_plan(form, tile_size, num_queries, 50, slots=40, ordered=tile_size != 64)
    compare(drawn_inputs(2, 1, num_queries, 50), plan)


@pytest.mark.parametrize("tile_size", [16, 300])
def test_tiles_of_any_size_deterministically(tile_size: int) -> None:
    plan = sized_plan("alone", tile_size, 310 if tile_size == 300 else 40, 50, slots=40)
    with deterministic_algorithms(True):
        compare(drawn_inputs(2, 1, plan.num_queries, 50), plan)


def test_gradients_by_slot_do_not_depend_on_how_many_tiles_are_stored_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hyperframe.kernels.triton import plan_gradients

    monkeypatch.setattr(plan_gradients, "_CHUNK_BYTES", 1)
    plan = sized_plan("grouped", 16, 40, 50, slots=40)
    with deterministic_algorithms(True):
        compare(drawn_inputs(2, 1, 40, 50), plan)


def empty_plan(kind: str) -> TilePlan:
    plan = sized_plan("alone", 4, 10, 12, slots=6)
    if kind == "no slots":
        plan = replace(plan, key_index=plan.key_index[..., :0], log_weight=plan.log_weight[..., :0])
    if kind == "no rows in any tile":
        return replace(plan, query_order=torch.full((1, 2, 12), -1))
    zero = torch.zeros_like(plan.key_count)
    return replace(plan, key_count=zero, heavy_count=zero)


@pytest.mark.parametrize("kind", ["no slots", "no used slots", "no rows in any tile"])
def test_without_keys_everything_is_zero(kind: str, deterministic: bool) -> None:
    inputs = on(drawn_inputs(2, 1, 10, 12), DEVICE)
    state, gradients = with_gradients(by_kernels, inputs, plan_on(empty_plan(kind), DEVICE))
    assert (state.lse == -math.inf).all()
    assert not state.out.any()
    assert not any(gradient.any() for gradient in gradients)


def test_some_tiles_without_keys(deterministic: bool) -> None:
    plan = sized_plan("alone", 4, 10, 12, slots=6)
    count = plan.key_count.clone()
    count[:, 0, 1] = 0
    plan = replace(plan, key_count=count, heavy_count=plan.heavy_count.minimum(count))
    compare(drawn_inputs(2, 1, 10, 12), plan)


def test_no_rows_at_all(deterministic: bool) -> None:
    plan = replace(sized_plan("alone", 4, 4, 12, slots=6), num_queries=0)
    inputs = on(drawn_inputs(2, 1, 0, 12), DEVICE)
    state, gradients = with_gradients(by_kernels, inputs, plan_on(plan, DEVICE))
    assert state.out.shape == (1, 2, 0, 12)
    assert state.lse.shape == (1, 2, 0)
    assert not any(gradient.any() for gradient in gradients)


# ---- precision, layouts, head sizes

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["tiles", "blocks"])
def test_low_precision_errs_at_most_twice_as_much_as_plain_torch(
    kind: str, dtype: torch.dtype
) -> None:
    """Relative root mean square errors against float64, pooled over some problems."""
    errors = PooledErrors(LABELS[:5])
    for seed in range(20 if ON_GPU else 4):
        plan: Plan = sized_plan("alone", 16, 20, 20, slots=16, seed=seed)
        if kind == "blocks":
            plan = square_block_plan(seed)
        inputs = rounded(drawn_inputs(2, 1, 20, 20, seed=seed), dtype)
        state, gradients = with_gradients(by_kernels, on(inputs, DEVICE), plan_on(plan, DEVICE))
        assert state.out.dtype == dtype
        assert state.lse.dtype == torch.float32
        errors.add(
            flat(state, gradients), flat(*with_gradients(plain_attention, inputs, plan)),
            flat(*with_gradients(by_meaning, rounded(inputs, torch.float64), plan)),
        )  # fmt: skip
    errors.check()


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows side by side": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "a gap behind every row": lambda x: F.pad(x, (0, 3), value=math.nan)[..., :-3],
    "dimensions apart": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "one head for all": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("kind", ["tiles", "blocks"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_inputs_do_not_matter(layout: str, kind: str) -> None:
    change = LAYOUTS[layout]
    inputs = on(drawn_inputs(2, 1, 20, 20), DEVICE)
    plan = plan_on(leaf_plan(SMALL, 11) if kind == "tiles" else square_block_plan(seed=1), DEVICE)
    results = []
    for how in (change, lambda x: change(x).contiguous()):
        tensors = [x.clone().requires_grad_() for x in inputs]
        state = by_kernels(*(how(x) for x in tensors), plan, scale=SCALE)
        grad = change(torch.linspace(-1, 1, state.out.numel()).view(state.out.shape).to(DEVICE))
        if how is not change:
            grad = grad.contiguous()
        slopes = torch.autograd.grad((state.out, state.lse), tensors, (grad, state.lse.cos()))
        results.append([state.out, state.lse, *slopes])
    assert_close(*results, tolerance=1e-6)


def square_block_plan(seed: int, *, samples: int = 4) -> BlockPlan:
    """Twenty rows and keys in two blocks of one rectangle, with samples of a weight each."""
    generator = torch.Generator().manual_seed(seed)
    query_order, key_order = (
        torch.rand(1, heads, 20, generator=generator).argsort(dim=-1).int() for heads in (2, 1)
    )
    index = torch.randint(20, (1, 1, 1, samples), generator=generator)
    return BlockPlan(
        query_order=query_order, key_order=key_order, max_rows=14, max_keys=14, tile_counts=(2,),
        tiles=torch.tensor([[0, 6, 0, 6, 0], [6, 20, 6, 20, 0]], dtype=torch.int32),
        rectangles=((0, 20, 0, 20),), num_query_heads=2, num_queries=20, num_keys=20,
        sample_index=index.int(), key_rank=key_order.argsort(dim=-1).int(),
        sample_log_weight=torch.randn(index.shape, generator=generator),
    ).validate()  # fmt: skip


HEAD_DIMS = [(24, 48), (80, 16), (128, 64), (256, 256)]
if not ON_GPU:
    HEAD_DIMS += [(16, 24), (48, 80), (64, 128), (1, 3), (16, 256)]


@pytest.mark.parametrize("d, d_v", HEAD_DIMS)
def test_any_head_size_is_taken(d: int, d_v: int) -> None:
    inputs = drawn_inputs(2, 1, 20, 20, d, d_v)
    inputs = replace(inputs, query=inputs.query * d**-0.5)
    compare(inputs, leaf_plan(SMALL, 11))
    if d < 256 and not (ON_GPU and d == 80):
        compare(inputs, square_block_plan(seed=2))


@pytest.mark.parametrize("scale", [0.0, -0.6, 1e-36])
def test_any_scale_is_taken(scale: float) -> None:
    inputs = drawn_inputs(2, 1, 20, 20)
    for plan, leaf in ((leaf_plan(SMALL, 11), None), (square_block_plan(seed=3), 4)):
        results = []
        for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
            tensors, _ = leaves(on(rounded(inputs, dtype), DEVICE), plan)
            state = attend_all(
                *tensors, [plan_on(plan, DEVICE)], scale=scale, backend=backend, leaf=leaf
            )
            results.append(flat(state, gradients_of(state, tensors, 0, by_lse=leaf is None)))
        assert_close(*results)


# ---- what is not written, not named, not promised to be in order


def poison(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Let new memory hold NaN, or large integers; return the shapes that were asked for."""
    seen = []

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor.shape)
        if tensor.is_floating_point():
            return tensor.fill_(math.nan)
        return tensor.fill_(torch.iinfo(tensor.dtype).max // 2)

    for owner, name in (
        (torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"),
        (torch, "empty_strided"),
    ):  # fmt: skip
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *x, make=make, **y: fill(make(*x, **y)))
    return seen


LEAVES = "leaves and blocks"
# a plan and leaves, or several: everything that shares memory
SETS: dict[str, Callable[[], tuple[list[Plan], int | None]]] = {
    "tiles": lambda: ([leaf_plan(SMALL, 11)], None),
    "ordered tiles": lambda: ([ordered_plan()], None),
    "blocks": lambda: ([square_block_plan(seed=4)], None),
    "uniform blocks": lambda: ([weighing_alike(square_block_plan(seed=4))], None),
    "all keys": lambda: ([all_keys(square_block_plan(seed=4))], None),
    "rows left out": lambda: ([some_rows(square_block_plan(seed=4))], None),
    LEAVES: lambda: ([some_rows(square_block_plan(seed=5))], 4),
    "blocks and tiles": lambda: ([square_block_plan(seed=6), ordered_plan()], None),
}


def ordered_plan() -> TilePlan:
    """Two tiles of ten slots, two of them empty, that leave two rows out."""
    generator = torch.Generator().manual_seed(8)
    order = torch.rand(1, 2, 20, generator=generator).argsort(dim=-1)
    index = torch.rand(1, 2, 2, 16, generator=generator).argsort(dim=-1)
    count = torch.full((1, 2, 2), 9)
    return TilePlan(
        key_index=index, key_count=count, heavy_count=count, tile_size=10, num_query_heads=2,
        num_queries=20, num_keys=20, query_order=torch.where(order < 18, order, -1), disjoint=True,
    ).validate()  # fmt: skip


def all_keys(plan: BlockPlan) -> BlockPlan:
    """The plan, vouching that it holds every key."""
    return replace(plan, covers_all_keys=True).validate()


def some_rows(plan: BlockPlan) -> BlockPlan:
    """The plan without its last rows and keys."""
    tiles = plan.tiles.clone()
    tiles[1] = torch.tensor([6, 15, 6, 16, 0])
    return replace(plan, tiles=tiles, rectangles=((0, 15, 0, 16),)).validate()


def run_set(name: str, inputs: AttentionInputs, *, by_lse: bool = False) -> list[torch.Tensor]:
    made, leaf = SETS[name]()
    tensors = [x.clone().requires_grad_() for x in on(inputs, DEVICE)]
    here = [plan_on(plan, DEVICE) for plan in made]
    state = attend_all(*tensors, here, scale=SCALE, backend="triton", leaf=leaf)
    gradients = gradients_of(state, tensors, inputs.seed, by_lse=by_lse)
    return [x.detach() for x in (*state, *gradients)]


# blocks run the same kernels in both modes
IN_NEW_MEMORY = [(name, True, False) for name in SETS] + [(LEAVES, False, False)]
IN_NEW_MEMORY += [(name, True, True) for name in SETS if "tiles" in name]


@pytest.mark.parametrize("name, by_lse, is_deterministic", IN_NEW_MEMORY)
def test_all_memory_is_written_before_it_is_read(
    name: str, by_lse: bool, is_deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = drawn_inputs(2, 1, 20, 20)
    with deterministic_algorithms(is_deterministic):
        expected = run_set(name, inputs, by_lse=by_lse)
        asked_for = poison(monkeypatch)
        found = run_set(name, inputs, by_lse=by_lse)
    assert asked_for
    assert all(torch.isfinite(x).all() for x in (found[0], *found[2:]))
    assert not torch.isnan(found[1]).any()
    if ON_GPU and not is_deterministic:
        assert_close(found, expected, tolerance=1e-5)  # atomic additions come in any order
        return
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["ordered tiles", "uniform blocks", LEAVES, "blocks and tiles"])
def test_the_same_call_gives_the_same_bits(name: str) -> None:
    inputs = drawn_inputs(2, 1, 20, 20)
    with deterministic_algorithms(True):
        first, second = (run_set(name, inputs, by_lse=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    fast = run_set(name, inputs, by_lse=True)
    # the forward is the same in both modes; gradients that are added atomically may not be
    assert all(torch.equal(a, b) for a, b in zip(fast[:2], first[:2], strict=True))
    assert_close(fast, first, tolerance=1e-5)


def unnamed_keys(plan: Plan, key_heads: int) -> torch.Tensor:
    """Keys that stand in no list: bool `[batch, key_heads, n_k]`."""
    if isinstance(plan, BlockPlan):
        plan = plan.to_tile_plan()
    index = plan.key_index.long()
    used = torch.arange(index.shape[-1]) < plan.key_count.unsqueeze(-1)
    width = plan.num_keys + plan.num_summaries
    index = torch.where(used, index, width).flatten(2)
    named = torch.zeros(*index.shape[:2], width + 1, dtype=torch.bool).scatter_(2, index, True)
    named = named.unflatten(1, (key_heads, -1)).any(dim=2)
    return ~named[..., : plan.num_keys]


@pytest.mark.hypothesis
@pytest.mark.parametrize("kind", ["tiles", "blocks"])
def test_keys_in_no_list_are_not_read(kind: str) -> None:
    @settings(max_examples=EXAMPLES, phases=PHASES)
    @given(st.data(), st.booleans())
    def check(data: st.DataObject, deterministic: bool) -> None:
        with deterministic_algorithms(deterministic):
            check_one(data)

    def check_one(data: st.DataObject) -> None:
        problem = data.draw(SIZES)
        if kind == "blocks":
            plan: Plan = data.draw(block_plans(problem, max_samples=4))
        else:
            features = set(PLAN_FEATURES) - {"summaries"}
            options = {} if ON_GPU else {"features": features}
            plan = data.draw(drawn_plans(problem, "order", **options))
        inputs = rounded(data.draw(attention_inputs(problem, structures=["plain"])), torch.float32)
        hidden = unnamed_keys(plan, problem.key_heads).unsqueeze(-1)
        results = []
        for filler in (0.0, math.nan):
            k, v = (x.masked_fill(hidden, filler) for x in (inputs.key, inputs.value))
            given_inputs = on(replace(inputs, key=k, value=v), DEVICE)
            results.append(flat(*with_gradients(by_kernels, given_inputs, plan_on(plan, DEVICE))))
        for label, clean, found in zip(LABELS, *results, strict=False):
            assert torch.isfinite(found).all(), label
            torch.testing.assert_close(found, clean, rtol=1e-5, atol=1e-6)

    check()


# ---- indices that do not exist


def broken_plan() -> TilePlan:
    """Two tiles for each head; the second of head 1 names keys far outside."""
    plan = sized_plan("alone", 8, 16, 20, slots=16)
    index = plan.key_index.clone()
    index[0, 1, 1, :5] = torch.tensor([10**6, -5, 20, -(10**6), 2**31 - 1])
    return replace(plan, key_index=index.int())


@pytest.mark.parametrize("bad", [10**6, -5])
def test_debugging_finds_indices_that_do_not_exist(
    bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = sized_plan("alone", 8, 16, 20, slots=16)
    index = plan.key_index.clone()
    index[0, 1, 1, 0] = bad
    plan = plan_on(replace(plan, key_index=index), DEVICE)
    inputs = on(drawn_inputs(2, 1, 16, 20), DEVICE)
    monkeypatch.setenv("HYPERFRAME_DEBUG", "1")
    with pytest.raises(ArgumentError, match=rf"key_index: {bad} is outside 0\.\.19"):
        by_kernels(*inputs, plan, scale=1.0)
    monkeypatch.setenv("HYPERFRAME_DEBUG", "0")
    by_kernels(*inputs, plan, scale=1.0)


def test_indices_that_do_not_exist_are_not_read(deterministic: bool) -> None:
    inputs = on(drawn_inputs(2, 1, 16, 20), DEVICE)
    good = plan_on(sized_plan("alone", 8, 16, 20, slots=16), DEVICE)
    expected, _ = with_gradients(by_kernels, inputs, good)
    found, gradients = with_gradients(by_kernels, inputs, plan_on(broken_plan(), DEVICE))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[:, 0], b[:, 0])
        assert torch.equal(a[:, 1, :8], b[:, 1, :8])
        assert torch.isfinite(a).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_debugging_finds_blocks_that_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = square_block_plan(seed=7)
    tiles = plan.tiles.clone()
    tiles[1, 2] = 5
    tiles[1, 3] = 12
    plan = plan_on(replace(plan, tiles=tiles), DEVICE)
    monkeypatch.setenv("HYPERFRAME_DEBUG", "1")
    with pytest.raises(ArgumentError, match=r"tiles: the key range 5\.\.12 overlaps"):
        by_kernels(*on(drawn_inputs(2, 1, 20, 20), DEVICE), plan, scale=1.0)
