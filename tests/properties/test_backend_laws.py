"""The torch backend computes what a plan means: outputs, normalisers and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hyperframe.kernels import reference, torch_backend
from hyperframe.plan import TilePlan
from hyperframe.state import AttentionState
from hyperframe.testing.strategies import (
    PLAN_FEATURES,
    STRUCTURES,
    AttentionInputs,
    Problem,
    attention_inputs,
    plans,
    problems,
)
from tests.backend_laws import (
    SCALE,
    TYPICAL,
    in_dtype,
    leaves,
    plain_attention,
    rounded,
    with_gradients,
)


def assert_states_close(a: AttentionState, b: AttentionState, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a.out, b.out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.lse, b.lse, rtol=tolerance, atol=tolerance)


@settings(max_examples=4 * settings.default.max_examples)
@given(attention_inputs(), plans())
def test_the_torch_backend_is_the_reference_in_float64(
    inputs: AttentionInputs, plan: TilePlan
) -> None:
    state, gradients = with_gradients(torch_backend.attend, inputs, plan)
    expected, expected_gradients = with_gradients(reference.attend, inputs, plan)
    torch.testing.assert_close(state.lse, expected.lse, rtol=1e-9, atol=1e-9)
    # a cap hundreds below a logit: outputs near the largest float64 are saturated
    assume(bool((expected.out.abs() < 1e150).all()))
    assert_states_close(state, expected)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        size = max(1.0, other.abs().max().item())
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-9 * size)


@pytest.mark.hypothesis
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_errs_at_most_twice_as_much_as_plain_torch(dtype: torch.dtype) -> None:
    """Relative root mean square errors against float64, pooled over the drawn problems.

    Pooled, because in one problem a few entries may decide, and their errors are a matter of luck.
    """
    labels = ("out", "lse", "dq", "dk", "dv", "dsummary_key", "dsummary_value")
    ours, theirs = torch.zeros(2, len(labels), dtype=torch.float64)

    @given(attention_inputs(TYPICAL), plans(TYPICAL, min_slots=16, max_slots=48))
    def add_errors(inputs: AttentionInputs, plan: TilePlan) -> None:
        inputs = rounded(inputs, dtype)
        state, gradients = with_gradients(torch_backend.attend, inputs, in_dtype(plan, dtype))
        plain, plain_gradients = with_gradients(plain_attention, inputs, in_dtype(plan, dtype))
        exact, exact_gradients = with_gradients(
            reference.attend, rounded(inputs, torch.float64), in_dtype(plan, torch.float64)
        )
        assert state.out.dtype == dtype
        assert state.lse.dtype == torch.float32
        assert torch.equal(torch.isinf(state.lse), torch.isinf(exact.lse))
        found, other, true = (
            [x.out, x.lse.masked_fill(torch.isinf(exact.lse), 0), *slopes]
            for x, slopes in (
                (state, gradients), (plain, plain_gradients), (exact, exact_gradients),
            )
        )  # fmt: skip
        # caps far below a logit take plain torch out of its range
        assume(all(bool(torch.isfinite(x).all()) for x in other))
        for errors, results in ((ours, found), (theirs, other)):
            for number, (result, truth) in enumerate(zip(results, true, strict=True)):
                size = truth.detach().square().mean().clamp(min=1e-30)
                errors[number] += (result.detach().double() - truth.detach()).square().mean() / size

    add_errors()
    for label, error, plain_error in zip(labels, ours.sqrt(), theirs.sqrt(), strict=True):
        assert error <= 2 * plain_error, (label, error / plain_error)


SMOOTH = [structure for structure in STRUCTURES if structure != "huge_norms"]
SMALL = problems(max_length=5, max_dim=3, max_batch=1)


def small_inputs_and_plan(problem: Problem):  # type: ignore[no-untyped-def]
    by_feature = {name: plans(problem, required=[name], max_slots=5) for name in PLAN_FEATURES}
    return st.tuples(
        attention_inputs(problem, structures=SMOOTH), st.fixed_dictionaries(by_feature)
    )


@pytest.mark.parametrize("feature", PLAN_FEATURES)
@settings(max_examples=max(3, settings.default.max_examples // 6))
@given(SMALL.flatmap(small_inputs_and_plan))
def test_gradients_are_those_of_the_forward(
    feature: str, case: tuple[AttentionInputs, dict[str, TilePlan]]
) -> None:
    # through out and lse, by finite differences; random caps and floors lie away from the kinks
    tensors, plan = leaves(case[0], case[1][feature])

    def attend(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        used = plan
        if len(tensors) > 3:
            used = replace(plan, summary_key=tensors[3], summary_value=tensors[4])
        out, lse = torch_backend.attend(*tensors[:3], used, scale=SCALE)
        return out, lse.masked_fill(torch.isinf(lse), 0)

    assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)


@given(attention_inputs(), plans())
def test_results_do_not_depend_on_how_tiles_are_cut(
    inputs: AttentionInputs, plan: TilePlan
) -> None:
    whole, gradients = with_gradients(torch_backend.attend, inputs, plan)
    counts = torch_backend.visible_keys(plan, key_heads=inputs.key.shape[1])
    # a few tiles at a time; single tiles; two rows of a tile at a time
    for size, fewest in ((3000, 64), (1, 64), (1, 2)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_backend, "CHUNK_BYTES", size)
            patch.setattr(torch_backend, "_FEWEST_ROWS", fewest)
            cut, cut_gradients = with_gradients(torch_backend.attend, inputs, plan)
            cut_counts = torch_backend.visible_keys(plan, key_heads=inputs.key.shape[1])
        assert_states_close(cut, whole, 1e-12)
        assert torch.equal(cut_counts, counts)
        for gradient, other in zip(cut_gradients, gradients, strict=True):
            size = max(1.0, other.abs().max().item())
            torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-11 * size)


@given(attention_inputs(), plans())
def test_strides_of_the_inputs_do_not_matter(inputs: AttentionInputs, plan: TilePlan) -> None:
    def strided(tensor: torch.Tensor) -> torch.Tensor:
        # [batch, length, heads, dim] in memory, with a gap behind every row
        wide = tensor.new_full((*tensor.transpose(1, 2).shape[:3], tensor.shape[-1] + 3), torch.nan)
        wide[..., : tensor.shape[-1]] = tensor.transpose(1, 2)
        return wide[..., : tensor.shape[-1]].transpose(1, 2)

    expected = torch_backend.attend(*inputs, plan, scale=SCALE)
    found = torch_backend.attend(*(strided(tensor) for tensor in inputs), plan, scale=SCALE)
    assert_states_close(found, expected, 1e-12)


@given(attention_inputs(), plans())
def test_expanded_keys_collect_the_gradients_of_all_their_copies(
    inputs: AttentionInputs, plan: TilePlan
) -> None:
    query, key, value = inputs
    key, value = key[:, :, :1].clone().requires_grad_(), value[:, :, :1].clone().requires_grad_()
    found = []
    for copy in (torch.Tensor.expand, lambda x, *shape: x.expand(*shape).contiguous()):
        many = [copy(x, -1, -1, inputs.key.shape[2], -1) for x in (key, value)]
        state = torch_backend.attend(query, *many, plan, scale=SCALE)
        lse = state.lse.masked_fill(torch.isinf(state.lse), 0)
        found.append(
            [state.out, lse, *torch.autograd.grad(state.out.sum() + lse.sum(), (key, value))]
        )
    torch.testing.assert_close(found[0], found[1])
