"""Every number in the rows of a report is what dense float64 matrices say."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from hyperframe.attention import HyperAttention
from hyperframe.diagnostics import recursion_report
from hyperframe.diagnostics.scores import Scores, exponentials
from hyperframe.integrations.capture import CapturedHeads
from hyperframe.randomness import Stream
from hyperframe.rectangles import leaf_size
from hyperframe.report import ROW_KEYS, ReportSettings, measure, source_of
from hyperframe.report.masks import cell_means
from hyperframe.report.recursion import table
from hyperframe.report.rows import make_row, over_heads
from hyperframe.testing import dense_attention
from tests.diagnostics import dense

LENGTH, SCALE, SKIPPED = 90, 0.5, 7
SPECS = ("sort_lsh(block_size=16)", "heavy_columns(num_columns=20)")
OPTIONS: dict[str, Any] = {
    "specs": SPECS, "sample_grid": (0, 12), "budgets": (8, 30), "num_samples": 12,
    "skip_first": SKIPPED, "lengths": (40, LENGTH), "cells": 10, "head": (5, 3), "seed": 3,
}  # fmt: skip


def captured(*, is_causal: bool) -> dict[int, CapturedHeads]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for layer in (2, 5):
        query = torch.randn(2, 4, LENGTH, 8, generator=generator, dtype=torch.float64)
        key, value = torch.randn(2, 2, 2, LENGTH, 8, generator=generator, dtype=torch.float64)
        key[:, :, 0] *= 3  # something that most rows see
        found[layer] = CapturedHeads(
            layer_idx=layer, query=query, key=key, value=value, scale=SCALE, is_causal=is_causal
        )
    return found


@pytest.fixture(scope="module", params=[True, False], ids=["causal", "no mask"])
def made(request: pytest.FixtureRequest) -> tuple[dict[int, CapturedHeads], list[dict[str, Any]]]:
    heads = captured(is_causal=request.param)
    return heads, list(measure(source_of(heads, ReportSettings(**OPTIONS))))


def of_heads(rows: list[dict[str, Any]], **fields: Any) -> list[float]:
    return [
        row["value"]
        for row in rows
        if row["statistic"] == "head" and all(row[name] == x for name, x in fields.items())
    ]


def attention(spec: str, **changes: Any) -> HyperAttention:
    return HyperAttention(detector=spec, min_seq_len=0, seed=3, **{"num_samples": 12, **changes})


def error_of(layer: CapturedHeads, attend: HyperAttention) -> list[float]:
    options: dict[str, Any] = {"scale": layer.scale, "is_causal": layer.is_causal}
    exact = dense_attention(layer.query, layer.key, layer.value, **options).out
    out = attend(layer.query, layer.key, layer.value, **options)
    error = (out - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)
    return error.mean(dim=0).tolist()


def test_rows_have_all_keys_and_nothing_failed(made: Any) -> None:
    heads, rows = made
    assert all(list(row) == list(ROW_KEYS) for row in rows)
    assert [row for row in rows if row["failure"] is not None] == []
    every = {"masks", "alpha", "samples", "budgets", "heads"}
    if heads[2].is_causal:  # others have no recursion
        every.add("recursion")
    assert {row["figure"] for row in rows} == every


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("layer", [2, 5])
def test_errors_are_those_of_the_attention_against_dense(made: Any, layer: int, spec: str) -> None:
    heads, rows = made
    for num_samples in (0, 12):
        expected = error_of(heads[layer], attention(spec, num_samples=num_samples))
        where = {"figure": "samples", "spec": spec, "layer": layer, "num_samples": num_samples}
        assert of_heads(rows, **where) == pytest.approx(expected, rel=1e-6)
    expected = error_of(heads[layer], attention(spec))
    found = of_heads(rows, figure="heads", quantity="error", spec=spec, layer=layer)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("layer", [2, 5])
def test_a_budget_is_the_parameter_of_the_detector(made: Any, layer: int) -> None:
    heads, rows = made
    for spec, name in zip(SPECS, ("block_size", "num_columns"), strict=True):
        for budget in (8, 30):
            detector = attention(spec).detector.replace(**{name: budget})
            expected = error_of(heads[layer], attention(spec).replace(detector=detector))
            found = of_heads(rows, figure="budgets", spec=spec, layer=layer, budget=budget)
            assert found == pytest.approx(expected, rel=1e-6)


def mask_of(layer: CapturedHeads, spec: str) -> torch.Tensor:
    return (
        attention(spec)
        .detector.find(
            layer.query, layer.key, scale=SCALE, is_causal=layer.is_causal, generator=Stream(3)
        )
        .to_dense()
    )


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("layer", [2, 5])
def test_mass_and_keys_are_those_of_the_dense_mask(made: Any, layer: int, spec: str) -> None:
    heads, rows = made
    of_layer = heads[layer]
    mask = mask_of(of_layer, spec)
    softmax = dense.softmax(of_layer.query, of_layer.key, scale=SCALE, is_causal=of_layer.is_causal)
    expected = (softmax * mask).sum(dim=-1).mean(dim=(0, 2)).tolist()
    found = of_heads(rows, figure="heads", quantity="mass", spec=spec, layer=layer)
    assert found == pytest.approx(expected, rel=1e-5)
    (keys,) = (
        row["value"]
        for row in rows
        if (row["quantity"], row["statistic"]) == ("keys", "layer")
        and (row["spec"], row["layer"]) == (spec, layer)
    )
    assert keys == pytest.approx(float(mask.sum(dim=-1).double().mean()))


def test_rectangles_are_means_over_those_of_one_size() -> None:
    options = OPTIONS | {"figures": ["recursion"], "leaf": 12, "num_samples": 4}
    heads = captured(is_causal=True)
    source = source_of(heads, ReportSettings(**options))
    rows = list(measure(source))
    for spec in SPECS:
        chosen = attention(spec, num_samples=4, causal="recursive").replace(min_seq_len=12)
        report = recursion_report(chosen, heads[5].query, heads[5].key, heads[5].value, scale=SCALE)
        assert leaf_size(LENGTH, 12) == 12
        for size in (12, 24, 48):
            some = [x for x in report.rectangles if x.places[3] - x.places[2] == size]
            expected = {
                name: torch.stack(values).double().mean(dim=(0, 1)).tolist()
                for name, values in {
                    "error": [x.error for x in some], "mass": [x.mass for x in some],
                    "weight": [x.weight for x in some],
                    "alpha / n": [x.alpha / size for x in some],
                    "log10 kappa": [x.kappa.log10() for x in some],
                    "log10 kappa, centred": [x.centred_kappa.log10() for x in some],
                }.items()
            }  # fmt: skip
            where = {"spec": spec, "layer": 5, "n": size}
            for name, values in expected.items():
                assert of_heads(rows, quantity=name, **where) == pytest.approx(values)
            (calls,) = (
                row["value"]
                for row in rows
                if row["quantity"] == "calls" and all(row[k] == x for k, x in where.items())
            )
            assert calls == len(some) == {12: 4, 24: 2, 48: 1}[size]
    found = table(rows, SPECS)
    assert found is not None
    assert [line[:3] for line in found.lines] == [
        [spec, size, calls]
        for spec in SPECS
        for size, calls in (("48", "1"), ("24", "2"), ("12", "4"))
    ]
    (median,) = (
        row["value"]
        for row in rows
        if (row["quantity"], row["statistic"], row["spec"], row["n"])
        == ("mass", "median", SPECS[0], 48)
    )
    numbers = torch.tensor(of_heads(rows, quantity="mass", spec=SPECS[0], n=48))
    assert median == pytest.approx(float(numbers.quantile(0.5)))
    assert found.lines[0][found.head.index("mass")] == f"{median:.3f}"


@pytest.mark.parametrize("layer", [2, 5])
def test_alpha_is_that_of_the_prefix(made: Any, layer: int) -> None:
    heads, rows = made
    for length in (40, LENGTH):
        query, key = (x[:, :, :length] for x in (heads[layer].query, heads[layer].key))
        for skipped in (0, SKIPPED):
            expected = dense.alpha(
                query, key, skip_first=skipped, scale=SCALE, is_causal=heads[layer].is_causal
            )
            expected = (expected / length).mean(dim=0).tolist()
            where = {"layer": layer, "n": length, "skip_first": skipped}
            assert of_heads(rows, figure="alpha", **where) == pytest.approx(expected)
    found = of_heads(rows, figure="heads", quantity="alpha / n", layer=layer)
    assert found == pytest.approx(expected)  # of the last length, without the first columns


def test_alpha_over_n_of_causal_prefixes_never_falls() -> None:
    options = OPTIONS | {"figures": ["alpha"], "lengths": (8, 13, 40, 41, LENGTH)}
    heads = captured(is_causal=True)
    rows = list(measure(source_of(heads, ReportSettings(**options))))
    for skipped in (0, SKIPPED):
        curves = [of_heads(rows, layer=2, head=head, skip_first=skipped) for head in range(4)]
        assert all(len(curve) == 5 and curve == sorted(curve) for curve in curves)


def test_maps_are_means_of_the_chosen_head(made: Any) -> None:
    heads, rows = made
    layer, head, step = heads[5], 3, LENGTH // 10
    seen = dense.visible(LENGTH, LENGTH, is_causal=layer.is_causal)
    softmax = dense.softmax(layer.query, layer.key, scale=SCALE, is_causal=layer.is_causal)
    expected = {None: softmax[0, head]} | {spec: mask_of(layer, spec)[0, head] for spec in SPECS}
    maps = {row["spec"]: row["values"] for row in rows if row["statistic"] == "map"}
    assert list(maps) == list(expected)
    for spec, entries in expected.items():
        for i in range(10):
            for j in range(10):
                place = (slice(i * step, (i + 1) * step), slice(j * step, (j + 1) * step))
                cell = entries[place][seen[place]].double()
                value = maps[spec][i][j]
                assert (value is None) == (len(cell) == 0)
                if value is not None:
                    assert value == pytest.approx(float(cell.mean()), rel=1e-3)
    for spec in SPECS:
        (density,) = of_heads(rows, figure="masks", quantity="density", spec=spec)
        assert density == pytest.approx(float(expected[spec].sum() / seen.sum()))
        (mass,) = of_heads(rows, figure="masks", quantity="mass", spec=spec)
        assert mass == of_heads(rows, figure="heads", quantity="mass", spec=spec, layer=5)[head]


def test_medians_and_quartiles_are_over_layers_and_heads(made: Any) -> None:
    _, rows = made
    for figure, by in (("samples", "num_samples"), ("budgets", "budget")):
        for value in {row[by] for row in rows if row["figure"] == figure}:
            where = {"figure": figure, "spec": SPECS[0], by: value}
            numbers = torch.tensor(of_heads(rows, **where), dtype=torch.float64)
            assert len(numbers) == 8
            summed = {
                row["statistic"]: row["value"]
                for row in rows
                if row["layer"] is None and all(row[name] == x for name, x in where.items())
            }
            expected = {"low": 0.25, "median": 0.5, "high": 0.75}
            assert summed == {
                name: pytest.approx(float(numbers.quantile(share)))
                for name, share in expected.items()
            }


def test_failures_and_other_statistics_are_not_summed_up() -> None:
    rows = [
        make_row(figure="samples", quantity="error", statistic="head", spec="a", value=1.0),
        make_row(figure="samples", quantity="error", statistic="head", spec="a", failure="no"),
        make_row(figure="samples", quantity="error", statistic="layer", spec="a", value=9.0),
    ]
    assert [row["value"] for row in over_heads(rows, by=("spec",))] == [1.0, 1.0, 1.0]


@given(
    num_queries=st.integers(1, 40), num_keys=st.integers(1, 40), cells=st.integers(1, 45),
    is_causal=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_cells_add_up_to_the_matrix(
    num_queries: int, num_keys: int, cells: int, is_causal: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 1, num_queries, 4, generator=generator, dtype=torch.float64)
    key = torch.randn(1, 1, num_keys, 4, generator=generator, dtype=torch.float64)
    scores = Scores.of(query, key, scale=None, is_causal=is_causal, dtype=None)
    softmax = dense.softmax(query, key, is_causal=is_causal)[0, 0]

    def entries(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        terms, total, _ = exponentials(logits)
        return terms[0, 0] / torch.where(total > 0, total, 1.0)[0, 0]

    found = cell_means(scores, cells, entries)
    assert max(found.shape) <= cells
    step = -(-max(num_queries, num_keys) // cells)
    seen = dense.visible(num_queries, num_keys, is_causal=is_causal)
    total = torch.zeros(())
    for i, rows in enumerate(torch.arange(num_queries).split(step)):
        for j, columns in enumerate(torch.arange(num_keys).split(step)):
            count = int(seen[rows][:, columns].sum())
            assert bool(found[i, j].isnan()) == (count == 0)
            part = softmax[rows][:, columns].sum()
            if count:
                torch.testing.assert_close(found[i, j], part / count)
            total = total + part
    rows_with_keys = int(seen.any(dim=-1).sum())
    torch.testing.assert_close(total, torch.tensor(float(rows_with_keys)).double())
