"""Running the checks of a kind on a component, one by one, and saying what came of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

import torch

from ...component import AbstractComponent
from ...errors import ArgumentError, ArgumentTypeError, UnsupportedError, did_you_mean
from . import (
    component_checks,
    detector_causality,
    detector_checks,
    detector_masks,
    estimator_checks,
    estimator_statistics,
    sampler_checks,
    sampler_independence,
    sampler_masks,
    sampler_statistics,
)
from .problem import CheckSkippedError, on_device, why_no_device
from .results import CheckResult, ConformanceError, as_expected, place_of, report

__all__ = [
    "CHECKS",
    "check_detector",
    "check_estimator",
    "check_sampler",
    "checks_of",
    "component_of",
    "run_check",
    "run_checks",
]

Check = Callable[[Any], None]


def _checks_in(*modules: ModuleType) -> dict[str, Check]:
    named = [name for module in modules for name in module.__all__ if name.startswith("check_")]
    found = {
        name.removeprefix("check_"): getattr(module, name)
        for module in modules
        for name in module.__all__
        if name.startswith("check_")
    }
    assert len(found) == len(named), "two checks of one kind have the same name"
    return found


CHECKS: dict[str, dict[str, Check]] = {
    "detector": _checks_in(component_checks, detector_checks, detector_masks, detector_causality),
    "sampler": _checks_in(
        component_checks, sampler_checks, sampler_independence, sampler_statistics, sampler_masks
    ),
    "estimator": _checks_in(component_checks, estimator_checks, estimator_statistics),
}
"""The checks of each kind by name, `check_` left out."""


def checks_of(component: AbstractComponent | str) -> dict[str, Check]:
    """Return the checks of a component, or of a kind, by name."""
    return CHECKS[component if isinstance(component, str) else component.kind]


def component_of(component: Any, kind: str | None = None) -> AbstractComponent:
    """Make a component to check: from an instance, a class, a name or a spec string.

    Args:
        component: a class is created with its defaults.
        kind: which registry a string is looked up in, and what the component has to be.

    Raises:
        ArgumentTypeError: it is none of those, or of another kind.
    """
    if isinstance(component, str):
        if kind is None:
            raise ArgumentTypeError(
                f"{component!r}: text alone does not say of which kind it is; pass an instance, "
                f'for example detectors.create("{component}"), or kind="detector"'
            )
        made = component_checks.registry_of(kind).create(component)
    else:
        is_class = isinstance(component, type) and issubclass(component, AbstractComponent)
        made = component() if is_class else component
    if not isinstance(made, AbstractComponent) or made.kind not in CHECKS:
        raise ArgumentTypeError(
            f"{component!r}: has type {type(component).__name__}; pass a component, its class, or "
            "a spec string"
        )
    if kind is not None and made.kind != kind:
        raise ArgumentTypeError(
            f"{component!r} is of kind {made.kind}; check it with check_{made.kind}"
        )
    return made


def run_check(component: AbstractComponent, name: str) -> CheckResult:
    """Run one check, whatever it raises."""
    start = time.perf_counter()
    status: Any = "passed"
    message = ""
    caught: BaseException | None = None
    try:
        checks_of(component)[name](component)
    except CheckSkippedError as error:
        status, message, caught = "skipped", str(error), error
    except UnsupportedError as error:  # an answer too; that something is answered is checked
        status, message = "skipped", f"refused by name: {error}"
        caught = CheckSkippedError(message)
    except AssertionError as error:
        status, message, caught = "failed", str(error), error
    except Exception as error:  # a check that breaks is a check that fails
        status, caught, where = "failed", error, place_of(error, component)
        message = f"{component!r}: raised {type(error).__name__} at {where}: {error}"
    return CheckResult(
        name=name, component=repr(component), status=status, message=message,
        seconds=time.perf_counter() - start, error=caught,
    )  # fmt: skip


def run_checks(
    component: Any, kind: str | None = None, *, on_fail: str = "raise",
    expected_failed_checks: Mapping[str, str] | None = None, only: Collection[str] | None = None,
    device: torch.device | str = "cpu",
) -> list[CheckResult]:  # fmt: skip
    """Run the checks of a component; see `check_detector`."""
    if on_fail not in ("raise", "collect"):
        raise ArgumentError(f"on_fail={on_fail!r} is no choice; pass 'raise' or 'collect'")
    made = component_of(component, kind)
    expected, checks = dict(expected_failed_checks or {}), checks_of(made)
    check_names(made.kind, (*expected, *(only or ())))
    chosen = [name for name in checks if only is None or name in only]
    if reason := why_no_device(device):
        raise ArgumentError(f"device={device!r}: {reason}; pass device='cpu'")
    with on_device(device):
        results = [as_expected(run_check(made, name), expected.get(name)) for name in chosen]
    if on_fail == "raise" and any(result.is_failure for result in results):
        raise ConformanceError(report(made, results))
    return results


def check_names(kind: str, names: Collection[str]) -> None:
    """Refuse names that are no checks of a kind."""
    for name in names:
        if name not in CHECKS[kind]:
            raise ArgumentError(
                f"there is no check {name!r} of a {kind}; they are {', '.join(CHECKS[kind])}."
                f"{did_you_mean(name, CHECKS[kind])}"
            )


def check_detector(
    detector: Any, *, on_fail: str = "raise",
    expected_failed_checks: Mapping[str, str] | None = None, only: Collection[str] | None = None,
    device: torch.device | str = "cpu",
) -> list[CheckResult]:  # fmt: skip
    """Check that a detector keeps what the library relies on.

    Args:
        detector: an instance, a class (checked with its defaults), a name or a spec string. Small
            parameters check more: with 40 keys, a budget of 256 holds everything.
        on_fail: "raise", or "collect" to get failures among the results.
        expected_failed_checks: names of checks that are known to fail, each with its reason. One
            that passes is a failure: expect it no longer.
        only: names of the checks to run; None runs all.
        device: where the inputs and the generators are, for example "cuda": the checks are the same
            ones, and its plans are computed by the kernels of that device too.

    Returns:
        The result of every check, in order.

    Raises:
        ConformanceError: an `AssertionError` that reports all failures.

    Example:
        >>> results = check_detector("sliding_window(width=5)", only=["spec_round_trip"])
        >>> [(result.name, result.status) for result in results]
        [('spec_round_trip', 'passed')]
    """
    return run_checks(
        detector, "detector", on_fail=on_fail, expected_failed_checks=expected_failed_checks,
        only=only, device=device,
    )  # fmt: skip


def check_sampler(
    sampler: Any, *, on_fail: str = "raise",
    expected_failed_checks: Mapping[str, str] | None = None, only: Collection[str] | None = None,
    device: torch.device | str = "cpu",
) -> list[CheckResult]:  # fmt: skip
    """Check that a sampler keeps what the library relies on; arguments as for `check_detector`.

    Example:
        >>> results = check_sampler("uniform", only=["weights_are_true"])
        >>> [(result.name, result.status) for result in results]
        [('weights_are_true', 'passed')]
    """
    return run_checks(
        sampler, "sampler", on_fail=on_fail, expected_failed_checks=expected_failed_checks,
        only=only, device=device,
    )  # fmt: skip


def check_estimator(
    estimator: Any, *, on_fail: str = "raise",
    expected_failed_checks: Mapping[str, str] | None = None, only: Collection[str] | None = None,
    device: torch.device | str = "cpu",
) -> list[CheckResult]:  # fmt: skip
    """Check that an estimator keeps what the library relies on; arguments as for `check_detector`.

    Example:
        >>> results = check_estimator("uniform", only=["full_mask_is_exact"])
        >>> [(result.name, result.status) for result in results]
        [('full_mask_is_exact', 'passed')]
    """
    return run_checks(
        estimator, "estimator", on_fail=on_fail, expected_failed_checks=expected_failed_checks,
        only=only, device=device,
    )  # fmt: skip
