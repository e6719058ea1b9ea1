"""The library's docstrings, which are Google's style in Markdown, as Sphinx reads them.

Code in single backticks is code by the setting `default_role`. Done here: stars and bars are no
markup, an indented block behind a colon is code, and `Cost:` and `Source:` begin a paragraph.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

# sections of one paragraph: what it costs, and where it is from
LABELS = ("Cost", "Source")
_LABEL = re.compile(rf"^(\s*)({'|'.join(LABELS)}):(?= |$)")
_WITHIN = re.compile(rf"(?<=[.)]) ({'|'.join(LABELS)}): ")
_PROMPT = re.compile(r"\s*(>>>|\.\.\.)( |$)")
_VALUES = ("attribute", "data", "property")
# in letters: some lines of the page
LONGEST_VALUE = 300


def adapted(lines: list[str]) -> list[str]:
    """Return the lines of a docstring in reStructuredText, but for Google's sections."""
    found: list[str] = []
    for number, line in enumerate(lines):
        if _PROMPT.match(line):
            found.append(line)
            continue
        if _is_code(lines, number):
            if not lines[number - 1].strip() and not _is_code(lines, _above(lines, number)):
                found += ["::", ""]
            found.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        first, *others = _WITHIN.sub(r"\n\1: ", _without_markup(line)).split("\n")
        for piece in [first, *(indent + other for other in others)]:
            if _LABEL.match(piece):
                if found and found[-1].strip():
                    found.append("")
                piece = _LABEL.sub(r"\1**\2:**", piece)
            found.append(piece)
    return found


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def _above(lines: list[str], number: int) -> int:
    """Return the last line before that is not empty; -1 for none."""
    return next((i for i in range(number - 1, -1, -1) if lines[i].strip()), -1)


def _is_code(lines: list[str], number: int) -> bool:
    """Whether a line lies in an indented block of its own, as Markdown has code.

    Not so what Google's sections hold, which begin right below their names, nor what belongs to a
    point of a list, nor examples with prompts.
    """
    if number < 0 or not lines[number].strip() or _depth(lines[number]) < 4:
        return False
    above = _above(lines, number)
    while above >= 0 and _depth(lines[above]) > 0:
        above = _above(lines, above)
    if above < 0 or lines[above + 1].strip() or re.match(r"[-*] |\d+\. ", lines[above]):
        return False
    block = [line for line in lines[above + 1 : number + 1] if line.strip()]
    return not any(_PROMPT.match(line) for line in block)


def _without_markup(line: str) -> str:
    """Escape what is no code, no emphasis, and not the name of an argument such as `**options:`."""
    if re.match(r"\s*\*{1,2}\w+:", line):
        return line
    parts = re.split(r"(`+[^`]*`+|(?<!\w)\*[^\s*](?:[^*]*[^\s*])?\*(?!\w))", line)
    parts[::2] = [re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def _before(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    lines[:] = adapted(lines)
    if what in _VALUES:
        # napoleon would take what stands before a colon for a type
        app.env.temp_data["docstring"] = list(lines)


def _after(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    if what in _VALUES:
        lines[:] = app.env.temp_data.pop("docstring")


def _signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """Show the fields of a dataclass also where `__new__` looks at them first."""
    if what != "class" or not dataclasses.is_dataclass(obj) or "__new__" not in vars(obj):
        return None
    init = inspect.signature(obj.__init__)
    shown = [
        parameter.replace(annotation=parameter.empty)
        for parameter in list(init.parameters.values())[1:]
    ]
    return str(init.replace(parameters=shown, return_annotation=init.empty)), ""


def _skip(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: Any) -> bool | None:
    """Leave out methods of a component that do what the abstract class documents."""
    from hyperframe.component import AbstractComponent

    function = getattr(obj, "fget", None) or obj
    owner, _, method = getattr(function, "__qualname__", "").rpartition(".")
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    cls = getattr(module, owner, None)
    if isinstance(cls, type) and issubclass(cls, AbstractComponent):
        documented = {"__post_init__"}.union(
            *(vars(base) for base in cls.__mro__[1:] if base.__name__.startswith("Abstract"))
        )
        return True if method in documented else None
    return None


def _private(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """Let annotations name what has no page, because its module does not offer it."""
    module, _, name = node.get("reftarget", "").rpartition(".")
    if node.get("refdomain") != "py" or module not in sys.modules:
        return None
    is_offered = name in getattr(sys.modules[module], "__all__", []) and "._" not in module
    return contnode if module.startswith("hyperframe") and not is_offered else None


def _without_tables(app: Sphinx, domain: str, kind: str, content: nodes.Element) -> None:
    """Leave out the value of a constant that is a table: its docstring says what it holds."""
    description: Any = content.parent
    for part in list(description.findall(addnodes.desc_annotation)):
        text = part.astext().strip()
        if text.startswith("=") and len(text) > LONGEST_VALUE:
            part.parent.remove(part)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-skip-member", _skip)
    app.connect("missing-reference", _private)
    app.connect("object-description-transform", _without_tables)
    # around napoleon, which makes fields of the sections that it knows
    app.connect("autodoc-process-docstring", _before, priority=400)
    app.connect("autodoc-process-docstring", _after, priority=600)
    return {"parallel_read_safe": True}
