"""Plug-ins that misbehave: each is one error that names plug-in and distribution, and the rest
works on.

End to end: a distribution with an entry point, asked for by its name in attention.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperframe import HyperAttention, detectors, estimators, samplers
from hyperframe.errors import ArgumentError, ArgumentTypeError, PluginError
from hyperframe.plugins import offered_by
from hyperframe.validation import may_look_at

Install = Callable[..., None]

KINDS = {"detector": detectors, "sampler": samplers, "estimator": estimators}
OWNER = "odd-dist 2.5 (entry point odd = odd_module:Odd)"

SOURCES = {
    "detector": """
from dataclasses import dataclass
import torch
from hyperframe.detectors import AbstractDetector
from hyperframe.masks import ListMask

def columns(query, key, index, is_causal=False, rows=None):
    return ListMask.columns(
        index.expand(*key.shape[:2], -1), num_query_heads=query.shape[1],
        num_queries=query.shape[2] if rows is None else rows, num_keys=key.shape[2],
        is_causal=is_causal)

@dataclass(frozen=True, kw_only=True)
class Odd(AbstractDetector):
    FIELDS
    def find(self, query, key, *, scale=None, is_causal=False, generator=None):
        one = torch.zeros(1, dtype=torch.int64)
        return ANSWER
""",
    "sampler": """
from dataclasses import dataclass, replace
import torch
from hyperframe.samplers import AbstractSampler

@dataclass(frozen=True, kw_only=True)
class Odd(AbstractSampler):
    FIELDS
    def density(self, query, key, value, *, scale=None):
        return DENSITY
    def sample(self, *args, **options):
        sample = super().sample(*args, **options)
        return ANSWER
    def sample_prefixes(self, *args, **options):
        sample = super().sample_prefixes(*args, **options)
        return ANSWER
""",
    "estimator": """
from dataclasses import dataclass
import torch
from hyperframe.estimators import AbstractEstimator
from hyperframe.rowsums import RowSumRule, RowSums

@dataclass(frozen=True, kw_only=True)
class Odd(AbstractEstimator):
    FIELDS
    def row_sums(self, query, key, mask, *, scale=None, num_samples=256, generator=None):
        zeros = torch.zeros(query.shape[:3])
        return ANSWER
    RULE
""",
}
# what a class that is right has there
RIGHT = {
    "FIELDS": "width: int = 3", "DENSITY": "None", "RULE": "",
    "ANSWER": {"detector": "columns(query, key, one, is_causal)", "sampler": "sample",
               "estimator": "RowSums(log_sum=zeros)"},
}  # fmt: skip


def source_of(kind: str, **changes: str) -> str:
    text = SOURCES[kind]
    for word, right in RIGHT.items():
        right_here = right[kind] if isinstance(right, dict) else right
        text = text.replace(word, changes.get(word, right_here))
    return text


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Make a distribution with an entry point, and forget it afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def make(kind: str, source: str, *, name: str = "odd", dist: str = "odd-dist") -> None:
        info = tmp_path / f"{dist.replace('-', '_')}-2.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 2.5\n")
        module = f"{dist.partition('-')[0]}_module"
        (info / "entry_points.txt").write_text(f"[hyperframe.{kind}s]\n{name} = {module}:Odd\n")
        (tmp_path / f"{module}.py").write_text(source)
        KINDS[kind].registry.refresh()

    yield make
    for module in KINDS.values():
        module.registry.refresh()
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(3, 2, 2, 80, 4, generator=torch.Generator().manual_seed(0)).unbind()


def attend(is_causal: bool, **options: Any) -> torch.Tensor:
    attention = HyperAttention(min_seq_len=0, num_samples=16, **options)
    return attention(*inputs(), is_causal=is_causal)


def the_rest_works(is_causal: bool) -> None:
    out = attend(is_causal, detector="strided(num_keys=8)", sampler="row_norm", estimator="exact")
    assert out.isfinite().all()
    for module in KINDS.values():
        assert "union" in module.names() or "uniform" in module.names()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_same_plugins_without_a_fault_work(
    install: Install, kind: str, is_causal: bool
) -> None:
    install(kind, source_of(kind))
    assert attend(is_causal, **{kind: "odd"}).isfinite().all()


# ------------------------------------------------------------------------ what cannot be loaded

STARS = "def __init__(self, *args): pass"
KEYWORDS = "def __init__(self, **kwargs): pass"
UNLOADABLE: dict[str, tuple[Callable[[str], str], str]] = {
    "does not load": (lambda kind: "raise RuntimeError('no luck')", "RuntimeError: no luck"),
    "exits": (lambda kind: "raise SystemExit(3)", "SystemExit: 3"),
    "lacks a package": (lambda kind: "import no_such_package", "No module named 'no_such_package'"),
    "has no such class": (lambda kind: "", "has no attribute 'Odd'"),
    "is no component": (lambda kind: "class Odd: ...", "Odd is no subclass of Abstract"),
    "takes *args": (lambda kind: source_of(kind, FIELDS=STARS), "Odd takes *args"),
    "takes **kwargs": (lambda kind: source_of(kind, FIELDS=KEYWORDS), "Odd takes **kwargs"),
    "takes a name": (
        lambda kind: f"import hyperframe.{kind}s as m\nm.register('{TAKEN[kind]}', m.create('"
        f"{OTHER[kind]}').__class__)",
        "it already belongs to the built-in",
    ),
}  # fmt: skip
TAKEN = {"detector": "strided", "sampler": "uniform", "estimator": "uniform"}
OTHER = {"detector": "quest", "sampler": "row_norm", "estimator": "exact"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", UNLOADABLE)
def test_one_that_cannot_be_loaded_is_an_error_when_asked_for(
    install: Install, kind: str, case: str
) -> None:
    source, reason = UNLOADABLE[case]
    install(kind, source(kind))
    with pytest.raises(PluginError) as caught:
        attend(False, **{kind: "odd"})
    said = str(caught.value)
    assert f"the plug-in 'odd' of the group 'hyperframe.{kind}s' was asked for" in said
    assert OWNER in said
    assert reason in said
    the_rest_works(False)
    (entry,) = [entry for entry in KINDS[kind].registry.entries(load=True) if entry.name == "odd"]
    assert (entry.status, entry.distribution) == ("broken", "odd-dist")


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_of_two_plugins_is_an_error_that_names_both(install: Install, kind: str) -> None:
    install(kind, source_of(kind))
    install(kind, source_of(kind), dist="rival-dist")
    with pytest.raises(PluginError) as caught:
        attend(False, **{kind: "odd"})
    assert OWNER in str(caught.value)
    assert "rival-dist 2.5 (entry point odd = rival_module:Odd)" in str(caught.value)
    the_rest_works(False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_name_of_a_built_in_stays_its_own_and_the_rival_is_listed_and_logged(
    install: Install, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    taken = TAKEN[kind]
    install(kind, source_of(kind), name=taken)
    registry = KINDS[kind].registry
    assert type(registry.create(taken)).__module__.startswith("hyperframe.")
    (entry,) = [e for e in registry.entries() if (e.name, e.origin) == (taken, "plugin")]
    assert (entry.status, entry.distribution) == ("duplicate", "odd-dist")
    assert f"the name is also that of the built-in {kind}" in entry.reason
    the_rest_works(False)
    (record,) = [r for r in caplog.records if r.name == "hyperframe.registry"]
    assert record.levelname == "WARNING"
    assert f"odd-dist 2.5 (entry point {taken} = odd_module:Odd)" in record.getMessage()


# ------------------------------------------------------------------------- what answers wrongly

NAN = "sample.log_weight * torch.nan"
WRONG: dict[str, dict[str, tuple[dict[str, str], type[Exception], str]]] = {
    "detector": {
        "no mask": ({"ANSWER": "None"}, ArgumentTypeError, "expected a HeavyMask, got NoneType"),
        "a tensor": ({"ANSWER": "query > 0"}, ArgumentTypeError, "got Tensor"),
        "another shape": (
            {"ANSWER": "columns(query, key, one, is_causal, rows=7)"}, ArgumentError,
            "returned a mask with num_queries=7, but it was asked with num_queries=80",
        ),
        "another causality": (
            {"ANSWER": "columns(query, key, one, not is_causal)"}, ArgumentError, "with is_causal=",
        ),
        "an index too large": (
            {"ANSWER": "columns(query, key, one + 80, is_causal)"}, ArgumentError,
            "key_index holds 80, outside 0..79",
        ),
        "a negative index": (
            {"ANSWER": "columns(query, key, one - 5, is_causal)"}, ArgumentError, "-5",
        ),
        "a mask that cannot be made": (
            {"ANSWER": "columns(query, key, one.float(), is_causal)"}, ArgumentTypeError, "float32",
        ),
    },
    "sampler": {
        "no sample": ({"ANSWER": "None"}, ArgumentTypeError, "type NoneType; return a KeySample"),
        "a pair": (
            {"ANSWER": "(sample.index, sample.log_weight)"}, ArgumentTypeError, "of type tuple",
        ),
        "no tensor": (
            {"ANSWER": "replace(sample, log_weight=0.0)"}, ArgumentTypeError,
            "a KeySample whose log_weight has type float",
        ),
        "a float index": (
            {"ANSWER": "replace(sample, index=sample.index.float())"}, ArgumentTypeError,
            "an index of torch.float32",
        ),
        "one head for all": (
            {"ANSWER": "replace(sample, index=sample.index[:, :1])"}, ArgumentError,
            "draw for every key head",
        ),
        "fewer samples": (
            {"ANSWER": "replace(sample, index=sample.index[..., 1:], "
                       "log_weight=sample.log_weight[..., 1:])"},
            ArgumentError, "15)",
        ),
        "an index too large": (
            {"ANSWER": "replace(sample, index=sample.index + 80)"}, ArgumentError,
            "drew a key outside 0..79",
        ),
        "a negative index": (
            {"ANSWER": "replace(sample, index=-1 - sample.index)"}, ArgumentError,
            "drew a key outside 0..79",
        ),
        "weights of NaN": (
            {"ANSWER": f"replace(sample, log_weight={NAN})"}, ArgumentError,
            "draws a log_weight that is NaN or inf",
        ),
        "infinite weights": (
            {"ANSWER": "replace(sample, log_weight=sample.log_weight + torch.inf)"}, ArgumentError,
            "draws a log_weight that is NaN or inf",
        ),
        "no density": ({"DENSITY": "'even'"}, ArgumentTypeError, "its density is a str"),
        "a density of another shape": (
            {"DENSITY": "torch.ones(3)"}, ArgumentError, "its density has shape (3,)",
        ),
        "an integer density": (
            {"DENSITY": "torch.ones(key.shape[:3]).long()"}, ArgumentError, "dtype torch.int64",
        ),
        "a density of NaN": (
            {"DENSITY": "torch.full(key.shape[:3], torch.nan)"}, ArgumentError,
            "its density is negative or not finite",
        ),
    },
    "estimator": {
        "no sums": ({"ANSWER": "None"}, ArgumentTypeError, "NoneType from row_sums; return a RowS"),
        "a tensor": ({"ANSWER": "zeros"}, ArgumentTypeError, "of type Tensor from row_sums"),
        "no tensor": (
            {"ANSWER": "RowSums(log_sum=0.0)"}, ArgumentTypeError, "returned log_sum as a float",
        ),
        "integers": (
            {"ANSWER": "RowSums(log_sum=zeros.long())"}, ArgumentTypeError, "as torch.int64",
        ),
        "another shape": (
            {"ANSWER": "RowSums(log_sum=zeros[..., :-1])"}, ArgumentError,
            "[batch, query_heads, n_q] = (2, 2, 80)",
        ),
        "sums of NaN": (
            {"ANSWER": "RowSums(log_sum=zeros * torch.nan)"}, ArgumentError,
            "log_sum with 320 of 320 rows NaN or inf",
        ),
        "infinite sums": (
            {"ANSWER": "RowSums(log_sum=zeros + torch.inf)"}, ArgumentError, "rows NaN or inf",
        ),
        "no rule": (
            {"RULE": "def rule(self, *args, **options): return 3"}, ArgumentTypeError,
            "type int from rule; return a RowSumRule",
        ),
        "a cap of NaN": (
            {"RULE": "def rule(self, query, *args, **options): return RowSumRule(log_cap="
                     "query[..., 0] * torch.nan)"},
            ArgumentError, "returned log_cap with 320 of 320 rows NaN",
        ),
    },
}  # fmt: skip
CASES = [(kind, case) for kind, cases in WRONG.items() for case in cases]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind, case", CASES)
def test_one_that_answers_wrongly_is_an_error_with_its_distribution(
    install: Install, kind: str, case: str, is_causal: bool
) -> None:
    changes, error, reason = WRONG[kind][case]
    install(kind, source_of(kind, **changes))
    with pytest.raises(error) as caught:
        attend(is_causal, **{kind: "odd"})
    said = str(caught.value)
    assert f"the {kind} odd of {OWNER}" in said
    assert reason in said
    assert said.count("odd-dist") == 1
    the_rest_works(is_causal)


@pytest.mark.parametrize("kind", KINDS)
def test_the_recursion_and_the_strict_form_refuse_it_too(install: Install, kind: str) -> None:
    install(kind, source_of(kind, ANSWER="None", FIELDS="is_row_local = True"))
    attention = HyperAttention(
        causal="recursive", strict_causal=True, min_seq_len=16, num_samples=8,
        **{"detector": "strided", "sampler": "uniform", kind: "odd"},
    )  # fmt: skip
    with pytest.raises(ArgumentTypeError) as caught:
        attention(*inputs(), is_causal=True)
    assert f"the {kind} odd of {OWNER} returned" in str(caught.value)


@pytest.mark.parametrize(
    "result, said", [("3", "type int from draws"), ("lambda prefixes: 3", "type int; return a Key")]
)
def test_a_sampler_whose_draws_are_no_samples_is_an_error(
    install: Install, result: str, said: str
) -> None:
    own = f"    def draws(self, *args, **options):\n        return {result}\n"
    install("sampler", source_of("sampler") + own)
    with pytest.raises(ArgumentTypeError) as caught:
        attend(False, sampler="odd")
    assert f"the sampler odd of {OWNER} returned a value of {said}" in str(caught.value)


NAN_SCORES = """
from hyperframe.detectors.simple import from_scores

@from_scores
def Odd(tiles, keys, *, scale):
    means = tiles.mean(dim=3) @ keys.mean(dim=3).transpose(-1, -2)
    return (means - means) / (means - means)
"""


def test_scores_that_are_nan_are_refused_unless_the_inputs_are(install: Install) -> None:
    install("detector", NAN_SCORES, name="odd")
    with pytest.raises(ArgumentError) as caught:
        attend(False, detector="odd(num_keys=16)")
    assert f"of {OWNER}: " in str(caught.value)
    assert "scores are NaN, for queries and keys that are finite" in str(caught.value)
    attention = HyperAttention(detector="odd(num_keys=16)", min_seq_len=0, num_samples=8)
    assert attention(*(x * torch.nan for x in inputs())).isnan().all()
    the_rest_works(False)


def test_a_union_names_the_part_that_is_wrong(install: Install) -> None:
    install("detector", source_of("detector", ANSWER="columns(query, key, one + 80, is_causal)"))
    with pytest.raises(ArgumentError) as caught:
        attend(True, detector="sliding_window(width=4) | odd")
    assert f"the detector odd of {OWNER}: mask: key_index holds 80" in str(caught.value)


def test_nan_from_nan_is_no_fault_of_the_estimator(install: Install) -> None:
    answer = "RowSums(log_sum=(query.sum(dim=-1)))"
    install("estimator", source_of("estimator", ANSWER=answer))
    q, k, v = inputs()
    attention = HyperAttention(estimator="odd", detector="strided", min_seq_len=0, num_samples=8)
    assert attention(q, k, v).isfinite().all()
    assert attention(q.index_fill(2, torch.tensor(3), torch.nan), k, v).isnan().any()


def test_a_class_that_was_imported_past_the_registry_is_named_as_well(install: Install) -> None:
    install("sampler", source_of("sampler", ANSWER="None"))
    cls = __import__("odd_module").Odd
    assert offered_by(cls) == f" of {OWNER}"
    with pytest.raises(ArgumentTypeError, match=r"the sampler odd of odd-dist 2\.5"):
        attend(False, sampler=cls())
    assert offered_by(samplers.Uniform) == ""


def test_values_are_looked_at_on_the_cpu_and_elsewhere_while_debugging(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for value, expected in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("HYPERFRAME_DEBUG", value)
        assert may_look_at(torch.device("cuda")) is expected
        assert may_look_at(torch.device("cpu"))
        assert may_look_at(torch.zeros(1))
