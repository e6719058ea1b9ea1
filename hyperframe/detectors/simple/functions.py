"""From a function to a detector class: keyword-only parameters become those of the detector."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch

from ...errors import ArgumentError, ArgumentTypeError
from ...spec import is_spec_name
from ..base import AbstractDetector

__all__ = [
    "asks_for",
    "can_look_at",
    "check_columns",
    "detector_of",
    "grouped",
    "positional_names",
]

_Detector = TypeVar("_Detector", bound=AbstractDetector)


def detector_of(
    function: Callable[..., Any], base: Callable[..., _Detector], *, maker: str, method: str,
    tensors: Collection[tuple[str, ...]], given: Collection[str],
    attributes: Mapping[str, Any] | None = None,
) -> type[_Detector]:  # fmt: skip
    """Return a detector class whose `method` calls a function.

    Args:
        function: takes tensors by position, and keywords.
        base: the abstract class (mypy has no type for one).
        maker: name of the decorator, for messages.
        method: name of the abstract method; it is called with all of `given` as keywords.
        tensors: the names that the positional parameters may have.
        given: keywords that the function gets where it names them. All others are parameters of
            the detector: fields of the base, whose default the function may change, or new ones.
        attributes: further class attributes.

    Raises:
        ArgumentTypeError: no function.
        ArgumentError: its name, or a parameter, cannot be that of a detector.
    """
    if not inspect.isfunction(function):
        raise ArgumentTypeError(
            f"{maker}: got {function!r} of type {type(function).__name__}; decorate a function"
        )
    name = function.__name__
    if not is_spec_name(name):
        raise ArgumentError(
            f"{maker}: a function called {name!r} cannot name a detector; define it with def and a "
            "plain name (ASCII letters, digits, _)"
        )
    found = positional_names(function)
    if found not in tensors:
        ways = " or ".join(f"{name}({', '.join(names)}, *, ...)" for names in sorted(tensors))
        raise ArgumentError(
            f"{maker}: {name} has the positional parameters ({', '.join(found)}); write {ways}"
        )
    kind: Any = base
    known = {field.name: field for field in dataclasses.fields(kind)}
    names, fields, defaults = [], [], {}
    for parameter in list(inspect.signature(function).parameters.values())[len(found) :]:
        if parameter.kind is not parameter.KEYWORD_ONLY:
            raise ArgumentError(
                f"{maker}: {name} has the parameter {parameter}, but the parameters of a detector "
                "are known by name; list them behind `*`, each with its default"
            )
        names.append(parameter.name)
        if parameter.name in given:
            continue
        default = known[parameter.name].default if parameter.name in known else parameter.empty
        if parameter.default is not parameter.empty:
            default = parameter.default
        elif parameter.name not in known:
            raise ArgumentError(
                f"{maker}: the parameter {parameter.name!r} of {name} has no default; give it one, "
                f"or name one of {', '.join(sorted([*given, *known]))}"
            )
        if parameter.name not in known and hasattr(kind, parameter.name):
            raise ArgumentError(
                f"{maker}: the parameter {parameter.name!r} of {name} has the name of something "
                "that every such detector has; choose another word"
            )
        fields.append((parameter.name, Any, dataclasses.field(default=default)))
        if parameter.name not in known:
            defaults[parameter.name] = default
    wanted = tuple(names)

    def call(self: Any, *arguments: torch.Tensor, **options: Any) -> Any:
        chosen = {key: options[key] if key in options else getattr(self, key) for key in wanted}
        return function(*arguments, **chosen)

    def check(self: Any) -> None:
        super(cls, self).__post_init__()
        for key, default in defaults.items():
            _check_type(self, key, getattr(self, key), default)

    namespace = {
        method: call, "__post_init__": check, "__doc__": function.__doc__,
        "__module__": function.__module__, "registry_name": name, **(attributes or {}),
    }  # fmt: skip
    made = dataclasses.make_dataclass(
        name, fields, bases=(kind,), namespace=namespace, frozen=True, kw_only=True
    )
    # where the function is found, so that pickle and entry points find the class there
    made.__module__, made.__qualname__ = function.__module__, function.__qualname__
    cls: Any = made
    return cls  # type: ignore[no-any-return]


def asks_for(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of that name."""
    return inspect.isfunction(function) and name in inspect.signature(function).parameters


def positional_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the parameters that can be given by position."""
    if not inspect.isfunction(function):
        return ()
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


def grouped(query: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Return the rows of query heads that share a key head side by side: `[B, Hkv, g n, d]`."""
    return query.reshape(query.shape[0], key_heads, -1, query.shape[-1])


def can_look_at(tensor: torch.Tensor) -> bool:
    """Whether values may be read: elsewhere every call would wait, or a graph would break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_columns(
    owner: AbstractDetector, found: Any, shape: tuple[int, ...], count: int, num_keys: int
) -> None:
    """Refuse what is no list of at most `count` distinct keys for each head.

    Args:
        owner: the detector, for the message.
        found: what a function returned.
        shape: `(batch, heads)`.
        count: most columns of a list.
        num_keys: keys that there are.
    """
    is_integer = isinstance(found, torch.Tensor) and found.dtype in (torch.int32, torch.int64)
    if not is_integer:
        what = found.dtype if isinstance(found, torch.Tensor) else type(found).__name__
        raise ArgumentTypeError(
            f"{owner.name}: its columns are {what}; return an int64 tensor [batch, heads, columns]"
        )
    if tuple(found.shape[:-1]) != shape or found.shape[-1] > count:
        raise ArgumentError(
            f"{owner.name}: its columns have shape {tuple(found.shape)}; return [batch, heads, "
            f"columns] = {(*shape, count)}, or fewer columns"
        )
    if not can_look_at(found):
        return
    if bool(((found < -1) | (found >= num_keys)).any()):
        raise ArgumentError(
            f"{owner.name}: its columns lie in {int(found.min())}..{int(found.max())}, outside "
            f"0..{num_keys - 1}; the keys are counted from the first one given, -1 is no key"
        )
    ordered = found.sort(dim=-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        raise ArgumentError(
            f"{owner.name}: a list names a key twice; return distinct columns, -1 for the rest"
        )


def _check_type(owner: AbstractDetector, name: str, value: object, default: object) -> None:
    """Refuse a value of another type than the default; an int may stand for a float."""
    if default is None or type(value) is type(default):
        return
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return
    raise ArgumentTypeError(
        f"{owner.name}: {name}={value!r} has type {type(value).__name__}, but its default is "
        f"{default!r}; pass a plain {type(default).__name__}"
    )
