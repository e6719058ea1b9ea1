"""Plug-ins: components that other distributions offer through entry points.

A distribution declares, in the group of the kind ("hyperframe.detectors", "hyperframe.samplers" or
"hyperframe.estimators"), a line `name = "module:Class"` and its component is there by name:

    [project.entry-points."hyperframe.detectors"]
    my_detector = "my_package.detectors:MyDetector"

Reading the lines imports nothing. A plug-in is imported when it is asked for, and only then can it
fail, so that a broken one never hides the others. (Registries do the looking up; this module
reads, loads and checks.)

    >>> from hyperframe.plugins import read_plugins
    >>> read_plugins("hyperframe.no_such_group")
    {}
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import inspect
import weakref
from typing import Any

from .component import AbstractComponent
from .errors import ArgumentError, ArgumentTypeError, PluginError
from .spec import is_spec_name

__all__ = [
    "Plugin", "blame", "check_component_class", "described", "is_built_in", "offered_by",
    "read_plugins",
]  # fmt: skip

# of the classes that were loaded from entry points, who offers them
_OFFERED: weakref.WeakKeyDictionary[type[Any], str] = weakref.WeakKeyDictionary()


@dataclasses.dataclass
class Plugin:
    """One entry point, and what became of it when it was asked for.

    Attributes:
        name: the component's name.
        target: "module:Class".
        distribution: the name of the distribution that declares it.
        version: that distribution's version.
        loaded: the class, once it was asked for and could be loaded.
        reason: why it cannot be used, where that is known.
    """

    name: str
    target: str
    distribution: str
    version: str | None
    entry_point: importlib.metadata.EntryPoint
    loaded: type[Any] | None = None
    reason: str = ""

    @property
    def owner(self) -> str:
        """Who offers it, in words."""
        version = f" {self.version}" if self.version else ""
        return f"{self.distribution}{version} (entry point {self.name} = {self.target})"

    def load(self, base: type[Any]) -> type[Any]:
        """Imports the class and checks it; a failure is remembered as the reason.

        Raises:
            PluginError: names the distribution, the entry point and the cause.
        """
        if self.loaded is not None:
            return self.loaded
        group = self.entry_point.group
        try:
            if not is_spec_name(self.name):
                raise ArgumentError(_bad_name(self.name))
            found = self.entry_point.load()
            check_component_class(found, base)
        except (Exception, SystemExit) as error:  # a script without a main guard may exit
            self.reason = f"{type(error).__name__}: {error}"
            raise PluginError(
                f"the plug-in {self.name!r} of the group {group!r} was asked for, but "
                f"{self.owner} cannot be loaded: {self.reason.rstrip('.')}. Repair or uninstall "
                f"{self.distribution}; everything else keeps working."
            ) from error
        _OFFERED[found] = self.owner
        self.loaded, self.reason = found, ""
        return self.loaded

    def status(self, others: list[str], base: type[Any] | None) -> tuple[str, str]:
        """Its status in a listing, and the reason; never raises.

        Args:
            others: who else owns the name, in words.
            base: the abstract class, to try and load it; None leaves it as it is.
        """
        if others:
            return "duplicate", f"the name is also that of {' and '.join(others)}"
        if base is not None:
            with contextlib.suppress(PluginError):  # load keeps the reason
                self.load(base)
        if self.reason:
            return "broken", self.reason
        return ("ok" if self.loaded else "not loaded"), ""


def read_plugins(group: str) -> dict[str, list[Plugin]]:
    """Reads the entry points of a group, without importing any of them.

    Args:
        group: the entry-point group.

    Returns:
        For each name its owners, sorted by distribution; more than one owner is a clash. A name
        that no spec string could hold has its reason at once.
    """
    # a distribution may have been installed since the last reading
    importlib.invalidate_caches()
    owners: dict[str, dict[tuple[str, str], Plugin]] = {}
    for entry in importlib.metadata.entry_points(group=group):
        plugin = Plugin(
            name=entry.name,
            target=entry.value,
            distribution=_header(entry, "Name") or "an unnamed distribution",
            version=_header(entry, "Version"),
            entry_point=entry,
            reason="" if is_spec_name(entry.name) else _bad_name(entry.name),
        )
        owners.setdefault(plugin.name, {})[plugin.distribution, plugin.target] = plugin
    return {name: [found[key] for key in sorted(found)] for name, found in sorted(owners.items())}


def _bad_name(name: str) -> str:
    return f"{name!r} is not a plain name (ASCII letters, digits, _; no Python keyword)"


def _header(entry: importlib.metadata.EntryPoint, key: str) -> str | None:
    # a half-removed distribution may have no metadata left
    about = None if entry.dist is None else entry.dist.metadata
    return about[key] if about is not None and key in about else None


def offered_by(cls: type[Any]) -> str:
    """Return " of DISTRIBUTION VERSION (entry point ...)" for a plug-in's class, else nothing.

    For messages about a component that misbehaves: it is not this library to be repaired. A class
    that was imported past the registries is looked up by its place.
    """
    owner = _OFFERED.get(cls) or _declared(cls)
    return f" of {owner}" if owner else ""


def _declared(cls: type[Any]) -> str:
    """Who declares a class as an entry point, in words; empty for nobody and for this library."""
    if is_built_in(cls):
        return ""
    target = f"{cls.__module__}:{cls.__qualname__}"
    for owners in read_plugins(f"hyperframe.{getattr(cls, 'kind', 'component')}s").values():
        for plugin in owners:
            if plugin.target == target:
                return plugin.owner
    return ""


def is_built_in(cls: type[Any]) -> bool:
    """Whether a class is part of this library, whose tests look at what it returns."""
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def described(component: AbstractComponent) -> str:
    """Return "the detector NAME", followed by who offers it if it is a plug-in.

    Example:
        >>> from hyperframe.detectors import create
        >>> described(create("strided"))
        'the detector strided'
    """
    return f"the {component.kind} {component.name}{offered_by(type(component))}"


def blame(component: AbstractComponent, error: ArgumentError | ArgumentTypeError) -> None:
    """Name a plug-in and its distribution in an error that was raised inside of it.

    What the library refuses there (a mask of wrong tensors, an index out of range) is no fault of
    the caller, who would not know whose it is.

    Args:
        component: what was called.
        error: what it raised.

    Raises:
        ArgumentError, ArgumentTypeError: of the error's own type, with the owner in front. Nothing
            is raised for components that are no plug-ins, or where the message names the owner.
    """
    owner = offered_by(type(component))
    if owner and owner not in str(error):
        raise type(error)(f"{described(component)}: {error}") from error


def check_component_class(found: object, base: type[Any]) -> None:
    """Refuses whatever cannot serve as a component class.

    Args:
        found: what is to be registered.
        base: the abstract class of the kind.

    Raises:
        ArgumentTypeError: no concrete subclass of the base.
        ArgumentError: a subclass that is not a frozen dataclass of its own, has a field with a
            reserved name, or takes parameters without a name.
    """
    if not isinstance(found, type):
        raise ArgumentTypeError(
            f"{found!r} is no class but has type {type(found).__name__}; register the class itself."
        )
    if not issubclass(found, base) or not issubclass(found, AbstractComponent):
        raise ArgumentTypeError(
            f"{found.__qualname__} is no subclass of {base.__name__}; derive it from that class."
        )
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ArgumentTypeError(
            f"{found.__qualname__} is abstract: it lacks {missing}; register a class that has them."
        )
    settings = vars(found).get("__dataclass_params__")
    if settings is None or not settings.frozen:
        raise ArgumentError(
            f"{found.__qualname__} is not a frozen dataclass; decorate it with "
            f"@dataclass(frozen=True, kw_only=True), below @register where that is used."
        )
    if reserved := {"name", "kind", "registry_name"} & set(found.parameters()):
        raise ArgumentError(
            f"{found.__qualname__} has a parameter called {min(reserved)!r}, which every component "
            f"has with a meaning of its own; choose another word."
        )
    for parameter in inspect.signature(found).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
            raise ArgumentError(
                f"{found.__qualname__} takes {stars}{parameter.name}, so that a misspelt parameter "
                f"would pass for one; make every parameter a field of the dataclass, and leave "
                f"out __init__."
            )
