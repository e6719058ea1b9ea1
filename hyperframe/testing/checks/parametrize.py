"""The checks as pytest tests: one test for every component and check."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...component import AbstractComponent
from ...errors import ArgumentError, MissingDependencyError
from .problem import CheckSkippedError, on_device, why_no_device
from .results import CheckResult
from .runner import check_names, checks_of, component_of, run_check

__all__ = ["BoundCheck", "parametrize_with_checks"]

Expected = Mapping[str, str]


@dataclass(frozen=True)
class BoundCheck:
    """A check with the component to check: call it to run it.

    Args:
        component: what is checked.
        name: name of the check.
        device: where its inputs are.
    """

    component: AbstractComponent
    name: str
    device: str = "cpu"

    def __call__(self) -> CheckResult:
        """Run the check; raise what it raises, and skip the test where it does not apply."""
        if reason := why_no_device(self.device):
            _pytest().skip(reason)
        with on_device(self.device):
            result = run_check(self.component, self.name)
        if isinstance(result.error, CheckSkippedError):
            _pytest().skip(result.message)
        if result.error is not None:
            raise result.error
        return result


def parametrize_with_checks(
    components: Sequence[Any], *, kind: str | None = None,
    expected_failed_checks: Expected | Callable[[Any], Expected] | None = None,
    marks: Callable[[AbstractComponent, str], Any] | None = None,
    devices: Sequence[str] = ("cpu",),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:  # fmt: skip
    """Make a pytest test of every check of every component.

    The decorated function takes one argument, and calls it (or takes a component and a name and
    does what it likes):

        @parametrize_with_checks([MyDetector(width=3)])
        def test_it_conforms(check):
            check()

    Tests are named by component and check: `my_detector(width=3)-nnz...`. Checks that do not apply
    are skipped with their reason.

    Args:
        components: instances, classes, or spec strings of `kind`.
        kind: "detector", "sampler" or "estimator", for strings.
        expected_failed_checks: names of checks that are known to fail, with reasons, the same for
            all components; or a function that gives those of one. They are marked as strict
            expected failures: one that passes fails the test.
        marks: called with a component and the name of a check, returns pytest marks or None.
        devices: where to ask, for example `("cpu", "cuda")`: a test for each, named after it, which
            is skipped where there is no such device.

    Raises:
        MissingDependencyError: pytest is not installed.
        ArgumentError: a name is no check.
    """
    pytest = _pytest()
    cases = []
    for given in components:
        component = component_of(given, kind)
        expected = expected_failed_checks or {}
        if callable(expected):
            expected = expected(component)
        check_names(component.kind, tuple(expected))
        for name in checks_of(component):
            extra = marks(component, name) if marks is not None else None
            found = [] if extra is None else list(extra) if isinstance(extra, list) else [extra]
            if name in expected:
                found.append(pytest.mark.xfail(strict=True, reason=expected[name]))
            for device in devices:
                case = BoundCheck(component, name, device)
                label = f"{_label(component)}-{name}" + ("" if device == "cpu" else f"-{device}")
                cases.append(pytest.param(case, id=label, marks=found))

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(test).parameters)
        if not parameters:
            raise ArgumentError(
                f"{getattr(test, '__name__', test)}: it takes no argument; write "
                "def test_it_conforms(check): check()"
            )
        decorated: Callable[..., Any] = pytest.mark.parametrize(parameters[0], cases)(test)
        return decorated

    return decorate


def _label(component: AbstractComponent) -> str:
    """Return the name and the parameters that are not the defaults."""
    try:
        default = type(component)()
    except Exception:
        return repr(component)
    changed = [
        f"{name}={getattr(component, name)!r}"
        for name in component.parameters()
        if getattr(component, name) != getattr(default, name)
    ]
    return f"{component.name}({', '.join(changed)})" if changed else component.name


@functools.cache
def _pytest() -> Any:
    try:
        return importlib.import_module("pytest")
    except ImportError as error:
        raise MissingDependencyError(
            "parametrize_with_checks needs the package pytest, which is not installed; install it "
            "with: python -m pip install pytest (check_detector and the others work without)"
        ) from error
