"""The exceptions: each one is caught both as ours and as the built-in one a caller expects."""

from __future__ import annotations

import pickle

import pytest

from hyperframe import errors
from hyperframe.errors import did_you_mean

EXPECTED = {
    "ArgumentError": (ValueError,),
    "ArgumentTypeError": (TypeError,),
    "UnknownComponentError": (errors.ArgumentError, ValueError, LookupError),
    "SpecError": (errors.ArgumentError, ValueError),
    "PluginError": (RuntimeError,),
    "UnsupportedError": (NotImplementedError, ValueError),
    "BackendUnavailableError": (RuntimeError,),
    "MissingDependencyError": (ImportError,),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_each_error_is_ours_and_the_built_in_one_that_a_caller_expects(name: str) -> None:
    cls = getattr(errors, name)
    assert issubclass(cls, errors.HyperframeError)
    for base in EXPECTED[name]:
        assert issubclass(cls, base)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_an_error_keeps_its_message_also_across_processes(name: str) -> None:
    error = getattr(errors, name)("what, why, remedy")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error) == "what, why, remedy"


def test_every_public_name_is_listed_and_every_listed_name_exists() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.HyperframeError)
    }
    assert defined | {"did_you_mean"} == set(errors.__all__)


@pytest.mark.parametrize(
    "asked,nearest",
    [
        ("sort_lhs", "sort_lsh"),
        ("SortLSH", "sort_lsh"),
        ("sortlsh", "sort_lsh"),
        ("KM", None),
        ("sort-lsh", "sort_lsh"),
        ("Sort LSH", "sort_lsh"),
        ("'union'", "union"),
        ("--", None),
    ],
)
def test_the_nearest_name_is_proposed_only_when_it_is_near(asked: str, nearest: str | None) -> None:
    hint = did_you_mean(asked, ["sort_lsh", "kmeans_like", "union"])
    assert hint == (f" Did you mean {nearest!r}?" if nearest else "")


def test_nothing_is_proposed_where_nothing_exists() -> None:
    assert did_you_mean("sort_lsh", []) == ""
