"""`hyperframe components` lists everything, and each broken plug-in with its reason and owner."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperframe import detectors, estimators, samplers
from hyperframe.cli import main
from hyperframe.cli.components import KINDS, component_rows
from hyperframe.errors import ArgumentTypeError
from hyperframe_attention.__main__ import main as program

Install = Callable[[str, str, str, str], None]

GOOD = """
from hyperframe.detectors.simple import from_index

@from_index
def firsts(key, *, count, step: int = 2):
    '''Every few keys.

    The rest is not part of the summary.
    '''
    import torch
    index = torch.arange(0, key.shape[2], step)[:count]
    return index.expand(*key.shape[:2], -1)
"""
CLASS = """
from dataclasses import dataclass
from hyperframe.detectors import AbstractDetector

@dataclass(frozen=True, kw_only=True)
class Odd(AbstractDetector):
    {fields}
    def find(self, query, key, *, scale=None, is_causal=False, generator=None):
        return {result}
"""
ARGS = "def __init__(self, *args): pass"
KWARGS = "def __init__(self, **kwargs): pass"
REQUIRED = "width: int"
FAILING = "width: int = 3\n    def __post_init__(self): raise ValueError('no luck today')"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Make a distribution with an entry point, and forget it afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def make(distribution: str, name: str, target: str, source: str) -> None:
        info = tmp_path / f"{distribution.replace('-', '_')}-2.5.dist-info"
        info.mkdir()
        about = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.5\n"
        (info / "METADATA").write_text(about)
        (info / "entry_points.txt").write_text(f"[hyperframe.detectors]\n{name} = {target}\n")
        (tmp_path / f"{target.partition(':')[0]}.py").write_text(source)
        detectors.registry.refresh()

    yield make
    detectors.registry.refresh()
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["components", "--json", *arguments]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert isinstance(rows, list)
    return rows


def test_every_built_in_component_is_listed_with_what_it_declares(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = listed(capsys)
    for module, kind in ((detectors, "detector"), (samplers, "sampler"), (estimators, "estimator")):
        found = {row["name"]: row for row in rows if row["kind"] == kind}
        assert set(module._BUILTINS) <= set(found)
        for name in module._BUILTINS:
            row, cls = found[name], module.registry.get(name)
            assert (row["origin"], row["status"]) == ("builtin", "ok")
            assert row["distribution"] == "hyperframe-attention"
            assert row["summary"]
            made = module.create(row["default_spec"])
            assert made == cls()
            assert list(row["parameters"]) == list(cls.parameters())
            assert row["capabilities"]["takes_stream"] == cls.takes_stream
    by_name = {row["name"]: row["capabilities"] for row in rows if row["kind"] == "detector"}
    assert by_name["sort_lsh"]["strict"]
    assert by_name["sort_lsh"]["levels"]
    assert not by_name["count_sketch"]["strict"]
    assert by_name["strided"]["is_row_local"]
    assert by_name["strided"]["strict"]
    assert by_name["auto"]["residual"] == "auto"
    by_name = {row["name"]: row["capabilities"] for row in rows if row["kind"] == "sampler"}
    assert by_name["importance"]["uses_queries"]
    assert not by_name["centroid"]["draws_keys"]
    (kde,) = [r for r in rows if (r["kind"], r["name"]) == ("estimator", "kde")]
    assert kde["capabilities"]["columns"] == "kde"


def test_kinds_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    rows = listed(capsys, "--kind", "sampler", "--kind", "estimator")
    assert {row["kind"] for row in rows} == {"sampler", "estimator"}
    assert program(["components", "--kind", "samplers"]) == 1
    assert "Did you mean 'sampler'?" in capsys.readouterr().err


def test_a_plugin_is_listed_with_its_distribution_and_default_spec(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("good-dist", "firsts", "good_module:firsts", GOOD)
    (row,) = [row for row in listed(capsys) if row["name"] == "firsts"]
    assert (row["origin"], row["status"]) == ("plugin", "ok")
    assert (row["distribution"], row["version"]) == ("good-dist", "2.5")
    assert row["summary"] == "Every few keys."
    assert row["default_spec"] == "firsts(num_keys=256, tile_size=64, step=2)"
    assert program(["components"]) == 0
    printed = capsys.readouterr().out
    block = ["  firsts  (good-dist 2.5)", "      Every few keys.", f"      {row['default_spec']}"]
    assert "\n".join(block) in printed
    assert "not usable" not in printed
    assert "The rest" not in printed


BROKEN = {
    "does not load": ("x", "raise RuntimeError('no luck')", "RuntimeError: no luck"),
    "is no class": ("Odd", "def Odd(): ...", "is no class but has type function"),
    "is no detector": ("Odd", "class Odd: ...", "Odd is no subclass of AbstractDetector"),
    "takes *args": ("Odd", CLASS.format(fields=ARGS, result=0), "Odd takes *args, so that a missp"),
    "takes **kwargs": ("Odd", CLASS.format(fields=KWARGS, result=0), "Odd takes **kwargs"),
    "refuses its defaults": ("Odd", CLASS.format(fields=FAILING, result=0), "no luck today"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_one_line_with_its_owner_and_the_rest_is_listed(
    install: Install, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    attribute, source, reason = BROKEN[case]
    install("bad-dist", "odd", f"odd_module:{attribute}", source)
    install("good-dist", "firsts", "good_module:firsts", GOOD)
    rows = {row["name"]: row for row in listed(capsys, "--kind", "detector")}
    assert rows["odd"]["status"] == "broken"
    assert reason in rows["odd"]["reason"]
    assert rows["odd"]["distribution"] == "bad-dist"
    assert [name for name, row in rows.items() if row["status"] != "ok"] == ["odd"]
    assert main(["components"]) == 0
    printed = capsys.readouterr().out
    assert "not usable: 1" in printed
    assert f"  detector odd = odd_module:{attribute}, from bad-dist 2.5\n      broken: " in printed
    assert printed.count(reason) == 1
    assert "  firsts  (good-dist 2.5)" in printed


def test_a_plugin_with_a_taken_name_is_a_duplicate_that_names_the_owner(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("rival-dist", "quest", "good_module:firsts", GOOD)
    rows = [row for row in listed(capsys) if row["name"] == "quest"]
    assert [(row["origin"], row["status"]) for row in rows] == [
        ("builtin", "ok"), ("plugin", "duplicate"),
    ]  # fmt: skip
    assert rows[1]["distribution"] == "rival-dist"
    assert "built-in detector .detectors.quest:Quest" in rows[1]["reason"]


def test_parameters_without_a_default_leave_no_default_spec(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("odd-dist", "odd", "odd_module:Odd", CLASS.format(fields=REQUIRED, result=0))
    (row,) = [row for row in component_rows(KINDS["detector"]) if row["name"] == "odd"]
    assert (row["status"], row["default_spec"]) == ("ok", None)
    assert row["parameters"] == {"width": None}
    assert main(["components"]) == 0
    assert "      odd(width)\n" in capsys.readouterr().out


@pytest.mark.parametrize("result", ["None", "query @ key.mT > 0", "[1]"])
def test_a_plugin_that_returns_no_mask_is_refused_with_its_distribution(
    install: Install, result: str
) -> None:
    source = CLASS.format(fields="width: int = 3", result=result)
    install("odd-dist", "odd", "odd_module:Odd", source)
    q = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ArgumentTypeError) as caught:
        detectors.create("odd").find(q, q)
    owner = "the detector odd of odd-dist 2.5 (entry point odd = odd_module:Odd) returned its mask"
    assert owner in str(caught.value)
    assert "expected a HeavyMask" in str(caught.value)
    assert detectors.create("strided").find(q, q).nnz().item() == 16
