"""Budgets: how many keys a detector may hold, as a number or as a fraction of the keys."""

from __future__ import annotations

from .component import check_fraction, check_positive_int

__all__ = ["check_budget", "resolve_budget"]


def check_budget(owner: object, name: str, value: object) -> None:
    """Refuse what is neither a positive whole number nor a fraction of the keys.

    Args:
        owner: the component, for the message.
        name: the parameter.
        value: an int counts keys; a float above 0 and up to 1 is a fraction of them.
    """
    if isinstance(value, float) and value <= 1:
        check_fraction(owner, name, value)
    else:
        check_positive_int(owner, name, value)


def resolve_budget(value: int | float, available: int) -> int:
    """Return the number that a budget stands for: a fraction is rounded up, at least 1.

    Example:
        >>> resolve_budget(0.05, 8192), resolve_budget(256, 8192)
        (410, 256)
    """
    if isinstance(value, float):
        return max(1, int(-(-value * available // 1)))
    return value
