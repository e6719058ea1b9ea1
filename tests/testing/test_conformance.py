"""The conformance suite itself: wrong components are caught by the check that is meant for them."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperframe import detectors, testing
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.testing import (
    ConformanceError,
    check_detector,
    check_estimator,
    check_sampler,
    parametrize_with_checks,
)
from hyperframe.testing.checks import CHECKS
from hyperframe.testing.checks.runner import component_of, run_check, run_checks
from hyperframe.testing.checks.sampler_statistics import check_estimates
from tests.testing import wrong_detectors, wrong_estimators, wrong_samplers

# torch's own: its compiler makes an instance of the function to trace it
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

WRONG = {**wrong_detectors.CASES, **wrong_samplers.CASES, **wrong_estimators.CASES}
HONEST = [wrong_detectors.Honest(), wrong_samplers.ByNorm(), wrong_estimators.Honest()]


def names(components: Any) -> list[str]:
    return [f"{component.kind} {type(component).__name__}" for component in components]


@pytest.mark.parametrize("component, expected", WRONG.items(), ids=names(WRONG))
def test_a_wrong_component_fails_the_check_meant_for_it_and_no_other(
    component: Any, expected: set[str]
) -> None:
    results = run_checks(component, on_fail="collect")
    failed = {result.name: result.message for result in results if result.is_failure}
    assert set(failed) == expected
    for message in failed.values():
        # what was asked, what was found, what to do; or what broke, and where
        asked = "asked " in message and "found " in message and message.count(";") >= 2
        assert asked or ": raised " in message
        assert message.startswith(repr(component.replace())[:12])


@pytest.mark.parametrize("component", HONEST, ids=names(HONEST))
def test_a_component_that_is_right_passes_all_checks(component: Any) -> None:
    results = run_checks(component)
    assert [result.name for result in results] == list(CHECKS[component.kind])
    assert {result.status for result in results} <= {"passed", "skipped"}
    for result in results:
        assert bool(result.message) == (result.status == "skipped")


def test_every_check_catches_some_wrong_component() -> None:
    caught = {(component.kind, name) for component, found in WRONG.items() for name in found}
    every = {(kind, name) for kind, checks in CHECKS.items() for name in checks}
    # the checks of all kinds are one function each, which detectors fail
    shared = ("is_a_frozen_value", "spec_round_trip", "copies_and_pickles_are_equal")
    assert {name for kind, name in every - caught} <= set(shared)
    assert {name for kind, name in caught if kind == "detector"} >= set(shared)


# ------------------------------------------------------------------------------------ the runner


@pytest.mark.parametrize("given", ["sliding_window", detectors.SlidingWindow,
                                   detectors.SlidingWindow()])  # fmt: skip
def test_a_name_a_class_and_an_instance_are_checked_alike(given: Any) -> None:
    results = check_detector(given, only=["spec_round_trip", "scale_has_its_default"])
    assert [result.name for result in results] == ["spec_round_trip", "scale_has_its_default"]
    assert all(result.component == repr(detectors.SlidingWindow()) for result in results)


def test_failures_are_raised_in_one_report_or_collected() -> None:
    wrong = wrong_detectors.ForgetsAParameter()
    with pytest.raises(ConformanceError) as caught:
        check_detector(wrong, only=["is_a_frozen_value", "spec_round_trip", "budget_is_kept"])
    text = str(caught.value)
    assert "ForgetsAParameter(budget=5, extra=0) does not conform: 2 of 3 checks failed" in text
    assert "  is_a_frozen_value: " in text
    assert "  spec_round_trip: " in text
    assert "budget_is_kept" not in text
    results = check_detector(wrong, only=["is_a_frozen_value"], on_fail="collect")
    assert [result.status for result in results] == ["failed"]
    assert results[0].is_failure
    with pytest.raises(ArgumentError, match="on_fail='ignore' is no choice"):
        check_detector(wrong, on_fail="ignore")


def test_who_sums_otherwise_does_not_inherit_the_claim_of_no_bias() -> None:
    right = wrong_estimators.ATenthTooMuch

    class Same(right):  # type: ignore[misc, valid-type]
        """The row sums of its parent."""

    class Other(right):  # type: ignore[misc, valid-type]
        """Row sums of its own."""

        def row_sums(self, *arguments: Any, **options: Any) -> Any:
            return super().row_sums(*arguments, **options)

    assert (right.is_unbiased, Same.is_unbiased, Other.is_unbiased) == (True, True, False)


def test_one_exception_that_breaks_many_checks_is_reported_once() -> None:
    with pytest.raises(ConformanceError) as caught:
        check_detector(wrong_detectors.RaisesBeforeAnything())
    first, *lines = str(caught.value).splitlines()
    assert int(re.search(r"(\d+) of", first).group(1)) > 10  # type: ignore[union-attr]
    assert len(lines) <= 4
    assert "raised IndexError" in lines[0]
    assert "wrong_detectors.py:" in lines[0]  # not torch's own file
    assert lines[1].startswith("    so do ")
    assert "heads_are_independent" in lines[1]


def test_a_generator_made_from_the_given_one_and_one_of_a_seed_are_welcome() -> None:
    only = ["generator_decides"]
    check_detector(wrong_detectors.SeedsFromTheGenerator(), only=only)
    check_detector(wrong_detectors.HasASeed(), only=only)


def test_an_expected_failure_needs_a_reason_to_exist() -> None:
    wrong = wrong_detectors.ExceedsItsBudget()
    only = ["budget_is_kept", "spec_round_trip"]
    expected = {"budget_is_kept": "rounds up"}
    results = check_detector(wrong, only=only, expected_failed_checks=expected)
    assert {result.name: result.status for result in results} == {
        "spec_round_trip": "passed", "budget_is_kept": "expected"
    }  # fmt: skip
    assert "rounds up" in results[1].message
    # a check that passes after all is a failure
    with pytest.raises(ConformanceError, match=r"spec_round_trip: expected to fail \(no name\)"):
        check_detector(wrong, only=only, expected_failed_checks={"spec_round_trip": "no name"})
    with pytest.raises(ArgumentError, match=r"no check 'budget_is_keppt'.*budget_is_kept"):
        check_detector(wrong, expected_failed_checks={"budget_is_keppt": "typing"})


def test_what_is_no_component_of_the_kind_is_refused() -> None:
    with pytest.raises(ArgumentTypeError, match="is of kind sampler; check it with check_sampler"):
        check_detector(wrong_samplers.ByNorm())
    with pytest.raises(ArgumentTypeError, match="pass a component, its class, or a spec string"):
        check_estimator(3)
    with pytest.raises(ArgumentTypeError, match="does not say of which kind"):
        component_of("uniform")
    assert component_of("uniform", "sampler").kind == "sampler"


def test_a_check_that_breaks_is_a_failure_that_says_where() -> None:
    result = run_check(wrong_detectors.NeedsManyKeys(), "every_length_has_a_mask")
    assert result.status == "failed"
    assert "raised RuntimeError at" in result.message
    assert "wrong_detectors.py" in result.message


def test_a_check_leaves_no_name_in_the_registry() -> None:
    before = detectors.names()
    check_detector(wrong_detectors.Honest(), only=["spec_round_trip"])
    assert detectors.names() == before


def test_checks_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.random.get_rng_state()
    check_sampler("row_norm", only=["generator_decides", "weights_are_true"])
    assert torch.equal(torch.random.get_rng_state(), expected)


# -------------------------------------------------------------------------------- the statistics


@pytest.mark.statistical
def test_true_weights_pass_under_many_seeds_and_slightly_false_ones_fail() -> None:
    # what is tested: 40 seeds of a true sampler, each failing with probability 1e-6 at most, so
    # that this test fails by chance with 4e-5 at most. Its seeds are fixed: it does not flake
    sampler, keys = wrong_samplers.ByNorm(), 12
    p = torch.linspace(1, 3, keys, dtype=torch.float64)
    p /= p.sum()
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        index = torch.multinomial(p, 8000 * 4, replacement=True, generator=g).view(4000, 2, 4)
        weight = -(4 * p[index]).log()
        check_estimates(sampler, index, weight, keys, 1e-6)
        with pytest.raises(AssertionError, match="weights whose inverses sum to"):
            check_estimates(sampler, index, weight + 0.01, keys, 1e-6)
        # two keys whose weights are exchanged: the sum is right, the frequencies are not
        q = p.clone()
        q[0], q[-1] = p[-1], p[0]
        with pytest.raises(AssertionError, match="its weight says"):
            check_estimates(sampler, index, -(4 * q[index]).log(), keys, 1e-6)


@pytest.mark.statistical
def test_weights_that_vary_for_a_key_are_compared_by_their_sums() -> None:
    sampler, keys = wrong_samplers.ByNorm(), 12
    g = torch.Generator().manual_seed(0)
    index = torch.randint(keys, (10_000, 1, 4), generator=g)
    noise = torch.rand(index.shape, generator=g, dtype=torch.float64) + 0.5  # its mean is 1
    weight = (noise * keys / 4).log()
    # false alarm 1e-6 at most, see check_estimates
    check_estimates(sampler, index, weight, keys, 1e-6)
    with pytest.raises(AssertionError, match=r"sums of f\(j\) = 1"):
        check_estimates(sampler, index, weight + 0.2, keys, 1e-6)


# ----------------------------------------------------------------------------------- with pytest

SUITE = """
import pytest
from hyperframe import detectors
from hyperframe.testing import parametrize_with_checks
from tests.testing.wrong_detectors import ExceedsItsBudget

def expected(component):
    if isinstance(component, ExceedsItsBudget):
        return {"budget_is_kept": "rounds up", "spec_round_trip": "never true"}
    return {}

def marks(component, name):
    return pytest.mark.skip(reason="compiled elsewhere") if "graph" in name else None

@parametrize_with_checks(
    ["sliding_window(width=3)", ExceedsItsBudget], kind="detector",
    expected_failed_checks=expected, marks=marks,
)
def test_it_conforms(check):
    check()
"""


@pytest.mark.slow
def test_the_decorator_makes_a_test_of_every_check(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    module = tmp_path / "test_mine.py"
    module.write_text(SUITE)
    some = "spec_round_trip or budget_is_kept or one_graph or finds_what"
    options = [
        "-c",
        "/dev/null",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        "--rootdir",
        str(tmp_path),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", *options, "-k", some, str(module)],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    for outcome, test in (
        ("PASSED", "[sliding_window(width=3)-spec_round_trip]"),
        ("XFAIL", "[exceeds_its_budget-budget_is_kept] - rounds up"),
        ("FAILED", "[exceeds_its_budget-spec_round_trip] - [XPASS(strict)] never true"),
    ):
        wanted = f"test_it_conforms{test}"
        assert any(x.startswith(outcome) and x.endswith(wanted) for x in lines), done.stdout
    assert "row_budget is None: no parameter bounds the keys of a row" in done.stdout
    assert "compiled elsewhere" in done.stdout
    # both claim to find nothing, and are compiled elsewhere; the window has no budget
    assert "1 failed, 1 passed, 5 skipped" in lines[-1]
    assert "1 xfailed" in lines[-1]


def test_the_decorator_refuses_unknown_checks_and_tests_without_an_argument() -> None:
    with pytest.raises(ArgumentError, match="no check 'flies' of a sampler"):
        parametrize_with_checks(["uniform"], kind="sampler", expected_failed_checks={"flies": ""})
    with pytest.raises(ArgumentError, match="it takes no argument"):
        parametrize_with_checks(["uniform"], kind="sampler")(lambda: None)


WITHOUT = """
import sys
sys.modules["pytest"] = None  # as if it were not installed
from hyperframe.errors import MissingDependencyError
from hyperframe.testing import check_detector, parametrize_with_checks
check_detector("sliding_window", only=["spec_round_trip"])
try:
    parametrize_with_checks(["sliding_window"], kind="detector")
except MissingDependencyError as error:
    print(error)
"""


def test_without_pytest_only_the_decorator_is_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True
    )
    assert "install it with: python -m pip install pytest" in done.stdout


def test_the_page_about_conformance_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) >= 4
    module = types.ModuleType("conformance_page")  # what is pickled has to be importable
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks:
        exec(compile(block, "docs/conformance.md", "exec"), module.__dict__)
    # every check has a line in the tables, and no line is of a check that does not exist
    listed = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
    assert listed == {name for checks in CHECKS.values() for name in checks}


def test_the_suite_is_reached_through_the_package() -> None:
    assert {"check_detector", "check_sampler", "check_estimator"} <= set(testing.__all__)
    assert testing.check_estimator is check_estimator
