"""Registries: from a name or a spec string to a component.

There is one registry for each kind (detectors, samplers, estimators). Names come from three
places, and the first one that has a name wins:

1. `register()`, for the running process;
2. the built-in table, whose modules are imported when asked for;
3. entry points of installed distributions (see `hyperframe.plugins`), which are read on the first
   miss and imported when asked for. One with the name of a built-in is listed as a duplicate and
   said so in the log: no distribution can change what a name of this library means.

    >>> from hyperframe.component import AbstractComponent
    >>> from hyperframe.registry import Registry
    >>> registry = Registry("detector", "hyperframe.no_such_group", AbstractComponent,
    ...                     {"sort_lsh": ".detectors.sort_lsh:SortLSH"})
    >>> registry.names()
    ['sort_lsh']
    >>> registry.to_spec(registry.create("sort_lsh(block_size=128)"))
    'sort_lsh(block_size=128)'
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar, overload

from .component import AbstractComponent, check_parameters
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    PluginError,
    SpecError,
    UnknownComponentError,
    did_you_mean,
)
from .plugins import Plugin, check_component_class, read_plugins
from .spec import ParsedSpec, is_spec_name, parse_spec
from .spec import to_spec as _to_spec

__all__ = ["Registry", "RegistryEntry"]

_LOGGER = logging.getLogger(__name__)

_Base = TypeVar("_Base", bound=AbstractComponent)
_Class = TypeVar("_Class", bound=type[AbstractComponent])

_DISTRIBUTION = "hyperframe-attention"

# every registry alive, for the hint that a name belongs to another kind
_REGISTRIES: weakref.WeakSet[Registry[Any]] = weakref.WeakSet()


@dataclasses.dataclass(frozen=True)
class RegistryEntry:
    """One line of the listing of a registry.

    Attributes:
        name: the component's name.
        kind: "detector", "sampler" or "estimator".
        origin: "builtin", "registered" or "plugin".
        status: "ok", "not loaded" (a plug-in nobody asked for yet), "broken" or "duplicate".
        target: "module:Class".
        distribution: who offers it, None for a class registered in this process.
        version: the version of that distribution, None if unknown.
        reason: why it is broken or a duplicate, else empty.
    """

    name: str
    kind: str
    origin: str
    status: str
    target: str
    distribution: str | None = None
    version: str | None = None
    reason: str = ""


class Registry(Generic[_Base]):
    """The components of one kind, by name.

    Args:
        kind: "detector", "sampler" or "estimator", for messages and listings.
        group: the entry-point group.
        base: the abstract class of the kind, or "module:Class" to import it when needed.
        builtins: name -> "module:Class"; a leading dot is relative to `package`.
        aliases: further name -> built-in name; they are understood but not listed.
        package: the package of relative modules; by default the one this module is in.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        base: Callable[..., _Base] | str,
        builtins: Mapping[str, str],
        *,
        aliases: Mapping[str, str] | None = None,
        package: str | None = None,
    ) -> None:
        self.kind = kind
        self.group = group
        self._base = base
        self._builtins = dict(builtins)
        self._aliases = dict(aliases or {})
        self._package = package or __package__
        self._registered: dict[str, type[Any]] = {}
        self._plugins: dict[str, list[Plugin]] | None = None
        self._lock = threading.RLock()
        for alias, name in self._aliases.items():
            if name not in self._builtins or alias in self._builtins:
                raise ArgumentError(
                    f"aliases={{{alias!r}: {name!r}}}: an alias is a new name for a built-in "
                    f"{kind}; the built-in ones are {', '.join(sorted(self._builtins))}."
                )
        _REGISTRIES.add(self)

    def __repr__(self) -> str:
        return f"<Registry of {self.kind}s: {len(self._builtins)} built in, group {self.group}>"

    # -- looking up ---------------------------------------------------------------------------

    def get(self, name: str) -> type[_Base]:
        """Returns the class with a name, importing it if need be.

        Raises:
            UnknownComponentError: no such name; lists those that exist and the nearest one.
            PluginError: the name belongs to a plug-in that is broken, or to two of them.
        """
        if not isinstance(name, str):
            raise ArgumentTypeError(
                f"name={name!r} has type {type(name).__name__}; pass the name of a {self.kind} "
                f"as a string."
            )
        if name in self._registered:
            return self._registered[name]
        target = self._builtins.get(self._aliases.get(name, name))
        if target is not None:
            return self._import(target)
        owners = self._read().get(name, [])
        if not owners:
            raise UnknownComponentError(self._unknown(name))
        if len(owners) > 1:
            raise PluginError(
                f"the {self.kind} {name!r} was asked for, but {len(owners)} plug-ins own that "
                f"name: {' and '.join(plugin.owner for plugin in owners)}. Uninstall all but one, "
                f"or settle it with register({name!r}, cls)."
            )
        return owners[0].load(self._base_class())

    def create(self, spec: str | _Base, /, **overrides: Any) -> _Base:
        """Makes a component from a name or a spec string, or passes an instance through.

        Args:
            spec: "sort_lsh", "sort_lsh(block_size=256)", or an instance.
            **overrides: parameters that win over those in the spec.

        Raises:
            SpecError: the spec does not parse, or a parameter is unknown or missing.
            UnknownComponentError, PluginError: as in `get`.
            ArgumentTypeError: neither text nor an instance of this kind.
        """
        if isinstance(spec, str):
            parsed = self._parse(spec)
            cls = self.get(parsed.name)
            kwargs = {**parsed.kwargs, **overrides}
            check_parameters(cls, kwargs, complete=True)
            return cls(**kwargs)
        base = self._base_class()
        if isinstance(spec, base):
            return spec.replace(**overrides) if overrides else spec
        asked: object = spec
        if isinstance(asked, type):
            hint = f"that is a class, not an instance; write {asked.__name__}(...)"
        elif isinstance(asked, AbstractComponent):
            hint = f"that is {_a(getattr(asked, 'kind', 'component of no kind'))}"
        else:
            hint = f"that is {_a(type(asked).__name__)}"
            if isinstance(asked, (tuple, list)) and self._owner("union"):
                texts = asked and all(isinstance(item, str) for item in asked)
                pipe = " | ".join(asked) if texts else "a | b"
                hint += f'; the union of several {self.kind}s is written "{pipe}"'
        raise ArgumentTypeError(
            f"{self.kind}={spec!r} cannot be used: {hint}. Pass a name, a spec string such as "
            f'"name(parameter=value)", or an instance of {base.__name__}.'
        )

    def to_spec(self, component: _Base) -> str:
        """Writes a component as a spec string that `create` turns back into an equal one.

        Raises:
            SpecError: a field has no literal form, or the class has no name in this registry.
        """
        return _to_spec(component, name_of=self._name_of)

    # -- listing ------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The names that can be asked for, sorted: without aliases and known-bad plug-ins."""
        usable = (entry.name for entry in self.entries() if entry.status in ("ok", "not loaded"))
        return sorted(set(usable))

    def entries(self, *, load: bool = False) -> list[RegistryEntry]:
        """Everything there is, also what is broken or a duplicate, sorted by name.

        Args:
            load: True imports the plug-ins to find out which of them work; nothing is raised.
        """
        return sorted(self._entries(load), key=lambda entry: (entry.name, entry.origin))

    def _entries(self, load: bool) -> Iterable[RegistryEntry]:
        base = self._base_class() if load else None
        with self._lock:
            registered = dict(self._registered)
            plugins = dict(self._read())
        for name, cls in registered.items():
            yield RegistryEntry(name, self.kind, "registered", "ok", _target(cls))
        own = (_DISTRIBUTION, _own_version())
        for name, target in self._builtins.items():
            shadow = f"{_target(registered[name])} replaces it" if name in registered else ""
            status = "duplicate" if shadow else "ok"
            yield RegistryEntry(name, self.kind, "builtin", status, target, *own, shadow)
        for name, owners in plugins.items():
            ours = [owner] if (owner := self._owner(name)) else []
            for plugin in owners:
                others = ours + [other.owner for other in owners if other is not plugin]
                status, reason = plugin.status(others, base)
                about = (plugin.target, plugin.distribution, plugin.version, reason)
                yield RegistryEntry(name, self.kind, "plugin", status, *about)

    def owners(self, name: str) -> list[str]:
        """Who has a name already, in words, plug-ins included; nothing is imported."""
        own = [owner] if (owner := self._owner(name)) else []
        return own + [plugin.owner for plugin in self._read().get(name, [])]

    # -- changing -----------------------------------------------------------------------------

    @overload
    def register(self, name: str, cls: _Class, *, replace: bool = False) -> _Class: ...
    @overload
    def register(self, name: str, *, replace: bool = False) -> Callable[[_Class], _Class]: ...
    def register(self, name: str, cls: Any = None, *, replace: bool = False) -> Any:
        """Gives a class a name for the running process; also a decorator, `@register("name")`.

        Args:
            name: the name, an ASCII identifier.
            cls: a concrete component class of this kind; left out in a decorator.
            replace: True takes the name from whoever has it (`unregister` gives it back). Not
                needed where a registered class is defined again (same module and qualified name),
                as in a notebook cell that is run twice.

        Raises:
            ArgumentError: the name is taken (both owners are named) or is not an identifier.
            ArgumentTypeError: the class does not fit.
        """
        if not is_spec_name(name):
            raise ArgumentError(
                f"name={name!r} cannot name a {self.kind}: a spec string could not hold it. Use "
                f"ASCII letters, digits and _, and no keyword of Python, as in "
                f'register("my_{self.kind}", cls).'
            )
        if cls is None:
            return lambda decorated: self.register(name, decorated, replace=replace)
        check_component_class(cls, self._base_class())
        with self._lock:
            owner = self._owner(name)
            former = self._registered.get(name)
            # by target: a notebook cell that runs again makes a new class of the same place
            again = former is not None and _target(former) == _target(cls)
            if owner and not replace and not again:
                raise ArgumentError(
                    f"name={name!r} cannot be given to {_target(cls)}: it already belongs to "
                    f"{owner}. Choose another name, or pass replace=True to take it over."
                )
            self._registered[name] = cls
        return cls

    def unregister(self, name: str) -> None:
        """Takes back what `register` did; a built-in with the same name works again."""
        with self._lock:
            if name in self._registered:
                del self._registered[name]
            elif owner := self._owner(name):
                raise ArgumentError(
                    f"name={name!r} cannot be unregistered: it belongs to {owner}. Only names "
                    f"given with register() can be taken back."
                )
            else:
                raise UnknownComponentError(self._unknown(name))

    def refresh(self) -> None:
        """Forgets the entry points, so that the next miss reads those now installed."""
        with self._lock:
            self._plugins = None

    # -- inside -------------------------------------------------------------------------------

    def _parse(self, spec: str) -> ParsedSpec:
        try:
            return parse_spec(spec)
        except SpecError as error:
            # before the lines that show the place
            first, newline, rest = str(error).partition("\n")
            raise SpecError(f"{first}{self._near(spec)}{newline}{rest}") from None

    def _near(self, spec: str) -> str:
        """The hint for a text with something like a name where a name should be."""
        known = {*self.names(), *self._aliases}
        heads = (part.partition("(")[0].strip() for part in spec.split("|"))
        hints = (did_you_mean(head, known) for head in heads if not is_spec_name(head))
        return next(filter(None, hints), "")

    def _read(self) -> dict[str, list[Plugin]]:
        with self._lock:
            if self._plugins is None:
                self._plugins = read_plugins(self.group)
                for name, plugins in self._plugins.items():
                    if name in self._builtins or name in self._aliases:
                        _LOGGER.warning(
                            "the %s %r of %s is not used: the name belongs to %s",
                            self.kind, name, " and ".join(plugin.owner for plugin in plugins),
                            self._owner(name),
                        )  # fmt: skip
            return self._plugins

    def _import(self, target: str) -> type[Any]:
        # not under the lock: a module that is being imported may register something itself
        module, _, attribute = target.partition(":")
        found: type[Any] = getattr(importlib.import_module(module, self._package), attribute)
        return found

    def _base_class(self) -> type[_Base]:
        found: Any = self._import(self._base) if isinstance(self._base, str) else self._base
        base: type[_Base] = found
        return base

    def _owner(self, name: str) -> str:
        if name in self._registered:
            return f"{_target(self._registered[name])} (registered in this process)"
        if name in self._aliases:
            return f"the built-in {self.kind} {self._aliases[name]!r}, as its alias"
        return f"the built-in {self.kind} {self._builtins[name]}" if name in self._builtins else ""

    def _name_of(self, component: AbstractComponent) -> str:
        cls = type(component)
        if not isinstance(component, self._base_class()):
            return component.name  # a nested component of another kind
        # the class's own name first: one class may have several
        own = component.name
        for name in sorted(self._registered, key=lambda name: (name != own, name)):
            if self._registered[name] is cls:
                return name
        for name, target in self._builtins.items():
            may_be = name not in self._registered and target.endswith(f":{cls.__name__}")
            if may_be and self._import(target) is cls:
                return name
        for name, owners in sorted(self._read().items(), key=lambda item: item[0] != own):
            # by target too: the class may have been imported past the registry
            alone = len(owners) == 1 and not self._owner(name) and is_spec_name(name)
            if alone and (owners[0].loaded is cls or owners[0].target == _target(cls)):
                return name
        raise SpecError(
            f"{component!r} has no spec string: {_target(cls)} has no name among the {self.kind}s. "
            f'Give it one with register("{component.name}", {cls.__name__}).'
        )

    def _unknown(self, name: str) -> str:
        known = self.names()
        others = {other.kind for other in list(_REGISTRIES) if other._owner(name)} - {self.kind}
        if others:
            kinds = sorted(others)
            return (
                f"{self.kind}={name!r}: there is no {self.kind} of that name, but there "
                f"{'is' if len(kinds) == 1 else 'are'} {' and '.join(map(_a, kinds))}; pass it as "
                f"the {' or the '.join(kinds)}. The {self.kind}s are {', '.join(known)}."
            )
        if not is_spec_name(name):
            return (
                f"name={name!r} is not a name; a spec string with parameters goes to create()."
                f"{self._near(name)}"
            )
        hint = did_you_mean(name, {*known, *self._aliases})
        return (
            f"{self.kind}={name!r}: there is no {self.kind} of that name. Those that exist are "
            f"{', '.join(known) or 'none'}."
            f"{hint or ' One of a plug-in is there once its package is installed.'}"
        )


def _target(cls: type[Any]) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _a(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def _own_version() -> str | None:
    try:
        return importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
