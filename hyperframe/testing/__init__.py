"""Public helpers for testing components: the conformance suite, float64 oracles, strategies.

`check_detector`, `check_sampler` and `check_estimator` say whether a component keeps what the
library relies on; `parametrize_with_checks` makes pytest tests of it. The strategies need the
package `hypothesis` and load with their first use.
"""

import importlib
from typing import Any

from .checks import (
    CheckResult,
    ConformanceError,
    check_detector,
    check_estimator,
    check_sampler,
    parametrize_with_checks,
)
from .oracles import causal_mask, dense_attention, masked_attention, plan_attention

__all__ = [
    "CheckResult",
    "ConformanceError",
    "causal_mask",
    "check_detector",
    "check_estimator",
    "check_sampler",
    "dense_attention",
    "masked_attention",
    "parametrize_with_checks",
    "plan_attention",
]

_STRATEGIES = ("attention_inputs", "key_samples", "masks", "plans", "problems")


def __getattr__(name: str) -> Any:
    if name != "strategies" and name not in _STRATEGIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(".strategies", __name__)
    return module if name == "strategies" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_STRATEGIES, "strategies"])
