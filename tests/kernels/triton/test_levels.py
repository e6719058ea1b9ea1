"""Plans of several levels share launches, and give what each of them gives by itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.blockplan import BlockPlan
from hyperframe.builder import build_level_plans
from hyperframe.detectors.sort_lsh import SortLSH
from hyperframe.kernels import attend, triton_backend
from hyperframe.rectangles import causal_levels
from hyperframe.samplers.uniform import Uniform
from hyperframe.state import AttentionState, merge

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    triton_backend.why_not(DEVICE) is not None, reason=str(triton_backend.why_not(DEVICE))
)
LEAF, LENGTH = 10, 66  # three levels; the last rectangle of two of them is cut


def inputs(length: int = LENGTH) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((1, 2, length, 16), (1, 1, length, 16), (1, 1, length, 12))
    return [torch.randn(shape, generator=g).to(DEVICE) for shape in shapes]


def level_plans(*, is_uniform: bool = True, length: int = LENGTH) -> list[BlockPlan]:
    query, key, value = inputs(length)
    levels = causal_levels(length, LEAF)
    generator = torch.Generator().manual_seed(1)
    masks = SortLSH(block_size=6).find_levels(
        query, key, leaf=LEAF, levels=levels, generator=generator
    )
    assert masks is not None
    plans = build_level_plans(
        masks,
        lambda rectangles: Uniform().sample_rectangles(
            query, key, value, num_samples=5, rectangles=rectangles, generator=generator
        ),
    )
    assert plans is not None
    assert len(plans) == len(levels) == 3
    if is_uniform:
        return plans
    counts = [len(plan.rectangles) for plan in plans]
    weights = torch.arange(sum(counts) * 5, device=DEVICE).view(1, 1, -1, 5).sin()
    return [
        replace(plan, sample_log_weight=own)
        for plan, own in zip(plans, weights.split(counts, dim=2), strict=True)
    ]


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.count, self.arg_names = kernel, 0, kernel.arg_names

    def __getitem__(self, grid: Any) -> Any:
        self.count += 1
        return self.kernel[grid]


@pytest.mark.parametrize("is_uniform", [True, False])
def test_lists_of_all_levels_are_those_of_each(
    is_uniform: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyperframe.kernels.triton import arguments

    plans = level_plans(is_uniform=is_uniform)
    query = inputs()[0]
    counted = Counted(arguments.block_lists_kernel)
    monkeypatch.setattr(arguments, "block_lists_kernel", counted)
    together = arguments.views_of(plans, query)
    assert counted.count == 1
    for view, plan in zip(together, plans, strict=True):
        alone = arguments.view_of(plan, query)
        for name in ("index_ptr", "counts_ptr", "weight_ptr"):
            assert torch.equal(view.lists[name], alone.lists[name]), name


def test_plans_of_other_forms_are_laid_out_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from hyperframe.kernels.triton import arguments

    plans = level_plans()
    # the first without samples, the last with fewer of them
    plain = replace(plans[0], sample_index=None, sample_log_weight=None, key_rank=None)
    index, weight = plans[2].sample_index, plans[2].sample_log_weight
    assert index is not None
    assert weight is not None
    few = replace(plans[2], sample_index=index[..., :3], sample_log_weight=weight[..., :3])
    mixed = [plain, plans[1], few]
    query = inputs()[0]
    counted = Counted(arguments.block_lists_kernel)
    monkeypatch.setattr(arguments, "block_lists_kernel", counted)
    views = arguments.views_of(mixed, query)
    assert counted.count == 3
    for view, plan in zip(views, mixed, strict=True):
        alone = arguments.view_of(plan, query)
        for name in ("index_ptr", "counts_ptr"):
            assert torch.equal(view.lists[name], alone.lists[name]), name


def test_places_of_all_levels_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    from hyperframe.kernels.triton import arguments

    query = inputs()[0]
    views = arguments.views_of(level_plans(), query)
    lse, delta = torch.randn(2, 1, 2, LENGTH, device=DEVICE).unbind()
    counted = Counted(arguments.places_kernel)
    monkeypatch.setattr(arguments, "places_kernel", counted)
    together = arguments.places_of(views, query, lse, delta)
    assert counted.count == len({places["place_tile"] for places in together})
    assert counted.count < len(views)
    for view, places in zip(views, together, strict=True):
        (alone,) = arguments.places_of([view], query, lse, delta)
        for name in ("place_row_ptr", "place_lse_ptr", "place_delta_ptr"):
            assert torch.equal(places[name], alone[name]), name


def attended(
    plans: list[BlockPlan], leaf: int | None, dtype: torch.dtype = torch.float32
) -> tuple[AttentionState, tuple[torch.Tensor, ...]]:
    """Return the state by kernels in float32, or by meaning in float64, and gradients."""
    tensors = [x.to(dtype).requires_grad_() for x in inputs()]
    if dtype == torch.float32:
        state = triton_backend.attend_all(*tensors, plans, scale=0.3, leaf=leaf)
    else:
        states = [attend(*tensors, plan, scale=0.3, backend="reference") for plan in plans]
        if leaf is not None:
            query, key, value = tensors
            row = torch.arange(LENGTH, device=DEVICE)
            seen = (row[:, None] >= row) & (row[:, None] // leaf == row // leaf)
            logits = 0.3 * query @ key.repeat_interleave(2, 1).transpose(2, 3)
            logits = logits.masked_fill(~seen, float("-inf"))
            out = logits.softmax(-1) @ value.repeat_interleave(2, 1)
            states.append(AttentionState(out=out, lse=logits.logsumexp(-1)))
        state = merge(*states)
    weights = torch.arange(state.out.numel(), device=DEVICE).view_as(state.out).sin()
    return state, torch.autograd.grad((state.out * weights).sum(), tensors)


@pytest.mark.parametrize("is_uniform", [True, False])
def test_levels_and_leaves_are_the_reference(is_uniform: bool) -> None:
    plans = level_plans(is_uniform=is_uniform)
    state, gradients = attended(plans, LEAF + 1)
    exact, expected = attended(plans, LEAF + 1, torch.float64)
    torch.testing.assert_close(state.out.double(), exact.out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.lse.double(), exact.lse, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-4, atol=2e-5)


# ---- two chains


class Always:
    """What `Beside` is while a graph is captured, without streams."""

    is_used = True

    def __init__(self, device: torch.device, *, wanted: bool = True) -> None:
        self.is_used, self.inside = wanted, 0

    @contextmanager
    def here(self) -> Iterator[None]:
        before = torch.empty
        torch.empty = None  # type: ignore[assignment]  # nothing is allocated on the other stream
        yield
        torch.empty = before

    def join(self) -> None:
        """Nothing runs beside."""


def test_half_of_the_heads_beside_the_others_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hyperframe.kernels.triton import attend as kernels

    plans = level_plans()
    state, gradients = attended(plans, LEAF + 1)
    monkeypatch.setattr(kernels, "Beside", Always)
    counted = Counted(kernels.forward_kernel)
    monkeypatch.setattr(kernels, "forward_kernel", counted)
    halves, same = attended(plans, LEAF + 1)
    assert counted.count == 2 * len(plans)
    assert torch.equal(halves.out, state.out)
    assert torch.equal(halves.lse, state.lse)
    assert all(torch.equal(one, other) for one, other in zip(gradients, same, strict=True))


def test_nothing_runs_beside_outside_of_a_graph() -> None:
    from hyperframe.kernels.triton.beside import Beside

    beside = Beside(DEVICE)
    assert not beside.is_used
    with beside.here():
        found = torch.ones(2, device=DEVICE).sum()
    beside.join()
    assert found == 2


# ---- parts


@given(
    counts=st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=6), min_size=1, max_size=4),
    programs=st.integers(1, 200),
)
def test_parts_hold_every_tile_of_a_rectangle_once(counts: list[list[int]], programs: int) -> None:
    from hyperframe.kernels.triton.sample_gradients import _LONGEST_PART, _parts

    parts = _parts(tuple(map(tuple, counts)), programs, torch.device("cpu"))
    rows = parts.table.tolist()
    seen = []
    for plan, (tile_counts, bounds) in enumerate(zip(counts, parts.bounds, strict=True)):
        starts = [0, *itertools.accumulate(tile_counts)]
        assert bounds.shape == (len(tile_counts), 2)
        for rectangle, (first, last) in enumerate(bounds.tolist()):
            tiles = []
            for row in rows[first:last]:
                assert (row[0], row[3]) == (plan, rectangle)
                assert 0 < row[2] - row[1] < 1.5 * _LONGEST_PART + 1
                tiles += range(row[1], row[2])
            assert tiles == list(range(starts[rectangle], starts[rectangle + 1]))
            seen += range(first, last)
    assert sorted(seen) == list(range(len(rows)))
