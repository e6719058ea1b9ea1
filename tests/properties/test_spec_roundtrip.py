"""Specs round-trip: whatever a component holds, its spec string makes an equal one."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any, ClassVar

from hypothesis import given
from hypothesis import strategies as st

from hyperframe.component import AbstractComponent, snake_case
from hyperframe.errors import SpecError
from hyperframe.spec import ParsedSpec, is_spec_name, parse_spec, to_spec


@dataclass(frozen=True, kw_only=True)
class Leaf(AbstractComponent):
    kind: ClassVar[str] = "detector"
    first: Any = 1
    second: Any = "text"
    third: Any = (0.5, None)


@dataclass(frozen=True, kw_only=True)
class Tree(AbstractComponent):
    """Holds components, and takes their specs too, as every component that nests does."""

    kind: ClassVar[str] = "detector"
    label: Any = None
    inner: Any = Leaf()
    parts: Any = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", create(self.inner))
        object.__setattr__(self, "parts", tuple(create(part) for part in self.parts))


CLASSES: dict[str, type[AbstractComponent]] = {"leaf": Leaf, "tree": Tree}


def create(spec: Any) -> Any:
    if isinstance(spec, AbstractComponent):
        return spec
    parsed = parse_spec(spec)
    return CLASSES[parsed.name](**parsed.kwargs)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=()), max_size=8)
    | st.sampled_from(["leaf", "tree(label=1)", "'", '"', "\\", "\n", 'it\'s "so"', "{x}"])
)
literals = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)
leaves = st.builds(Leaf, first=literals, second=literals, third=literals)
components = st.recursive(
    leaves,
    lambda inner: st.builds(
        Tree, label=literals, inner=inner, parts=st.lists(inner, max_size=2).map(tuple)
    ),
    max_leaves=4,
)
names = st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=6).filter(
    is_spec_name
)


@given(components)
def test_a_component_equals_the_one_made_from_its_spec(component: AbstractComponent) -> None:
    text = to_spec(component)
    again = create(text)
    assert again == component
    assert repr(again) == repr(component)  # equality alone would let 1, 1.0 and True pass
    assert to_spec(again) == text


@given(components)
def test_the_text_of_a_spec_is_already_canonical(component: AbstractComponent) -> None:
    text = to_spec(component)
    assert str(parse_spec(text)) == text
    assert parse_spec(f"  {text}\t") == parse_spec(text)


@given(names, st.dictionaries(names, literals, max_size=3))
def test_a_parsed_spec_equals_the_one_parsed_from_its_text(
    name: str, kwargs: dict[str, Any]
) -> None:
    spec = ParsedSpec(name, kwargs)
    assert parse_spec(str(spec)) == spec


@given(st.lists(leaves.map(to_spec), min_size=2, max_size=4))
def test_a_pipe_is_the_union_of_its_members_in_their_order(members: list[str]) -> None:
    parsed = parse_spec(" | ".join(members))
    assert parsed == ParsedSpec("union", {"detectors": tuple(members)})
    assert parse_spec(str(parsed)) == parsed


@given(
    st.text(max_size=40)
    | st.text("ab(=,)|'1.-*[]{}: \n\\", max_size=40)
    | st.lists(st.sampled_from(["a", "x=", "1", "(", ")", "|", ",", "'", "-", "**", "\n"])).map(
        "".join
    )
)
def test_any_text_either_parses_or_is_refused_with_a_reason(text: str) -> None:
    try:
        parsed = parse_spec(text)
    except SpecError as refusal:
        # only the one kind of error, with the text in it and no inner traceback to read
        message, cause = str(refusal), refusal.__cause__
    else:
        assert is_spec_name(parsed.name)
        assert parse_spec(str(parsed)) == parsed
        return
    assert repr(text.strip()) in message
    assert cause is None


@given(st.text(string.ascii_letters + string.digits, min_size=1).filter(str.isidentifier))
def test_snake_case_gives_a_name_that_stays_as_it_is(name: str) -> None:
    once = snake_case(name)
    assert snake_case(once) == once
    assert once == once.lower()
    assert once.replace("_", "") == name.lower()
