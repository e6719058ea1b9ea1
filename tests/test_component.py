"""Components: frozen, comparable, printable as code, named after their class, checked once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from hyperframe.component import (
    AbstractComponent,
    check_bool,
    check_choice,
    check_fraction,
    check_non_negative_int,
    check_parameters,
    check_positive_int,
    check_positive_number,
    snake_case,
)
from hyperframe.errors import ArgumentError, ArgumentTypeError, SpecError


@dataclass(frozen=True, kw_only=True)
class WindowLSH(AbstractComponent):
    kind: ClassVar[str] = "detector"
    width: int = 8
    mode: str = "both"
    shape: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        check_positive_int(self, "width", self.width)
        check_choice(self, "mode", self.mode, ("both", "left"))


@dataclass(frozen=True, kw_only=True)
class BigBird(AbstractComponent):
    kind: ClassVar[str] = "detector"
    registry_name: ClassVar[str | None] = "bigbird"
    budget: int


@dataclass(frozen=True, kw_only=True)
class BigBirdTwo(BigBird):
    pass


@pytest.mark.parametrize(
    "class_name,name",
    [
        ("SortLSH", "sort_lsh"),
        ("HeavyColumns", "heavy_columns"),
        ("KDE", "kde"),
        ("ApproxD", "approx_d"),
        ("BigBird", "big_bird"),
        ("LSHSort", "lsh_sort"),
        ("Uniform", "uniform"),
        ("Top2Block", "top2_block"),
    ],
)
def test_the_name_is_the_snake_case_of_the_class_name(class_name: str, name: str) -> None:
    assert snake_case(class_name) == name


def test_class_and_instance_know_the_name_and_a_given_one_is_not_inherited() -> None:
    assert WindowLSH.name == WindowLSH().name == "window_lsh"
    assert BigBird.name == "bigbird"
    assert BigBirdTwo.name == "big_bird_two"


def test_the_repr_is_code_that_makes_an_equal_component() -> None:
    component = WindowLSH(width=3, shape=(4,))
    assert eval(repr(component)) == component


def test_equal_components_have_equal_hashes() -> None:
    assert WindowLSH(width=3) == WindowLSH(width=3) != WindowLSH()
    assert len({WindowLSH(width=3), WindowLSH(width=3), WindowLSH()}) == 2


def test_a_component_is_frozen_and_takes_keywords_only() -> None:
    component: Any = WindowLSH()
    with pytest.raises(dataclasses.FrozenInstanceError):
        component.width = 3
    with pytest.raises(TypeError):
        WindowLSH(3)  # type: ignore[call-arg]


def test_replace_changes_a_copy_and_checks_it() -> None:
    component = WindowLSH()
    assert component.replace(width=3) == WindowLSH(width=3)
    assert component == WindowLSH()
    with pytest.raises(ArgumentError, match="width=0"):
        component.replace(width=0)
    with pytest.raises(SpecError, match=r"no parameter 'widht'.*Did you mean 'width'\?"):
        component.replace(widht=3)


def test_an_unknown_or_missing_parameter_is_named_with_what_exists() -> None:
    with pytest.raises(SpecError) as caught:
        check_parameters(WindowLSH, ["wdth"])
    for part in ("window_lsh", "'wdth'", "width, mode, shape", "Did you mean 'width'?"):
        assert part in str(caught.value)
    with pytest.raises(SpecError, match=r"bigbird: the parameter 'budget' has no default"):
        check_parameters(BigBird, [], complete=True)
    check_parameters(BigBird, ["budget"], complete=True)


INT_CHECKS = [check_positive_int, check_non_negative_int]
NUMBER_CHECKS = [*INT_CHECKS, check_fraction, check_positive_number]


@pytest.mark.parametrize("check", NUMBER_CHECKS)
@pytest.mark.parametrize("value", [True, False, "1", None, (1,), 1j])
def test_what_is_no_number_is_refused_with_component_field_value_and_type(
    check: Any, value: object
) -> None:
    with pytest.raises(ArgumentTypeError) as caught:
        check(WindowLSH(), "width", value)
    for part in (f"window_lsh: width={value!r}", type(value).__name__, "pass "):
        assert part in str(caught.value)


@pytest.mark.parametrize("check", INT_CHECKS)
def test_a_float_is_no_int(check: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"width=2\.0 has type float"):
        check("window_lsh", "width", 2.0)


@pytest.mark.parametrize("check", INT_CHECKS)
def test_an_integer_of_another_library_is_refused_with_the_way_to_a_plain_int(check: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"has type int64, .*; .*pass int\(value\)\."):
        check("window_lsh", "width", np.int64(2))
    for value in (2.0, True):
        with pytest.raises(ArgumentTypeError, match=r"; pass a plain int\."):
            check("window_lsh", "width", value)


@pytest.mark.parametrize(
    "check,good,bad",
    [
        (check_positive_int, (1, 7), (0, -1)),
        (check_non_negative_int, (0, 7), (-1,)),
        (check_fraction, (0.5, 1, 1.0), (0, -0.1, 1.5, float("nan"), float("inf"))),
        (check_positive_number, (1, 0.5), (0, -0.5, float("nan"), float("inf"))),
    ],
)
def test_a_number_passes_exactly_if_it_is_in_range(
    check: Any, good: tuple[float, ...], bad: tuple[float, ...]
) -> None:
    for value in good:
        assert check("owner", "field", value) is value
    for value in bad:
        with pytest.raises(ArgumentError, match=r"owner: field=.*; pass "):
            check("owner", "field", value)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("one", [False, True])
def test_the_ends_of_a_fraction_are_allowed_as_asked(zero: bool, one: bool) -> None:
    for value, allowed in ((0, zero), (1.0, one)):
        if allowed:
            assert check_fraction("c", "f", value, include_zero=zero, include_one=one) == value
        else:
            with pytest.raises(ArgumentError, match="is outside"):
                check_fraction("c", "f", value, include_zero=zero, include_one=one)


def test_a_choice_is_refused_with_the_choices_and_the_nearest() -> None:
    assert check_choice(WindowLSH, "mode", "left", ("both", "left")) == "left"
    with pytest.raises(ArgumentError) as caught:
        check_choice(WindowLSH, "mode", "lefft", ("both", "left"))
    for part in ("window_lsh: mode='lefft'", "'both', 'left'", "Did you mean 'left'?"):
        assert part in str(caught.value)
    with pytest.raises(ArgumentTypeError, match="chosen by name"):
        check_choice(WindowLSH, "mode", 3, ("both", "left"))


def test_a_switch_takes_only_true_and_false() -> None:
    assert check_bool("c", "f", True) is True
    with pytest.raises(ArgumentTypeError, match=r"c: f=1 has type int.*pass True or False"):
        check_bool("c", "f", 1)
    with pytest.raises(ArgumentTypeError, match=r"object: f=None"):
        check_bool(object(), "f", None)
