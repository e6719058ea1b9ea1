"""How a budget of keys becomes a parameter of a detector.

The rule of a detector is looked up in this order:

1. the class's own `with_budget(self, keys: int) -> Self`, a method or class method, for detectors
   of other distributions, and for any that want a rule of their own;
2. `BUDGET_RULES`, by the detector's registered name, for those of this distribution;
3. none: the detector is measured once, as it is.

    >>> from hyperframe.detectors import create, to_spec
    >>> to_spec(with_budget(create("quest(block_size=32)"), 256))
    'quest(block_size=32, num_blocks=8)'
    >>> has_budget(create("block_list"))
    False

A budget is what a detector aims at. What a row holds then may be less (keys that two parts share)
or more (keys of the own tile); the rows of `hyperframe frontier` say what was held.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ...component import check_positive_int
from ...detectors import AbstractDetector, to_spec
from ...errors import ArgumentTypeError, SpecError

__all__ = ["BUDGET_RULES", "LEFT_OUT", "has_budget", "with_budget", "with_tile_size"]

Rule = Callable[[Any, int], AbstractDetector]


def _is(name: str) -> Rule:
    """The parameter is the budget."""
    return lambda detector, keys: detector.replace(**{name: keys})


def _times(changed: str, other: str) -> Rule:
    """The budget is the product of two parameters, the second one stays."""

    def rule(detector: Any, keys: int) -> AbstractDetector:
        found: AbstractDetector = detector.replace(
            **{changed: max(1, keys // getattr(detector, other))}
        )
        return found

    return rule


def _vertical_slash(detector: Any, keys: int) -> AbstractDetector:
    """Columns and diagonals share the budget in the proportion they have."""
    share = detector.num_columns
    if isinstance(share, float):  # of the keys of a call, which are not known here
        columns = max(1, keys - detector.num_diagonals)
    else:
        columns = keys * share // (share + detector.num_diagonals)
    found: AbstractDetector = detector.replace(num_columns=columns, num_diagonals=keys - columns)
    return found


def _bigbird(detector: Any, keys: int) -> AbstractDetector:
    """Random blocks take what the first keys and the causal window leave."""
    blocks = (keys - detector.num_global) // detector.block_size
    found: AbstractDetector = detector.replace(
        num_random=max(0, blocks - detector.window_blocks - 1)
    )
    return found


def _butterfly(detector: Any, keys: int) -> AbstractDetector:
    """Blocks of a quarter: a row holds 1 + log2(blocks) / 2 of them, about four of 64."""
    found: AbstractDetector = detector.replace(block_size=max(1, keys // 4))
    return found


def _union(detector: Any, keys: int) -> AbstractDetector:
    """Members with a rule share the budget equally."""
    sharing = sum(map(has_budget, detector.detectors))
    members = tuple(
        with_budget(member, max(1, keys // sharing)) if has_budget(member) else member
        for member in detector.detectors
    )
    found: AbstractDetector = detector.replace(detectors=members)
    return found


BUDGET_RULES: dict[str, Rule] = {
    "antidiagonal": _times("num_blocks", "block_size"),
    "balanced_lsh": _times("block_size", "num_rounds"),
    "bigbird": _bigbird,
    "butterfly": _butterfly,
    "dilated": _is("width"),
    "heavy_columns": _is("num_columns"),
    "kmeans": _times("num_blocks", "block_size"),
    "lsh_topk": _is("num_keys"),
    "oracle": _is("budget"),
    "pca_tree": _times("num_leaves", "leaf_size"),
    "pooled_topk": _times("num_blocks", "block_size"),
    "quest": _times("num_blocks", "block_size"),
    "refined": _is("num_keys"),
    "reformer_lsh": _times("block_size", "num_rounds"),
    "sliding_window": _is("width"),
    "sort_lsh": _times("block_size", "num_rounds"),
    "strided": _is("num_keys"),
    "tile_oracle": _is("budget"),
    "union": _union,
    "vertical_slash": _vertical_slash,
}
"""What `with_budget` does to the detectors of this distribution, by registered name."""

LEFT_OUT = {
    "auto": "made of the others, with budgets of its own",
    "block_list": "a pattern of the user's own",
    "count_sketch": "holds what is heavy by its definition, not a number of keys",
    "expander_sketch": "holds what is heavy by its definition, not a number of keys",
    "learned_count_sketch": "holds what is heavy by its definition, not a number of keys",
    "oracle": "a yardstick, quadratic and with a list for every row",
    "union": "made of the others",
}
"""Registered detectors that are measured only where they are named, and why."""


def has_budget(detector: AbstractDetector) -> bool:
    """Whether there is a rule for a detector."""
    return _rule_of(detector) is not None


def with_budget(detector: AbstractDetector, keys: int) -> AbstractDetector:
    """Return the detector with its parameters set for about `keys` held by a row.

    Args:
        detector: all parameters but those of its rule stay; without a rule it is returned itself.
        keys: the budget, 1 or more.

    Raises:
        ArgumentTypeError: the class's own `with_budget` returned no detector.
    """
    check_positive_int("frontier", "budget", keys)
    rule = _rule_of(detector)
    found = detector if rule is None else rule(detector, keys)
    if not isinstance(found, AbstractDetector):
        raise ArgumentTypeError(
            f"the detector {detector.name} has a with_budget that returned "
            f"{type(found).__name__}; it must return a detector, for example "
            "self.replace(num_columns=keys)"
        )
    return found


def _rule_of(detector: AbstractDetector) -> Rule | None:
    if callable(getattr(type(detector), "with_budget", None)):
        # through the instance: it may be a method or a class method
        return lambda one, keys: one.with_budget(keys)
    if detector.name == "union":
        members = getattr(detector, "detectors", ())
        return _union if any(map(has_budget, members)) else None
    try:
        name = to_spec(detector).partition("(")[0]
    except SpecError:  # not registered
        name = detector.name
    return BUDGET_RULES.get(name)


def with_tile_size(detector: AbstractDetector, tile_size: int) -> AbstractDetector:
    """Return the detector with that `tile_size`, where it or its members have such a parameter."""
    if detector.name == "union":
        members = getattr(detector, "detectors", ())
        return detector.replace(
            detectors=tuple(with_tile_size(member, tile_size) for member in members)
        )
    names = {field.name for field in dataclasses.fields(detector)}
    return detector.replace(tile_size=tile_size) if "tile_size" in names else detector
