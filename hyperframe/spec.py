"""Spec strings: a component written as text, such as `"sort_lsh(block_size=256)"`.

The grammar is the keyword part of a Python call, read with `ast` and never evaluated:

    spec   = name | name(parameter=value, ...) | spec "|" spec
    value  = number | string | True | False | None | inf | (item, ...) | [item, ...] | call | pipe
    item   = value | name

A call or a pipe in the place of a value, or a bare name in a tuple or list, stands for the string
of that spec. The pipe is the union of detectors. Lists become tuples, since a component is frozen.

    >>> from hyperframe.spec import parse_spec
    >>> parse_spec("sort_lsh(block_size=256)")
    ParsedSpec(name='sort_lsh', kwargs={'block_size': 256})
    >>> str(parse_spec("sliding_window(width=128) | sort_lsh()"))
    "union(detectors=('sliding_window(width=128)', 'sort_lsh'))"
    >>> parse_spec("union(detectors=(sort_lsh, sliding_window))").kwargs
    {'detectors': ('sort_lsh', 'sliding_window')}
"""

from __future__ import annotations

import ast
import dataclasses
import keyword
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from .component import AbstractComponent
from .errors import ArgumentTypeError, SpecError

__all__ = ["ParsedSpec", "is_spec_name", "parse_spec", "to_spec"]

_FORM = 'write a name, "name(parameter=value, ...)" or several of them joined by " | "'
# misspelt literals, which as bare names in a tuple would pass for components
_ALMOST_LITERALS = frozenset({"true", "false", "none", "null", "nil", "inf", "infinity", "nan"})
_VALUES = "a value is a number, a string, True, False, None, or a tuple or list of values"


@dataclasses.dataclass(frozen=True)
class ParsedSpec:
    """What a spec string says: the component's name and its parameters.

    `str()` of it is the canonical text, and `parse_spec(str(parsed)) == parsed`.
    """

    name: str
    kwargs: Mapping[str, Any]

    def __str__(self) -> str:
        texts = {key: _literal_text(value) for key, value in self.kwargs.items()}
        return _call_text(self.name, texts)


def is_spec_name(name: object) -> bool:
    """Whether a string can be a component's name: a plain ASCII identifier, no Python keyword."""
    if not isinstance(name, str) or keyword.iskeyword(name):
        return False
    return re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None


def parse_spec(text: str) -> ParsedSpec:
    """Reads a spec string. Nothing is evaluated and nothing is imported.

    Args:
        text: the spec; surrounding blanks do not matter.

    Returns:
        The name and the keyword parameters. A pipe gives the name "union" and one parameter
        `detectors`, a flat tuple of canonical spec strings.

    Raises:
        SpecError: the text is no spec; the message points at the column.
        ArgumentTypeError: `text` is not a string.

    Example:
        >>> parse_spec("expander_sketch(tau=0.01)").kwargs
        {'tau': 0.01}
    """
    given: object = text
    if not isinstance(given, str):
        raise ArgumentTypeError(
            f"spec={given!r} has type {type(given).__name__}, but a spec is text; {_FORM}."
        )
    return _Parser(text).parse()


class _Parser:
    """One parse: keeps the text so that every refusal can point into it."""

    def __init__(self, text: str) -> None:
        self.text = text.strip()

    def parse(self) -> ParsedSpec:
        if not self.text:
            raise self.refusal("the text is empty")
        try:
            return self.spec(ast.parse(self.text, mode="eval").body)
        except SpecError:
            raise
        except SyntaxError as error:
            why = f"this is not well-formed ({error.msg})"
            raise self.refusal_at(why, error.lineno or 1, error.offset or 1) from None
        except (RecursionError, MemoryError):
            raise self.refusal("it is nested too deeply") from None
        except ValueError as error:
            raise self.refusal(f"it holds characters no spec can hold ({error})") from None

    def spec(self, node: ast.expr) -> ParsedSpec:
        if _is_pipe(node):
            return ParsedSpec("union", {"detectors": tuple(self.members(node))})
        if isinstance(node, ast.Name):
            return ParsedSpec(self.name(node), {})
        if isinstance(node, ast.Call):
            return self.call(node)
        raise self.refusal("this is neither a name nor a call", node)

    def members(self, node: ast.expr) -> list[str]:
        if isinstance(node, ast.BinOp) and _is_pipe(node):
            return self.members(node.left) + self.members(node.right)
        return [str(self.spec(node))]

    def call(self, node: ast.Call) -> ParsedSpec:
        if not isinstance(node.func, ast.Name):
            raise self.refusal("only a plain name can be called", node.func)
        name = self.name(node.func)
        if node.args:
            raise self.refusal(
                f"positional arguments are not accepted; name the parameter of {name}", node.args[0]
            )
        kwargs: dict[str, Any] = {}
        for item in node.keywords:
            if item.arg is None:
                raise self.refusal("** is not accepted; write every parameter out", item.value)
            if item.arg in kwargs:
                raise self.refusal(f"the parameter {item.arg!r} is given twice", item.value)
            kwargs[item.arg] = self.value(item.value)
        return ParsedSpec(name, kwargs)

    def name(self, node: ast.Name) -> str:
        if not is_spec_name(node.id):
            raise self.refusal(f"{node.id!r} cannot name a component", node)
        return node.id

    def value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and isinstance(
            node.value, (bool, int, float, str, type(None))
        ):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            number = self.value(node.operand)
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise self.refusal("a sign needs a number", node)
            return -number if isinstance(node.op, ast.USub) else number
        if isinstance(node, (ast.Tuple, ast.List)):
            return tuple(self.item(item) for item in node.elts)
        if isinstance(node, ast.Call) or _is_pipe(node):
            return str(self.spec(node))
        if isinstance(node, ast.Name):
            if node.id == "inf":
                return math.inf
            why = f"a bare name is no value; quote it ({node.id!r}) if text is meant"
            raise self.refusal(why, node)
        raise self.refusal(_VALUES, node)

    def item(self, node: ast.expr) -> Any:
        """A value in a tuple or list, where a bare name stands for the spec without parameters."""
        if isinstance(node, ast.Name) and node.id.lower() not in _ALMOST_LITERALS:
            return self.name(node)
        return self.value(node)

    def refusal(self, why: str, node: ast.expr | None = None) -> SpecError:
        if node is None:
            return SpecError(f"cannot read the spec {self.text!r}: {why}; {_FORM}.")
        # ast counts columns in UTF-8 bytes
        line = self.lines()[node.lineno - 1].encode()[: node.col_offset]
        return self.refusal_at(why, node.lineno, len(line.decode()) + 1)

    def refusal_at(self, why: str, lineno: int, column: int) -> SpecError:
        lines = self.lines()
        line = lines[min(lineno, len(lines)) - 1]
        where = f"column {column}" if len(lines) == 1 else f"line {lineno}, column {column}"
        return SpecError(
            f"cannot read the spec {self.text!r} at {where}: {why}; {_FORM}.\n"
            f"    {line}\n"
            f"    {' ' * (column - 1)}^"
        )

    def lines(self) -> list[str]:
        return re.split(r"\r\n|\r|\n", self.text)


def _is_pipe(node: ast.expr) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)


def to_spec(
    component: AbstractComponent,
    *,
    name_of: Callable[[AbstractComponent], str] | None = None,
) -> str:
    """Writes a component as its canonical spec string, with only the parameters that differ.

    Args:
        component: an instance.
        name_of: gives the name of a component (also of nested ones); by default its `name`.

    Returns:
        Text for which `create(text) == component`.

    Raises:
        SpecError: a field holds something that has no literal form, such as a tensor.

    Example:
        >>> from hyperframe.detectors.sort_lsh import SortLSH
        >>> to_spec(SortLSH(block_size=128))
        'sort_lsh(block_size=128)'
    """
    given: object = component
    if not isinstance(given, AbstractComponent):
        raise ArgumentTypeError(
            f"component={given!r} has type {type(given).__name__}, but only an instance "
            f"of a detector, sampler or estimator can be written as a spec; create one first."
        )
    name = name_of(component) if name_of else component.name
    texts = {}
    for field in dataclasses.fields(component):
        if not field.init:
            continue
        value = getattr(component, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value is default:
            continue
        text = _field_text(value, name_of)
        if text is None:
            raise SpecError(
                f"{name}: the field {field.name!r} holds a {type(value).__name__}, which has no "
                f"literal form, so this component has no spec string; pass the instance itself "
                f"instead of its spec."
            )
        # equal text covers a default that is written as a spec string and kept as a component
        if default is not dataclasses.MISSING and text == _field_text(default, name_of):
            continue
        texts[field.name] = text
    return _call_text(name, texts)


def _field_text(value: object, name_of: Callable[[AbstractComponent], str] | None) -> str | None:
    """The literal of a field's value, None where it has none; components become spec strings."""
    if isinstance(value, AbstractComponent):
        return repr(to_spec(value, name_of=name_of))
    if isinstance(value, tuple):
        items = [_field_text(item, name_of) for item in value]
        texts = [item for item in items if item is not None]
        if len(texts) < len(items):
            return None
        return f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"
    # the base's own repr: that of a numpy scalar or an enum member is no literal
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return None if math.isnan(value) else float.__repr__(value)
    if isinstance(value, str):
        return str.__repr__(value)
    return None


def _literal_text(value: object) -> str:
    return _field_text(value, None) or repr(value)


def _call_text(name: str, texts: Mapping[str, str]) -> str:
    arguments = ", ".join(f"{key}={text}" for key, text in texts.items())
    return f"{name}({arguments})" if arguments else name
