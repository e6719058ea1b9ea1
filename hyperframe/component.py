"""What detectors, samplers and estimators have in common: a component is a frozen dataclass.

Its fields are its parameters and nothing else; they are checked once, in `__post_init__`, and
never change afterwards. So a component can be compared, hashed, printed as code that makes it
again, and written as a spec string (see `hyperframe.spec`). It holds no state between calls.

    >>> from dataclasses import dataclass
    >>> from typing import ClassVar
    >>> from hyperframe.component import AbstractComponent, check_positive_int
    >>> @dataclass(frozen=True, kw_only=True)
    ... class EveryOther(AbstractComponent):
    ...     kind: ClassVar[str] = "detector"
    ...     step: int = 2
    ...     def __post_init__(self) -> None:
    ...         check_positive_int(self, "step", self.step)
    >>> EveryOther.name, EveryOther(step=3)
    ('every_other', EveryOther(step=3))
    >>> EveryOther().replace(step=5)
    EveryOther(step=5)
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
import re
from abc import ABC
from collections.abc import Collection, Iterable
from typing import Any, ClassVar, TypeVar

from .errors import ArgumentError, ArgumentTypeError, SpecError, did_you_mean

__all__ = [
    "AbstractComponent",
    "check_bool",
    "check_choice",
    "check_fraction",
    "check_non_negative_int",
    "check_parameters",
    "check_positive_int",
    "check_positive_number",
    "snake_case",
]

_Self = TypeVar("_Self", bound="AbstractComponent")


def snake_case(name: str) -> str:
    """Turns a class name into a registry name; a run of capitals is one word.

    Example:
        >>> [snake_case(name) for name in ("SortLSH", "HeavyColumns", "KDE", "ApproxD")]
        ['sort_lsh', 'heavy_columns', 'kde', 'approx_d']
    """
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractComponent(ABC):
    """Base of every detector, sampler and estimator.

    A concrete component is a subclass decorated with `@dataclass(frozen=True, kw_only=True)`.
    A field holds a Python literal (number, string, bool, None, or a tuple of those), another
    component, or a tuple of components. A field that holds components also accepts their spec
    strings, which `__post_init__` turns into components: that is what lets specs nest.

    Attributes:
        kind: "detector", "sampler" or "estimator"; set by the abstract class of each kind.
        registry_name: the name, where it is not the snake_case of the class name. It is not
            inherited: a subclass is another component.
        name: the name, readable on the class and on an instance.
    """

    kind: ClassVar[str]
    registry_name: ClassVar[str | None] = None
    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__dict__.get("registry_name") or snake_case(cls.__name__)

    def __post_init__(self) -> None:  # noqa: B027  (optional to override)
        """Checks the parameters. Here: nothing, so that `super().__post_init__()` always works."""

    def replace(self: _Self, **changes: Any) -> _Self:
        """Returns a copy with some parameters changed, checked like any new component.

        Raises:
            SpecError: a name in `changes` is not a parameter.
        """
        check_parameters(type(self), changes)
        return dataclasses.replace(self, **changes)

    @classmethod
    def parameters(cls) -> tuple[str, ...]:
        """The names of the parameters, in the order in which they are declared."""
        return tuple(field.name for field in dataclasses.fields(cls) if field.init)


def check_parameters(
    component: type[AbstractComponent], given: Iterable[str], *, complete: bool = False
) -> None:
    """Refuses names that are not parameters of a component class.

    Args:
        component: the class.
        given: the names that a caller gave.
        complete: True also refuses a missing parameter that has no default.

    Raises:
        SpecError: lists the parameters, and the nearest one.
    """
    known = component.parameters()
    given = tuple(given)
    listing = f"its parameters are {', '.join(known)}" if known else "it has no parameters"
    for name in given:
        if name not in known:
            raise SpecError(
                f"{component.name}: there is no parameter {name!r}; {listing}."
                f"{did_you_mean(name, known)}"
            )
    if complete:
        # inspect rather than dataclasses.MISSING: it sees a hand-written __init__ too
        required = inspect.signature(component).parameters.values()
        missing = [p.name for p in required if p.default is p.empty and p.name not in given]
        missing = [name for name in missing if name in known]
        if missing:
            raise SpecError(
                f"{component.name}: the parameter {missing[0]!r} has no default and was not given; "
                f'write "{component.name}({missing[0]}=...)".'
            )


def _owner_name(owner: object) -> str:
    name = owner if isinstance(owner, str) else getattr(owner, "name", None)
    return name if isinstance(name, str) else snake_case(type(owner).__name__)


def _check_int(owner: object, field: str, value: object, least: int, what: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return value
    where = f"{_owner_name(owner)}: {field}={value!r}"
    if isinstance(value, bool) or not isinstance(value, int):
        # not converted here: a component stays equal to its literal spec only with plain ints
        foreign = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        remedy = "a plain int is needed, so pass int(value)" if foreign else "pass a plain int"
        raise ArgumentTypeError(
            f"{where} has type {type(value).__name__}, but {field} counts something and must be "
            f"{what}; {remedy}."
        )
    raise ArgumentError(
        f"{where} is too small: {field} must be {what}; pass a value of at least {least}."
    )


def check_positive_int(owner: object, field: str, value: object) -> int:
    """Returns `value` if it is an int of at least 1 (a bool is not an int), or raises.

    Args:
        owner: the component (instance or class) or its name, for the message.
        field: the parameter's name.
        value: what was given.

    Raises:
        ArgumentTypeError: not an int.
        ArgumentError: smaller than 1.

    Example:
        >>> check_positive_int("sort_lsh", "block_size", 256)
        256
    """
    return _check_int(owner, field, value, 1, "a positive integer")


def check_non_negative_int(owner: object, field: str, value: object) -> int:
    """Returns `value` if it is an int of at least 0; raises like `check_positive_int`."""
    return _check_int(owner, field, value, 0, "an integer that is not negative")


def check_positive_number(owner: object, field: str, value: object) -> float:
    """Returns `value` if it is a finite int or float above 0; raises like `check_positive_int`."""
    where = f"{_owner_name(owner)}: {field}={value!r}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(
            f"{where} has type {type(value).__name__}, but {field} must be a positive number; "
            f"pass a plain float."
        )
    if not (math.isfinite(value) and value > 0):
        raise ArgumentError(
            f"{where} cannot be used: {field} must be a finite number above 0; pass such a number."
        )
    return value


def check_fraction(
    owner: object,
    field: str,
    value: object,
    *,
    include_zero: bool = False,
    include_one: bool = True,
) -> float:
    """Returns `value` if it is a number in (0, 1], or raises like `check_positive_int`.

    Args:
        owner: the component (instance or class) or its name, for the message.
        field: the parameter's name.
        value: what was given.
        include_zero: whether 0 itself is allowed.
        include_one: whether 1 itself is allowed.
    """
    interval = f"{'[' if include_zero else '('}0, 1{']' if include_one else ')'}"
    where = f"{_owner_name(owner)}: {field}={value!r}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(
            f"{where} has type {type(value).__name__}, but {field} is a fraction and must be a "
            f"number in {interval}; pass a plain float."
        )
    inside = 0 < value < 1 or (include_zero and value == 0) or (include_one and value == 1)
    if not inside:  # also for nan
        raise ArgumentError(
            f"{where} is outside {interval}: {field} is a fraction; pass a number in {interval}."
        )
    return value


def check_bool(owner: object, field: str, value: object) -> bool:
    """Returns `value` if it is True or False, or raises ArgumentTypeError."""
    if not isinstance(value, bool):
        raise ArgumentTypeError(
            f"{_owner_name(owner)}: {field}={value!r} has type {type(value).__name__}, but {field} "
            f"is a switch; pass True or False."
        )
    return value


def check_choice(owner: object, field: str, value: object, choices: Collection[str]) -> str:
    """Returns `value` if it is one of the strings in `choices`, or raises with the nearest one."""
    listing = ", ".join(repr(choice) for choice in choices)
    where = f"{_owner_name(owner)}: {field}={value!r}"
    if not isinstance(value, str):
        raise ArgumentTypeError(
            f"{where} has type {type(value).__name__}, but {field} is chosen by name; "
            f"pass one of {listing}."
        )
    if value not in choices:
        raise ArgumentError(
            f"{where} is not a choice that exists; pass one of {listing}."
            f"{did_you_mean(value, choices)}"
        )
    return value
