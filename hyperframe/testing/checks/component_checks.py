"""Checks that every component passes, whatever its kind: a value that can be stored and sent."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pickle
from collections.abc import Callable
from typing import Any

from ...component import AbstractComponent
from ...registry import Registry
from .problem import fail

__all__ = [
    "check_copies_and_pickles_are_equal",
    "check_is_a_frozen_value",
    "check_spec_round_trip",
    "registry_of",
]


def registry_of(kind: str) -> Registry[Any]:
    """Return the registry of a kind: "detector", "sampler" or "estimator"."""
    # by name: this module knows no kind in particular
    package = importlib.import_module(f"{__package__.split('.')[0]}.{kind}s")
    found: Registry[Any] = package.registry
    return found


def check_is_a_frozen_value(component: AbstractComponent) -> None:
    """A component is a frozen keyword-only dataclass with equality and a hash."""
    cls = type(component)
    remedy = f"decorate {cls.__name__} with @dataclass(frozen=True, kw_only=True)"
    own = "__dataclass_fields__" in cls.__dict__
    parameters = getattr(cls, "__dataclass_params__", None)
    if not own or parameters is None or not parameters.frozen:
        fail(component, "for a frozen dataclass", "a class that is none", remedy)
    loose = [field.name for field in dataclasses.fields(component) if not field.kw_only]
    if loose:
        fail(component, "for keyword-only parameters", f"{loose} without a keyword", remedy)
    try:
        again = component.replace()
        is_equal = again == component and hash(again) == hash(component)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        fail(component, "for a copy by replace() and its hash", found, "keep hashable parameters")
    if not is_equal:
        remedy = "leave __eq__ and __hash__ to the dataclass, and hold plain values"
        fail(component, "for an equal copy with an equal hash", f"{again!r}", remedy)


def check_spec_round_trip(component: AbstractComponent) -> None:
    """`create(to_spec(x)) == x`: the spec string says all that a component is.

    A class without a name in the registry gets one while the check runs.
    """
    registry = registry_of(component.kind)
    named = None
    try:
        try:
            spec = registry.to_spec(component)
        except Exception:
            named = component.name
            while named in registry.names():
                named += "_checked"
            registry.register(named, type(component))
            spec = registry.to_spec(component)
        again = registry.create(spec)
    except Exception as error:
        remedy = "fields hold literals, components, or tuples of them"
        fail(component, "for its spec string", f"{type(error).__name__}: {error}", remedy)
    finally:
        if named is not None and named in registry.names():
            registry.unregister(named)
    if again != component or repr(again) != repr(component):
        remedy = "make every parameter a field, and keep its value in __post_init__"
        fail(component, f"to be made again from {spec!r}", f"{again!r}", remedy)


def check_copies_and_pickles_are_equal(component: AbstractComponent) -> None:
    """`copy.deepcopy` and `pickle` give equal components: a model that holds one can be saved."""

    def pickled(x: AbstractComponent) -> AbstractComponent:
        found: AbstractComponent = pickle.loads(pickle.dumps(x))
        return found

    ways: dict[str, Callable[[AbstractComponent], AbstractComponent]]
    ways = {"deepcopy": copy.deepcopy, "pickle": pickled}
    for name, way in ways.items():
        try:
            again = way(component)
        except Exception as error:
            remedy = "define the class at the top of a module, and hold no functions or handles"
            fail(component, f"for a copy by {name}", f"{type(error).__name__}: {error}", remedy)
        if again != component or hash(again) != hash(component):
            remedy = "keep everything that counts in the fields"
            fail(component, f"for an equal copy by {name}", f"{again!r}", remedy)
