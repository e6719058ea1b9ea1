"""What came of checks: one result each, and the report of those that failed."""

from __future__ import annotations

import re
import sys
import traceback
from dataclasses import dataclass, field
from typing import Any, Literal

from ...component import AbstractComponent

__all__ = ["CheckResult", "ConformanceError", "as_expected", "place_of", "report"]


class ConformanceError(AssertionError):
    """A component failed checks; the message is the report of all that failed."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What came of one check.

    Args:
        name: of the check, without `check_`.
        component: spec or repr of the component.
        status: "passed", "failed", "skipped" (does not apply), "expected" (failed, as it should
            by `expected_failed_checks`) or "unexpected" (passed, though a failure was expected).
        message: why it failed or was skipped, else empty.
        seconds: how long it took.
        error: what was raised, or None.
    """

    name: str
    component: str
    status: Literal["passed", "failed", "skipped", "expected", "unexpected"]
    message: str = ""
    seconds: float = 0.0
    error: BaseException | None = field(default=None, repr=False, compare=False)

    @property
    def is_failure(self) -> bool:
        """Whether this keeps the component from conforming."""
        return self.status in ("failed", "unexpected")


def as_expected(result: CheckResult, reason: str | None) -> CheckResult:
    """Return a result, given that the check was expected to fail for a reason (None: to pass)."""
    if reason is None or result.status == "skipped":
        return result
    status: Any = "expected" if result.status == "failed" else "unexpected"
    message = f"expected to fail ({reason}): {result.message or 'it passed; expect it no longer'}"
    return CheckResult(
        name=result.name, component=result.component, status=status, message=message,
        seconds=result.seconds, error=result.error,
    )  # fmt: skip


def place_of(error: BaseException, component: AbstractComponent) -> str:
    """Return "file:line" of an error: the last place in the component's own module, if any."""
    frames = traceback.extract_tb(error.__traceback__)
    module = sys.modules.get(type(component).__module__)
    own = [frame for frame in frames if frame.filename == getattr(module, "__file__", None)]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"


def report(component: AbstractComponent, results: list[CheckResult]) -> str:
    """Return what a person reads: how many checks of which outcome, and why some failed.

    One exception, but for its numbers, breaks many checks; it is said once, with their names.
    """
    failed = [result for result in results if result.is_failure]
    causes: dict[Any, list[CheckResult]] = {}
    for result in failed:
        error = result.error
        cause: Any = result.name
        if error is not None and not isinstance(error, AssertionError):
            cause = (type(error), re.sub(r"\d+", "", result.message))
        causes.setdefault(cause, []).append(result)
    lines = [f"{component!r} does not conform: {len(failed)} of {len(results)} checks failed."]
    for first, *rest in causes.values():
        lines.append(f"  {first.name}: {first.message}")
        if rest:
            lines.append(f"    so do {', '.join(result.name for result in rest)}")
    return "\n".join(lines)
