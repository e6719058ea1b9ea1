"""The conformance suite: what the library relies on, as checks of any component.

    >>> from hyperframe.testing import check_detector
    >>> results = check_detector("strided(num_keys=6)", only=["budget_is_kept"])
    >>> [result.status for result in results]
    ['passed']

`check_detector`, `check_sampler` and `check_estimator` run all checks of a kind and report;
`parametrize_with_checks` makes a pytest test of each. `CHECKS` has them by name.
"""

from .parametrize import BoundCheck, parametrize_with_checks
from .problem import CheckSkippedError
from .results import CheckResult, ConformanceError
from .runner import CHECKS, check_detector, check_estimator, check_sampler

__all__ = [
    "CHECKS",
    "BoundCheck",
    "CheckResult",
    "CheckSkippedError",
    "ConformanceError",
    "check_detector",
    "check_estimator",
    "check_sampler",
    "parametrize_with_checks",
]
