"""The directive `modules-of`: the API of every public module of a package, without a list to keep.

    .. modules-of:: hyperframe.detectors
       :exclude: base

is a section for every public module inside of `hyperframe.detectors` (and of its packages). Its
options `:only:` and `:exclude:` name modules or packages inside; `:registered:` takes the modules
that registered components live in, under the components' names, and `:unregistered:` the others.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

from docstrings import adapted
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def modules_of(package: str, only: str = "", exclude: str = "") -> list[str]:
    """Return the public modules inside of a package, in the order of `only`, then by name."""

    def is_in(name: str, chosen: str) -> bool:
        places = [f"{package}.{entry}" for entry in chosen.split()]
        return any(name == place or name.startswith(f"{place}.") for place in places)

    def place(name: str) -> tuple[int, str]:
        chosen = only.split()
        return next((i for i, entry in enumerate(chosen) if is_in(name, entry)), 0), name

    path = importlib.import_module(package).__path__
    names = (module.name for module in pkgutil.walk_packages(path, f"{package}."))
    found = [
        name for name in names
        if not any(part.startswith("_") for part in name.split("."))
        and (not only or is_in(name, only)) and not is_in(name, exclude)
    ]  # fmt: skip
    return sorted(found, key=place)


def registered(package: str) -> dict[str, str]:
    """Return the modules of a registry's own components, with the names of those."""
    found: dict[str, str] = {}
    for name, place in importlib.import_module(package)._BUILTINS.items():
        found["hyperframe" + place.partition(":")[0]] = name
    return found


def own_names(name: str) -> list[str]:
    """Return the public names that a module defines, not those that it passes on."""
    module = importlib.import_module(name)
    return [
        entry for entry in getattr(module, "__all__", [])
        if entry in vars(module) and _is_own(vars(module)[entry], module)
    ]  # fmt: skip


def _is_own(value: object, module: ModuleType) -> bool:
    if inspect.isclass(value) or inspect.isfunction(value):
        return bool(value.__module__ == module.__name__)
    # constants don't say where they are from; packages pass them on
    return not hasattr(module, "__path__") and not inspect.ismodule(value)


class ModulesOf(SphinxDirective):
    """Sections with `automodule` for each of the modules."""

    required_arguments = 1
    option_spec = {  # noqa: RUF012
        "only": directives.unchanged, "exclude": directives.unchanged,
        "registered": directives.flag, "unregistered": directives.flag,
    }  # fmt: skip

    def run(self) -> list[nodes.Node]:
        package = self.arguments[0]
        titles = {
            name: name.removeprefix("hyperframe.")
            for name in modules_of(
                package, only=self.options.get("only", ""),
                exclude=self.options.get("exclude", ""),
            )
        }  # fmt: skip
        if "registered" in self.options:
            known = registered(package)
            titles = {name: known[name] for name in known if name in titles}
        elif "unregistered" in self.options:
            known = registered(package)
            titles = {name: title for name, title in titles.items() if name not in known}
        lines = []
        for name, title in titles.items():
            try:
                names = own_names(name)
            except ImportError:
                names = ["..."]  # autodoc warns, and says why
            lines += [title, "-" * len(title), ""]
            if names:
                lines += [f".. automodule:: {name}", f"   :members: {', '.join(names)}"]
                lines += ["   :special-members: __call__", ""]
            else:
                about = inspect.getdoc(importlib.import_module(name)) or ""
                lines += [f".. py:module:: {name}", "", *adapted(about.splitlines()), ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("modules-of", ModulesOf)
    return {"parallel_read_safe": True}
