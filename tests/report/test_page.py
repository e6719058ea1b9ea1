"""A report is files that need no others: pictures, rows and a page, whatever went wrong."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hyperframe import report as library
from hyperframe.detectors import create
from hyperframe.errors import ArgumentError, HyperframeError
from hyperframe.integrations.capture import CapturedHeads, save
from hyperframe.report.masks import draw
from hyperframe.report.page import Picture, page
from hyperframe.report.recursion import leaf_of

LENGTH = 64
OPTIONS: dict[str, Any] = {
    "specs": ["sliding_window(width=8, num_sinks=2) | heavy_columns(num_columns=8)", "fast"],
    "sample_grid": [0, 8], "budgets": [8, 16], "num_samples": 8, "skip_first": 4, "cells": 16,
}  # fmt: skip


def captured(num_queries: int = LENGTH) -> dict[int, CapturedHeads]:
    q, k, v = torch.randn(3, 1, 2, LENGTH, 8, generator=torch.Generator().manual_seed(0))
    return {
        3: CapturedHeads(
            layer_idx=3, query=q[:, :, -num_queries:], key=k, value=v, scale=0.4, is_causal=True
        )
    }


def pictures_of(text: str) -> list[bytes]:
    found = re.findall(r'src="data:image/[a-z+]+;base64,([^"]+)"', text)
    return [base64.b64decode(data) for data in found]


@pytest.mark.parametrize("form, head", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_files_and_a_page_that_needs_none_of_them(tmp_path: Path, form: str, head: bytes) -> None:
    path = tmp_path / "my heads <1>.safetensors"
    about = {"model": "a/<b>", "model_class": "SomeModel", "heads": [4, 7], "input": "x.txt"}
    save(path, captured(), about=about)
    said: list[tuple[int, int, str]] = []
    made = library.report(
        path, out=tmp_path / "deep" / "out", form=form, progress=lambda *x: said.append(x),
        **OPTIONS,
    )  # fmt: skip
    names = [file.name for file in made.files]
    pictures = [f"{name}.{form}" for name in library.FIGURES]
    assert names == ["index.html", *pictures, "rows.jsonl"]
    assert all(file.stat().st_size > 0 for file in made.files)
    text = made.page.read_text()
    inline = pictures_of(text)
    assert inline == [(made.page.parent / name).read_bytes() for name in pictures]
    assert all(picture.startswith(head) and len(picture) > 2000 for picture in inline)
    # nothing is fetched, and nothing from outside is markup
    rest = re.sub(r'"data:image/[^"]*"', '""', text)
    for word in ("http", "//", "<script", "<link", "url(", "@import", "<b>4", "<1>", "a/<b>"):
        assert word not in rest
    assert 'name="viewport"' in rest
    assert "a/&lt;b&gt;" in rest
    rows = [json.loads(line) for line in (made.page.parent / "rows.jsonl").read_text().splitlines()]
    assert rows == made.rows
    assert {row["head"] for row in rows if row["statistic"] == "head"} == {4, 7}
    # one step after the other, and the number of steps is known from the beginning
    assert [done for done, _, _ in said] == list(range(len(said)))
    assert {total for _, total, _ in said} == {len(said) - 1}
    assert said[-1][2] == ""
    # the preset has no budget: said in a row and on the page
    (failed,) = (row for row in rows if row["failure"] is not None)
    assert (failed["figure"], failed["spec"]) == ("budgets", "fast")
    assert failed["failure"] in rest


def test_the_same_report_twice_is_the_same_bytes(tmp_path: Path) -> None:
    options = OPTIONS | {"figures": ["samples", "alpha"]}
    first, second = (
        library.report(captured(), out=tmp_path / name, form="svg", **options) for name in "ab"
    )
    for one, other in zip(first.files, second.files, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_what_cannot_be_measured_is_a_row_and_the_rest_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no <luck>\nat all")

    monkeypatch.setattr(type(create("quest")), "find", fail)
    options = OPTIONS | {"specs": ["quest", "strided"], "figures": ["heads", "masks"]}
    made = library.report(captured(), out=tmp_path, **options)
    failed = {(row["figure"], row["spec"], row["failure"]) for row in made.rows if row["failure"]}
    assert failed == {(name, "quest", "RuntimeError: no <luck>") for name in ("heads", "masks")}
    assert "no &lt;luck&gt;" in made.page.read_text()
    assert {row["spec"] for row in made.rows if row["quantity"] == "mass"} == {"strided"}
    assert (tmp_path / "masks.png").exists()


def test_an_interrupted_report_shows_what_was_measured(tmp_path: Path) -> None:
    settings = library.ReportSettings(**OPTIONS)
    source = library.source_of(captured(), settings)
    rows = []
    for row in library.measure(source):
        rows.append(row)
        if row["figure"] == "samples":
            break
    made = library.write(source, rows, out=tmp_path, is_whole=False)
    assert "Interrupted" in made.page.read_text()
    assert [file.name for file in made.files if file.suffix == ".png"] == [
        "masks.png", "samples.png"
    ]  # fmt: skip
    assert any(row["statistic"] == "median" for row in made.rows)
    # and nothing at all is a page, too
    empty = library.write(source, [], out=tmp_path / "empty", is_whole=False)
    assert [file.name for file in empty.files] == ["index.html", "rows.jsonl"]


@pytest.mark.parametrize(
    "density, shown", [(1.0, "100"), (0.996, "100"), (0.5, "50"), (0.0123, "1.2")]
)
def test_pictures_of_masks_say_what_is_held_of_how_many_entries(density: float, shown: str) -> None:
    options = OPTIONS | {"figures": ["masks"], "specs": ["heavy_columns(num_columns=64)"]}
    rows = list(library.measure(library.source_of(captured(), library.ReportSettings(**options))))
    for row in rows:
        if row["quantity"] == "density":
            assert row["value"] == 1.0
            row["value"] = density
    attention, held = draw(rows, options["specs"]).axes
    assert "attention, n = 64" in attention.get_title()
    assert held.get_title().endswith(f"mass 1.000 in {shown}% of the entries")


def test_fewer_queries_than_keys_have_one_alpha(tmp_path: Path) -> None:
    made = library.report(captured(num_queries=10), out=tmp_path, **OPTIONS)
    assert {row["n"] for row in made.rows if row["figure"] == "alpha"} == {LENGTH}
    assert [row["failure"] for row in made.rows if row["failure"]] == [
        row["failure"] for row in made.rows if row["figure"] == "budgets" and row["spec"] == "fast"
    ][:1]


def test_a_folder_is_named_without_where_it_lies(tmp_path: Path) -> None:
    for model, shown in (("/home/me/my-llama", "my-llama"), ("someone/a-model", "someone/a-model")):
        path = tmp_path / "heads.safetensors"
        save(path, captured(), about={"model": model, "model_class": "SomeModel"})
        made = library.report(path, out=tmp_path, **OPTIONS | {"figures": ["samples"]})
        assert f"model <b>{shown}</b>" in made.page.read_text()


@pytest.mark.parametrize(
    "length, samples, leaf", [(4096, 64, 512), (2048, 256, 512), (300, 256, 150), (1, 0, 1)]
)
def test_leaves_are_an_eighth_or_twice_the_samples(length: int, samples: int, leaf: int) -> None:
    settings = library.ReportSettings(num_samples=samples)
    source = SimpleNamespace(settings=settings, problem=SimpleNamespace(length=length))
    assert leaf_of(source) == leaf  # type: ignore[arg-type]
    source.settings = library.ReportSettings(leaf=7)
    assert leaf_of(source) == 7  # type: ignore[arg-type]


def test_rectangles_have_a_table_below_their_figure_and_heads_without_a_mask_none(
    tmp_path: Path,
) -> None:
    options = OPTIONS | {"figures": ["recursion", "samples"], "specs": ["quest"], "leaf": 20}
    text = library.report(captured(), out=tmp_path / "a", **options).page.read_text()
    _, _, section = text.partition('<h2 id="recursion">')
    header = re.findall(r"<th>(.*?)</th>", section)
    assert header[:4] == ["detector", "keys", "calls", "error"]
    lines = [re.findall(r"<td>(.*?)</td>", line) for line in section.split("<tr>")[2:]]
    assert [line[:3] for line in lines] == [
        ["<code>quest</code>", "32", "1"],
        ["<code>quest</code>", "16", "2"],
    ]
    assert all(len(line) == len(header) for line in lines)
    free = {
        layer: dataclasses.replace(heads, is_causal=False) for layer, heads in captured().items()
    }
    made = library.report(free, out=tmp_path / "b", **options)
    assert 'id="recursion"' not in made.page.read_text()
    assert {row["figure"] for row in made.rows} == {"samples"}


def test_the_table_names_the_worst_head() -> None:
    common = {"figure": "heads", "spec": "a", "quantity": "error", "failure": None}
    rows = [
        dict.fromkeys(library.ROW_KEYS) | common | fields
        for fields in (
            {"statistic": "head", "layer": 1, "head": 0, "value": 0.25},
            {"statistic": "head", "layer": 7, "head": 5, "value": 0.75},
            {"statistic": "median", "value": 0.5},
            {"statistic": "median", "quantity": "mass", "value": 0.875},
            {"statistic": "mean", "quantity": "keys", "value": 1234.4},
        )
    ]
    picture = Picture(name="heads", form="png", content=b"x", caption="<caption>")
    text = page(rows, [picture], title="t", facts={"n": 1}, specs=["a", "absent"])
    cells = re.findall(r"<td>(.*?)</td>", text)
    assert cells == ["<code>a</code>", "0.5", "0.75 (7.5)", "0.875", "1,234"]
    assert "&lt;caption&gt;" in text


@pytest.mark.parametrize(
    "options, said",
    [
        ({"specs": ["sort_lhs"]}, "Did you mean 'sort_lsh'"),
        ({"specs": []}, "name one at least"),
        ({"specs": ["quest", "quest"]}, "each once"),
        ({"figures": ["mask"]}, "figure='mask'"),
        ({"budgets": [0]}, "budget=0"),
        ({"sample_grid": [-1]}, "samples=-1"),
        ({"lengths": [65]}, "ask for 5 to 64"),
        ({"lengths": [4]}, "ask for 5 to 64"),
        ({"skip_first": 64}, "one has to be left"),
        ({"head": (0, 1)}, r"holds the layers \[3\]"),
        ({"head": (3, 2)}, r"the heads \[0, 1\]"),
        ({"cells": 0}, "cells=0"),
        ({"leaf": 0}, "leaf=0"),
        ({"form": "pdf"}, "form='pdf'"),
        ({"backend": "numba"}, "numba"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(HyperframeError, match=said):
        library.report(captured(), out=tmp_path / "out", **(OPTIONS | options))
    assert not (tmp_path / "out").exists()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("no heads")
    with pytest.raises(ArgumentError, match="no safetensors file"):
        library.report(tmp_path / "other", out=tmp_path / "out")
