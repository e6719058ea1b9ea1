"""Spec strings: what they mean, what is refused and where the refusal points."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from hyperframe.component import AbstractComponent
from hyperframe.errors import ArgumentTypeError, SpecError
from hyperframe.spec import ParsedSpec, is_spec_name, parse_spec, to_spec


@dataclass(frozen=True, kw_only=True)
class Toy(AbstractComponent):
    kind: ClassVar[str] = "detector"
    size: int = 4
    rate: float = 0.5
    items: Any = ()
    inner: Any = None
    made: Any = field(default_factory=lambda: (1, 2))


@dataclass(frozen=True, kw_only=True)
class Needy(AbstractComponent):
    kind: ClassVar[str] = "sampler"
    size: int


@pytest.mark.parametrize(
    "text,name,kwargs",
    [
        ("sort_lsh", "sort_lsh", {}),
        ("  sort_lsh( ) ", "sort_lsh", {}),
        (
            "sort_lsh(block_size=256, centre_keys=True)",
            "sort_lsh",
            {"block_size": 256, "centre_keys": True},
        ),
        ("a(x=-1, y=+2.5, z=-1e-3)", "a", {"x": -1, "y": 2.5, "z": -1e-3}),
        ("a(x=None, y='text', z=False)", "a", {"x": None, "y": "text", "z": False}),
        ("a(x=(1, -2), y=[1, [2, 3]], z=())", "a", {"x": (1, -2), "y": (1, (2, 3)), "z": ()}),
        ("a(x=inf, y=-inf)", "a", {"x": math.inf, "y": -math.inf}),
        ("a(\n  x=1,\n)", "a", {"x": 1}),
        (
            "union(detectors=('w(width=128)', 'sort_lsh'))",
            "union",
            {"detectors": ("w(width=128)", "sort_lsh")},
        ),
        ("a(inner=b(x=1))", "a", {"inner": "b(x=1)"}),
        ("a(inner=(b(x=1), c()))", "a", {"inner": ("b(x=1)", "c")}),
        ("a(inner=(b, c(x=1)), y=[[b]])", "a", {"inner": ("b", "c(x=1)"), "y": (("b",),)}),
        ("a(x=(b, None, True, inf, -inf))", "a", {"x": ("b", None, True, math.inf, -math.inf)}),
        ("a(inner=b | c(x=1))", "a", {"inner": "union(detectors=('b', 'c(x=1)'))"}),
        ("a(x=1) | b", "union", {"detectors": ("a(x=1)", "b")}),
        ("a | b | c", "union", {"detectors": ("a", "b", "c")}),
        ("a | (b | c)", "union", {"detectors": ("a", "b", "c")}),
    ],
)
def test_a_spec_means_a_name_and_keyword_parameters(
    text: str, name: str, kwargs: dict[str, Any]
) -> None:
    parsed = parse_spec(text)
    assert (parsed.name, parsed.kwargs) == (name, kwargs)
    assert [type(value) for value in parsed.kwargs.values()] == [type(v) for v in kwargs.values()]
    assert parse_spec(str(parsed)) == parsed


@pytest.mark.parametrize(
    "text,why,column",
    [
        ("", "the text is empty", None),
        ("   ", "the text is empty", None),
        ("a(256)", "positional arguments are not accepted", 3),
        ("  a(256)", "positional arguments are not accepted", 3),
        ("a(x=1, *y)", "positional arguments are not accepted", 8),
        ("a(**x)", "** is not accepted", 5),
        ("a(x=1, x=2)", "'x' is given twice", 10),
        ("a(x=y)", "quote it ('y')", 5),
        ("a(x=true)", "quote it ('true')", 5),
        ("a(x=(y))", "quote it ('y')", 6),
        ("a(x=(1, true))", "quote it ('true')", 9),
        ("a(x=[nan])", "quote it ('nan')", 6),
        ("a(x=(1, -y))", "quote it ('y')", 10),
        ("a(x=(ä,))", "cannot name a component", 6),
        ("a(x=1+2)", "a value is a number", 5),
        ("a(x={1: 2})", "a value is a number", 5),
        ("a(x=b'1')", "a value is a number", 5),
        ("a(x=1j)", "a value is a number", 5),
        ("a(x=...)", "a value is a number", 5),
        ("a(x=f'{y}')", "a value is a number", 5),
        ("a(x=[y for y in z])", "a value is a number", 5),
        ("a(x='ä', y=z)", "quote it ('z')", 12),
        ("a(x=-True)", "a sign needs a number", 5),
        ("a(x=-'1')", "a sign needs a number", 5),
        ("a(x=not 1)", "a value is a number", 5),
        ("sort-lsh", "neither a name nor a call", 1),
        ("a.b", "neither a name nor a call", 1),
        ("a.b()", "only a plain name can be called", 1),
        ("a()()", "only a plain name can be called", 1),
        ("'a'", "neither a name nor a call", 1),
        ("a | 3", "neither a name nor a call", 5),
        ("ä", "cannot name a component", 1),
        ("lambda: 1", "neither a name nor a call", 1),
        ("None", "neither a name nor a call", 1),
        ("a; b", "not well-formed", 2),
        ("a(x=1", "not well-formed", 2),
        ("a b", "not well-formed", None),
        ("a = 1", "not well-formed", None),
        ("a(x=\0)", "cannot read the spec", None),
        ("a(x='\ud800')", "no spec can hold", None),
    ],
)
def test_anything_else_is_refused_with_the_text_the_reason_and_the_column(
    text: str, why: str, column: int | None
) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(text)
    message = str(caught.value)
    assert repr(text.strip()) in message
    assert why in message
    assert "name(parameter=value, ...)" in message  # the remedy
    if column is not None:
        assert f"at column {column}:" in message
        _, shown, pointer = message.splitlines()
        assert shown == "    " + text.strip()
        assert pointer == "    " + " " * (column - 1) + "^"


def test_a_refusal_in_a_text_of_several_lines_points_at_the_line() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec("a(\n  x=1,\n  y=z)")
    assert "at line 3, column 5" in str(caught.value)
    assert str(caught.value).endswith("      y=z)\n        ^")


def test_nothing_in_a_spec_is_ever_run() -> None:
    for text in ("a(x=__import__('os').getcwd())", "a(x=open)", "a(x=(lambda: 1)())"):
        with pytest.raises(SpecError):
            parse_spec(text)


def test_a_spec_nested_too_deeply_is_refused_like_any_other() -> None:
    with pytest.raises(SpecError):
        parse_spec("a(x=" + "(" * 5000 + ")" * 5000 + ")")
    with pytest.raises(SpecError):
        parse_spec("a" + "|a" * 50_000)


@pytest.mark.parametrize("text", [None, 3, Toy(), b"sort_lsh"])
def test_what_is_no_text_is_refused(text: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=f"has type {type(text).__name__}"):
        parse_spec(text)


@pytest.mark.parametrize(
    "name,good",
    [("sort_lsh", True), ("A1", True), ("1a", False), ("a b", False), ("", False), ("for", False),
     ("ä", False), ("a\n", False), (3, False)],
)  # fmt: skip
def test_a_name_is_an_ascii_identifier(name: object, good: bool) -> None:
    assert is_spec_name(name) is good


class Colour(str, enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


@pytest.mark.parametrize(
    "component,text",
    [
        (Toy(), "toy"),
        (Toy(size=4, rate=0.5), "toy"),
        (Toy(made=(1, 2)), "toy"),
        (Toy(size=-3), "toy(size=-3)"),
        (Toy(rate=math.inf), "toy(rate=inf)"),
        (Toy(rate=-math.inf), "toy(rate=-inf)"),
        (Toy(rate=np.float64(0.25)), "toy(rate=0.25)"),
        (Toy(inner=Colour.RED), "toy(inner='red')"),
        (Toy(inner=Level.LOW), "toy(inner=1)"),
        (Toy(inner=True, items=(1,)), "toy(items=(1,), inner=True)"),
        (Toy(items=(1, ("a", None))), "toy(items=(1, ('a', None)))"),
        (Toy(made=None), "toy(made=None)"),
        (Toy(inner="it's"), 'toy(inner="it\'s")'),
        (Needy(size=3), "needy(size=3)"),
        (Toy(inner=Toy()), "toy(inner='toy')"),
        (Toy(inner=Toy(inner=Needy(size=1))), """toy(inner="toy(inner='needy(size=1)')")"""),
        (Toy(items=(Toy(size=1), Toy())), "toy(items=('toy(size=1)', 'toy'))"),
    ],
)
def test_the_canonical_spec_holds_only_what_differs_from_the_defaults(
    component: AbstractComponent, text: str
) -> None:
    assert to_spec(component) == text
    assert str(parse_spec(text)) == text


@pytest.mark.parametrize(
    "value", [torch.zeros(2), [1], {"a": 1}, 1j, b"1", object(), (1, [2]), math.nan, Toy]
)
def test_a_field_without_a_literal_form_is_refused_by_name(value: object) -> None:
    with pytest.raises(SpecError) as caught:
        to_spec(Toy(inner=value))
    for part in ("toy: the field 'inner'", type(value).__name__, "pass the instance itself"):
        assert part in str(caught.value)


def test_only_a_component_has_a_spec() -> None:
    for value in ("toy", Toy, None):
        with pytest.raises(ArgumentTypeError, match="only an instance"):
            to_spec(value)  # type: ignore[arg-type]


def test_names_may_be_given_by_the_caller_also_for_nested_components() -> None:
    nested = Toy(inner=Needy(size=1))
    assert to_spec(nested, name_of=lambda c: "x_" + c.name) == "x_toy(inner='x_needy(size=1)')"


def test_a_parsed_spec_writes_itself_canonically() -> None:
    assert str(ParsedSpec("a", {"x": [1]})) == "a(x=[1])"
    assert str(parse_spec('a( x = "b" ,y=[ 1 ] )')) == "a(x='b', y=(1,))"
