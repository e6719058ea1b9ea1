"""The conformance suite asks where it is told to: inputs, generators and backends of a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hyperframe.errors import ArgumentError
from hyperframe.testing import check_detector, parametrize_with_checks
from hyperframe.testing.checks import detector_masks
from hyperframe.testing.checks.parametrize import BoundCheck
from hyperframe.testing.checks.problem import (
    device,
    generator,
    global_seed,
    inputs,
    on_device,
)
from tests.testing.wrong_detectors import Honest

PLANS = ["plan_means_the_mask"]


def test_inputs_are_where_the_checks_ask_and_have_the_same_numbers() -> None:
    there = inputs()
    with on_device("meta"):  # a device that every build of torch has
        assert device() == torch.device("meta")
        assert all(tensor.device.type == "meta" for tensor in inputs())
        assert [x.shape for x in inputs()] == [x.shape for x in there]
    assert device() == generator().device == torch.device("cpu")
    assert all(map(torch.equal, inputs(), there))


def test_global_generators_are_seeded_watched_and_put_back() -> None:
    torch.manual_seed(5)
    expected = torch.random.get_rng_state()
    with global_seed(3) as was_drawn_from:
        assert not was_drawn_from()
        torch.rand(1)
        assert was_drawn_from()
    assert torch.equal(torch.random.get_rng_state(), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused_or_skipped() -> None:
    with pytest.raises(ArgumentError, match=r"device='cuda': torch sees no CUDA device; pass"):
        check_detector("strided(num_keys=6)", device="cuda")
    with pytest.raises(pytest.skip.Exception, match="torch sees no CUDA device"):
        BoundCheck(Honest(), "spec_round_trip", "cuda")()


def test_the_decorator_makes_a_test_for_every_device() -> None:
    @parametrize_with_checks(["strided"], kind="detector", devices=("cpu", "cuda"))
    def test_it(check: BoundCheck) -> None: ...

    (mark,) = test_it.pytestmark  # type: ignore[attr-defined]
    cases = {case.id: case.values[0] for case in mark.args[1]}
    assert cases["strided-plan_means_the_mask"].device == "cpu"
    assert cases["strided-plan_means_the_mask-cuda"].device == "cuda"


# what happens on a GPU, with the kernels in an interpreter


@pytest.fixture
def every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here: tests/gpu has this test")
    assert detector_masks._backends() == ("reference", "torch")  # not in the interpreter
    monkeypatch.setattr(detector_masks, "_backends", lambda: ("reference", "torch", "triton"))


@pytest.mark.usefixtures("every_backend")
def test_plans_are_compared_on_the_kernels_too() -> None:
    (result,) = check_detector("sliding_window(width=5)", only=PLANS)
    assert result.status == "passed"


@pytest.mark.usefixtures("every_backend")
def test_a_kernel_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    attend_all = detector_masks.attend_all

    def wrong(*args: Any, backend: str, **options: Any) -> Any:
        state = attend_all(*args, backend="torch", **options)
        if backend == "triton":
            state.out[:, :, 3] *= 1.001
        return state

    monkeypatch.setattr(detector_masks, "attend_all", wrong)
    (result,) = check_detector("sliding_window(width=5)", only=PLANS, on_fail="collect")
    assert result.status == "failed"
    assert "attention by its mask on triton" in result.message
