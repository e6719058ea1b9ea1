"""A function becomes a detector class like any other: named, spelt, copied, registered."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch

from hyperframe.benchmarking.frontier import has_budget, with_budget
from hyperframe.detectors import registry
from hyperframe.detectors.simple import AbstractIndex, from_codes, from_index, from_scores
from hyperframe.errors import ArgumentError, ArgumentTypeError


@from_index
def sharp_keys(
    key: Any, *, count: int, order: float = 2.0, is_largest: bool = True, num_keys: int = 7
) -> Any:
    """The keys of largest norm."""
    return key.norm(order, dim=-1).topk(min(count, num_keys), largest=is_largest).indices


def test_the_class_has_the_name_the_words_and_the_parameters_of_the_function() -> None:
    assert issubclass(sharp_keys, AbstractIndex)
    assert sharp_keys.name == sharp_keys.__name__ == "sharp_keys"
    assert sharp_keys.__doc__ == "The keys of largest norm."
    assert sharp_keys.__module__ == __name__
    assert sharp_keys.parameters() == ("num_keys", "tile_size", "order", "is_largest")
    detector = sharp_keys(order=1.0)
    assert (detector.num_keys, detector.tile_size) == (7, 64)
    assert eval(repr(detector)) == detector == sharp_keys(order=1.0) != sharp_keys()
    for copied in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert copied == detector
    assert hash(detector) == hash(sharp_keys(order=1.0))


def test_parameters_reach_the_function() -> None:
    key = torch.tensor([[1.0, 1.0], [1.9, 0.0], [0.1, 0.0]]).view(1, 1, 3, 2)
    for detector, column in (
        (sharp_keys(num_keys=1), 1),
        (sharp_keys(num_keys=1, order=1.0), 0),
        (sharp_keys(num_keys=1, is_largest=False), 2),
    ):
        assert detector.find(key, key).to_dense()[0, 0, 0].nonzero().item() == column


def test_it_is_registered_written_and_made_again_like_any_other() -> None:
    registry.register("sharp_keys", sharp_keys)
    try:
        detector = registry.create("sharp_keys(num_keys=9, order=1)")
        assert registry.to_spec(detector) == "sharp_keys(num_keys=9, order=1)"
        assert registry.create(registry.to_spec(detector)) == detector
    finally:
        registry.unregister("sharp_keys")


def test_the_frontier_finds_its_budget() -> None:
    assert has_budget(sharp_keys())
    assert with_budget(sharp_keys(order=1.0), 33) == sharp_keys(num_keys=33, order=1.0)


def test_a_subclass_is_a_detector_of_its_own() -> None:
    class Sharper(sharp_keys):  # type: ignore[misc, valid-type]
        pass

    assert Sharper.name == "sharper"
    assert Sharper(order=1.0).order == 1.0


@pytest.mark.parametrize(
    "name, value", [("order", "2"), ("order", True), ("is_largest", 1), ("order", None)]
)
def test_a_value_of_another_type_than_the_default_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=f"sharp_keys: {name}={value!r} has type"):
        sharp_keys(**{name: value})


def positional(key, count): ...
def variadic(key, **options): ...
def gathering(key, *, count, **options): ...
def nameless(key, *, count, bound): ...
def shadowing(key, *, count, find=3): ...
def misnamed(keys, *, count): ...
def starred(key, *keys, count): ...


REFUSED = [
    (positional, r"positional parameters \(key, count\); write key"),
    (variadic, r"has the parameter \*\*options"),
    (gathering, r"has the parameter \*\*options"),
    (starred, r"has the parameter \*keys"),
    (nameless, "'bound' of nameless has no default; give it one, or name one of count"),
    (shadowing, "'find' of shadowing has the name of something"),
    (misnamed, r"parameters \(keys\); write misnamed"),
]


@pytest.mark.parametrize("function, text", REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_a_function_that_cannot_be_a_detector_is_refused(function: Any, text: str) -> None:
    with pytest.raises(ArgumentError, match=text.replace("write key", "write positional")):
        from_index(function)


@pytest.mark.parametrize("maker", [from_codes, from_index, from_scores])
def test_what_is_no_function_is_refused(maker: Any) -> None:
    for wrong in (3, functools.partial(sharp_keys), None):
        with pytest.raises(ArgumentTypeError, match=f"{maker.__name__}: got .*; decorate a functi"):
            maker(wrong)
    with pytest.raises(ArgumentError, match="a function called '<lambda>' cannot name a detector"):
        maker(lambda key, *, count: None)
