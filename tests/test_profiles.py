"""The profiles of the property tests: what each is for, and that a misspelt one is refused."""

from __future__ import annotations

import ast
from pathlib import Path

import hypothesis
import pytest

from tests.conftest import PROFILES, chosen_profile

settings = {name: hypothesis.settings.get_profile(name) for name in PROFILES}


def test_there_is_one_to_work_with_one_for_every_change_and_one_for_the_night() -> None:
    assert set(PROFILES) == {"dev", "ci", "nightly"}
    for profile in settings.values():
        assert profile.deadline is None  # shared machines have no steady clock
    # the same examples in every run, whatever an earlier one has found
    assert settings["ci"].derandomize
    assert settings["ci"].database is None
    # random ones, and many: what a night finds is not what the day has tried
    assert not settings["nightly"].derandomize
    assert settings["nightly"].max_examples >= 10 * settings["ci"].max_examples
    assert not settings["dev"].derandomize
    for name in ("ci", "nightly"):
        assert settings[name].print_blob  # a failure is repeated by copying one line
        assert hypothesis.HealthCheck.too_slow in settings[name].suppress_health_check


def test_every_test_follows_the_profile() -> None:
    # a number of its own would be the same at night: max(60, settings.default.max_examples)
    fixed = []
    for path in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("settings"):
                for option in node.keywords:
                    is_number = isinstance(option.value, ast.Constant)
                    if option.arg == "deadline" or (option.arg == "max_examples" and is_number):
                        fixed.append(f"{path.name}:{node.lineno} {ast.unparse(option)}")
    # not a property test: it collects examples of a strategy, and reads a file of questions
    known = ("test_strategies.py", "test_questions.py")
    assert [found for found in fixed if not found.startswith(known)] == []


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({}, "dev"),
        ({"CI": "true"}, "ci"),
        ({"CI": "", "HYPOTHESIS_PROFILE": ""}, "dev"),
        ({"CI": "true", "HYPOTHESIS_PROFILE": "nightly"}, "nightly"),
    ],
)
def test_the_environment_chooses(environ: dict[str, str], expected: str) -> None:
    assert chosen_profile(environ) == expected


def test_a_misspelt_profile_is_refused_with_those_that_exist() -> None:
    with pytest.raises(pytest.UsageError, match=r"nigthly.*choose one of dev, ci, nightly"):
        chosen_profile({"HYPOTHESIS_PROFILE": "nigthly"})
