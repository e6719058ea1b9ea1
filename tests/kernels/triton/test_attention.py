"""The Triton kernels compute what a plan means: on a GPU, or in the interpreter on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, assume, given, settings

from hyperframe.kernels import reference, triton_backend
from hyperframe.plan import TilePlan
from hyperframe.state import AttentionState
from hyperframe.testing.strategies import (
    PLAN_FEATURES,
    AttentionInputs,
    Problem,
    attention_inputs,
    plans,
    problems,
)
from tests.backend_laws import TYPICAL, in_dtype, on, plain_attention, plan_on, rounded, with_gradients

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# the interpreter takes a second for what a GPU does in no time
EXAMPLES = settings.default.max_examples if DEVICE.type == "cuda" else 6
# shrinking runs kernels by the hundred
PHASES = list(Phase) if DEVICE.type == "cuda" else [Phase.explicit, Phase.reuse, Phase.generate]
LABELS = ("out", "lse", "dq", "dk", "dv", "dsummary_key", "dsummary_value")

pytestmark = pytest.mark.skipif(
    triton_backend.why_not(DEVICE) is not None, reason=str(triton_backend.why_not(DEVICE))
)


@pytest.fixture(params=[False, True], ids=["atomic", "deterministic"])
def deterministic(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: TilePlan, *, scale: float
) -> AttentionState:
    return triton_backend.attend_all(query, key, value, [plan], scale=scale)


def results(
    state: AttentionState, gradients: list[torch.Tensor]
) -> list[torch.Tensor]:  # fmt: skip
    lse = state.lse.masked_fill(torch.isinf(state.lse), 0)
    return [x.detach().double().cpu() for x in (state.out, lse, *gradients)]


def compare(inputs: AttentionInputs, plan: TilePlan, tolerance: float = 2e-4) -> None:
    """In float32, against the reference in float64."""
    single = on(rounded(inputs, torch.float32), DEVICE)
    state, gradients = with_gradients(attend, single, plan_on(in_dtype(plan, torch.float32), DEVICE))
    exact, exact_gradients = with_gradients(
        reference.attend, rounded(rounded(inputs, torch.float32), torch.float64),
        in_dtype(plan, torch.float64),
    )  # fmt: skip
    assert torch.equal(torch.isinf(state.lse).cpu(), torch.isinf(exact.lse))
    assume(bool((exact.out.abs() < 1e3).all()))  # caps far below a logit
    found, expected = results(state, gradients), results(exact, exact_gradients)
    for label, a, b in zip(LABELS, found, expected, strict=False):
        size = max(1.0, b.abs().max().item())
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance * size, msg=lambda text, n=label: f"{n}: {text}"
        )


SMOOTH = ["plain", "ties", "duplicates", "zero_rows", "planted", "constant"]


@pytest.mark.parametrize("feature", PLAN_FEATURES)
@pytest.mark.hypothesis
def test_every_feature_is_the_reference(feature: str, deterministic: bool) -> None:
    @settings(max_examples=EXAMPLES, phases=PHASES)
    @given(attention_inputs(structures=SMOOTH), plans(required=[feature]))
    def check(inputs: AttentionInputs, plan: TilePlan) -> None:
        compare(inputs, plan)

    check()
