"""Public helpers for testing components: float64 oracles and input strategies.

The strategies need the package `hypothesis` and load with their first use.
"""

import importlib
from typing import Any

from .oracles import causal_mask, dense_attention, masked_attention, plan_attention

__all__ = ["causal_mask", "dense_attention", "masked_attention", "plan_attention"]

_STRATEGIES = ("attention_inputs", "key_samples", "masks", "plans", "problems")


def __getattr__(name: str) -> Any:
    if name != "strategies" and name not in _STRATEGIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(".strategies", __name__)
    return module if name == "strategies" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_STRATEGIES, "strategies"])
