"""Rows of a frontier say what dense float64 says; failures are rows; what is known is kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperframe import detectors
from hyperframe.benchmarking import Shape, make_inputs
from hyperframe.benchmarking.frontier import (
    FRONTIER_KEYS,
    KEY_FIELDS,
    Configuration,
    FrontierSettings,
    Problem,
    load_problem,
    measure,
    pareto_front,
    plot_frontier,
    print_frontier,
    run,
)
from hyperframe.detectors import AbstractDetector
from hyperframe.errors import ArgumentError, UnknownComponentError, UnsupportedError
from hyperframe.integrations.capture import CapturedHeads, save
from hyperframe.masks import HeavyMask, ListMask
from hyperframe.randomness import Stream
from hyperframe.testing.oracles import causal_mask, dense_attention

LENGTH = 256


def captured(seed: int, *, is_causal: bool = True, scale: float = 0.3) -> CapturedHeads:
    shape = Shape(batch=1, heads=4, kv_heads=2, length=LENGTH, head_dim=16)
    query, key, value = make_inputs(
        "planted", shape, dtype=torch.float32, device=torch.device("cpu"), seed=seed
    )
    return CapturedHeads(
        layer_idx=3 * seed, query=query, key=key, value=value, scale=scale, is_causal=is_causal
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("heads") / "heads.safetensors"
    save(path, {3 * seed: captured(seed) for seed in (1, 2)})
    return path


def settings(file: Path, **options: Any) -> FrontierSettings:
    small: dict[str, Any] = {
        "files": [file], "budgets": [32], "num_samples": 16, "window": 16, "sinks": 4,
        "repeats": 0,
    }  # fmt: skip
    return FrontierSettings(**{**small, **options})


def configuration(detector: str, **options: Any) -> Configuration:
    small: dict[str, Any] = {"budget": 32, "num_samples": 16, "window": 16, "sinks": 4}
    return Configuration(detector=detector, **{**small, **options})


@dataclass(frozen=True, kw_only=True)
class EvenKeys(AbstractDetector):
    """Every second key, the first few of them; a detector of somebody else."""

    count: int = 8

    def with_budget(self, keys: int) -> EvenKeys:
        return EvenKeys(count=keys)

    def find(
        self, query: Any, key: Any, *, scale: Any = None, is_causal: bool = False,
        generator: Any = None,
    ) -> HeavyMask:  # fmt: skip
        index = torch.arange(0, key.shape[2], 2)[: self.count].expand(*key.shape[:2], -1)
        return ListMask.columns(
            index, num_query_heads=query.shape[1], num_queries=query.shape[2],
            num_keys=key.shape[2], is_causal=is_causal,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Broken(AbstractDetector):
    """Raises what it is told to."""

    refuses: bool = False

    def find(self, query: Any, key: Any, **options: Any) -> HeavyMask:
        if self.refuses:
            raise UnsupportedError("no heads like these")
        raise RuntimeError("out of luck\nand a second line")


@pytest.fixture
def third_party() -> Iterator[None]:
    detectors.register("even_keys", EvenKeys)
    detectors.register("broken", Broken)
    yield
    detectors.registry.unregister("even_keys")
    detectors.registry.unregister("broken")


@pytest.mark.parametrize("causal", ["single_pass", "none"])
@pytest.mark.parametrize("detector", ["heavy_columns", "sort_lsh", "tile_oracle", "none"])
def test_measures_agree_with_dense_float64(file: Path, detector: str, causal: str) -> None:
    problem = load_problem(file)
    budget = None if detector == "none" else 32
    asked = configuration(detector, causal=causal, budget=budget, seed=5)
    found = measure(problem, asked, repeats=0)
    is_causal = causal != "none"
    masses, recalls, errors, counts = [], [], [], []
    attention = asked.attention()
    for layer in problem.layers:
        mask = attention.detector.find(
            layer.query, layer.key, scale=layer.scale, is_causal=is_causal, generator=Stream(5)
        ).to_dense()
        exact = dense_attention(
            layer.query, layer.key, layer.value, scale=layer.scale, is_causal=is_causal
        )
        logits = (
            layer.scale
            * layer.query.double()
            @ layer.key.double().repeat_interleave(2, dim=1).transpose(-1, -2)
        )
        if is_causal:
            logits = logits.masked_fill(~causal_mask(LENGTH, LENGTH), float("-inf"))
        masses.append((logits.softmax(dim=-1) * mask).sum(dim=-1).mean())
        counts.append(mask.sum(dim=-1).double().mean())
        rows = (torch.arange(64) * 4 + torch.arange(1, 65) * 4) // 2
        seen = torch.isfinite(logits[:, :, rows])  # all of them are among the top 256
        recalls.append(((mask[:, :, rows] & seen).sum(-1) / seen.sum(-1)).mean())
        out = attention(
            layer.query, layer.key, layer.value, scale=layer.scale, is_causal=is_causal
        ).double()
        errors.append((out - exact.out).flatten(2).norm(dim=-1) / exact.out.flatten(2).norm(dim=-1))
    assert found["mass"] == pytest.approx(float(torch.stack(masses).mean()), abs=1e-5)
    assert found["recall"] == pytest.approx(float(torch.stack(recalls).mean()), abs=1e-5)
    assert found["keys"] == pytest.approx(float(torch.stack(counts).mean()), abs=1e-6)
    visible = (LENGTH + 1) / 2 if is_causal else LENGTH
    assert found["density"] == pytest.approx(found["keys"] / visible)
    flat = torch.stack(errors).flatten()  # [layers, batch, heads]
    assert found["error"]["median"] == pytest.approx(float(flat.median()), rel=1e-3)
    assert found["error"]["worst"] == pytest.approx(float(flat.max()), rel=1e-3)
    place = int(flat.argmax())
    assert found["error"]["worst_layer"] == (3, 6)[place // 4]
    assert found["error"]["worst_head"] == place % 4
    assert 0 < found["sampled_keys"] <= 16
    assert found["ms"] is None


@pytest.mark.parametrize("causal", ["single_pass", "recursive", "none"])
def test_budget_of_all_keys_is_exact(file: Path, causal: str) -> None:
    asked = configuration("tile_oracle", budget=LENGTH, causal=causal, min_seq_len=64)
    found = measure(load_problem(file), asked, repeats=0)
    assert found["mass"] == pytest.approx(1.0, abs=1e-5)
    assert found["error"]["worst"] < 1e-4
    assert found["lse_error"] < 1e-4
    if causal != "recursive":
        assert found["recall"] == pytest.approx(1.0, abs=0.02)  # keys without mass may be absent
    else:
        assert found["recall"] is None


@pytest.mark.parametrize("budget", [24, 64])
def test_nothing_that_holds_as_few_keys_is_better_than_the_tile_oracle(
    file: Path, budget: int
) -> None:
    rows = list(run(settings(file, oracle=True, budgets=[budget], num_samples=32)))
    by_name = {row["detector"]: row for row in rows}
    best = by_name.pop("tile_oracle")
    assert best["oracle_ratio"] is None
    compared = 0
    for name, row in by_name.items():
        assert row["failure"] is None, (name, row["failure"])
        if row["budget"] is not None:
            ratio = row["error"]["median"] / best["error"]["median"]
            assert row["oracle_ratio"] == pytest.approx(ratio)
        if row["keys"] <= best["keys"]:  # not the tile's own keys beside the budget
            compared += 1
            assert best["error"]["median"] <= row["error"]["median"], name
            assert best["mass"] >= row["mass"], name
    assert compared >= 6


def test_oracle_has_the_tiles_of_the_detector(file: Path) -> None:
    names = ["heavy_columns(tile_size=32)", "heavy_columns", "sort_lsh"]
    rows = list(run(settings(file, detectors=names, oracle=True)))
    oracles = {row["tile_size"]: row for row in rows if row["detector"] == "tile_oracle"}
    assert set(oracles) == {32, None}
    for row in rows[2:]:
        same = oracles[32 if "32" in row["detector"] else None]
        assert row["oracle_error"] == same["error"]["median"]
    sized = list(run(settings(file, detectors=["heavy_columns"], tile_size=16, oracle=True)))
    assert [row["tile_size"] for row in sized] == [16, 16]
    assert "tile_size=16" in sized[1]["detector_spec"]


def test_rows_hold_the_documented_keys_and_are_json(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "rows.jsonl"
    asked = settings(
        file, detectors=["quest", "none"], samplers=["uniform", "importance"], repeats=1
    )
    rows = list(run(asked, out=out))
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert [(row["detector"], row["sampler"]) for row in rows] == [
        ("quest", "uniform"), ("quest", "importance"), ("none", "uniform"), ("none", "importance"),
    ]  # fmt: skip
    for row in rows:
        assert list(row) == list(FRONTIER_KEYS)
        assert row["layers"] == [3, 6]
        assert row["ms"]["total"] == pytest.approx(
            row["ms"]["detect"] + row["ms"]["plan"] + row["ms"]["attend"]
        )
        assert row["ms"]["exact"] > 0
        assert row["environment"]["torch"] == torch.__version__
        assert "sliding_window(width=16, num_sinks=4)" in row["spec"]
    quest, none = rows[0], rows[2]
    assert quest["detector_spec"] == "quest(num_blocks=2)"
    assert (none["detector_spec"], none["budget"]) == (None, None)
    assert quest["keys"] > none["keys"]
    assert rows[0]["mass"] == rows[1]["mass"]  # the sampler changes the rest alone
    assert rows[0]["error"] != rows[1]["error"]


def test_spec_of_a_row_makes_its_output_again(file: Path) -> None:
    from hyperframe.attention import HyperAttention

    (row,) = run(settings(file, detectors=["reformer_lsh"], seed=7))
    attention = eval(row["spec"], {"HyperAttention": HyperAttention})
    errors = []
    for layer in load_problem(file).layers:
        inputs = (layer.query, layer.key, layer.value)
        out = attention(*inputs, scale=layer.scale, is_causal=True)
        exact = dense_attention(*inputs, scale=layer.scale, is_causal=True).out
        errors.append((out - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1))
    assert float(torch.stack(errors).max()) == pytest.approx(row["error"]["worst"], rel=1e-3)


def test_second_run_measures_nothing(file: Path, tmp_path: Path) -> None:
    out, asked = tmp_path / "rows.jsonl", settings(file, detectors=["strided", "quest"])
    told: list[tuple[int, int, str]] = []

    def progress(*what: Any) -> None:
        told.append(what)

    first = list(run(asked, out=out, progress=progress))
    assert [what[:2] for what in told] == [(0, 2), (1, 2), (2, 2)]
    assert "strided at 32 + uniform" in told[0][2]
    told.clear()
    text = out.read_text()
    assert list(run(asked, out=out, progress=progress)) == first
    assert [what[2] for what in told] == [""]
    assert out.read_text() == text
    # another seed, and times that are missing, are something else
    list(run(settings(file, detectors=["strided", "quest"], seed=1), out=out))
    list(run(settings(file, detectors=["quest"], repeats=1), out=out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["detector"], row["seed"]) for row in rows] == [
        ("strided", 0), ("quest", 0), ("strided", 1), ("quest", 1), ("quest", 0),
    ]  # fmt: skip


def test_oracle_that_is_asked_for_later_is_compared_with(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    list(run(settings(file, detectors=["quest"]), out=out))
    rows = list(run(settings(file, detectors=["quest"], oracle=True), out=out))
    assert rows[1]["oracle_error"] == rows[0]["error"]["median"]
    assert len(out.read_text().splitlines()) == 3
    list(run(settings(file, detectors=["quest"], oracle=True), out=out))
    assert len(out.read_text().splitlines()) == 3


@pytest.mark.usefixtures("third_party")
def test_broken_detector_is_a_row_and_is_tried_again(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    names = ["broken", "broken(refuses=True)", "quest"]
    for lines in (3, 4):
        broken, refused, quest = run(settings(file, detectors=names), out=out)
        assert broken["failure"] == "RuntimeError: out of luck"
        assert refused["failure"] == "UnsupportedError: no heads like these"
        assert (broken["refused"], refused["refused"], quest["failure"]) == (False, True, None)
        assert broken["error"] is None
        assert list(broken) == list(FRONTIER_KEYS)
        assert len(out.read_text().splitlines()) == lines  # a refusal stays


@pytest.mark.usefixtures("third_party")
def test_detectors_of_others_appear_by_name(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(run(settings(file, budgets=[8, 32])))
    mine = [row for row in rows if row["detector"] == "even_keys"]
    assert [(row["budget"], row["detector_spec"]) for row in mine] == [
        (8, "even_keys"), (32, "even_keys(count=32)"),
    ]  # fmt: skip
    assert mine[1]["keys"] > mine[0]["keys"]
    print_frontier(rows)
    printed = capsys.readouterr().out
    assert "even_keys" in printed
    assert "not measured: broken + uniform: RuntimeError: out of luck" in printed


def test_output_that_is_not_finite_is_a_failure(file: Path) -> None:
    whole = load_problem(file)
    poisoned = dataclasses.replace(whole.layers[1], value=whole.layers[1].value * float("inf"))
    problem = dataclasses.replace(whole, layers=(whole.layers[0], poisoned))
    with pytest.raises(ArithmeticError, match="layer 6 is not finite"):
        measure(problem, configuration("strided"), repeats=0)


def test_rows_without_keys_have_no_error_of_their_sums(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = "block_list(blocks=((0, 0),), block_size=16)"
    rows = list(run(settings(file, detectors=[blocks], window=0, sinks=0, num_samples=0)))
    assert rows[0]["failure"] is None
    assert rows[0]["lse_error"] is None
    assert rows[0]["mass"] < 0.1
    print_frontier(rows)
    assert "(as it is)" in capsys.readouterr().out.replace("\n", "")


def test_strict_choice_is_refused_in_a_row_where_there_is_none(file: Path) -> None:
    rows = list(
        run(
            settings(
                file, detectors=["heavy_columns"], samplers=["uniform", "importance"], strict=True
            )
        )
    )
    assert rows[0]["failure"] is None
    assert "strict_causal=True" in rows[1]["failure"]
    assert "strict_causal=True" in rows[0]["spec"]


def test_recursion_lengths_and_heads(file: Path) -> None:
    asked = settings(
        file, detectors=["heavy_columns"], causal="recursive", min_seq_len=64, lengths=[128, 256],
        heads=2, repeats=1,
    )  # fmt: skip
    rows = list(run(asked))
    assert [(row["n"], row["heads"], row["kv_heads"]) for row in rows] == [
        (128, 2, 1), (256, 2, 1),
    ]  # fmt: skip
    for row in rows:
        assert row["failure"] is None
        assert row["recall"] is None
        assert 0 < row["mass"] <= 1
        assert row["ms"]["total"] > 0


def test_rows_of_heads_without_a_mask(tmp_path: Path) -> None:
    path = tmp_path / "vision.safetensors"
    save(path, {0: captured(1, is_causal=False)})
    (row,) = run(settings(path, detectors=["sort_lsh"]))
    assert row["causal"] == "none"
    with pytest.raises(ArgumentError, match="was not causal"):
        list(run(settings(path, causal="recursive")))


def test_table_and_plot(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = settings(
        file, detectors=["quest", "strided", "none"], budgets=[16, 64], oracle=True, repeats=1,
        samplers=["uniform", "importance"],
    )  # fmt: skip
    rows = list(run(asked))
    print_frontier(rows)
    printed = capsys.readouterr().out
    for word in ("keys time", "(window alone)", "(tile_oracle)", "exact attention", "/ oracle"):
        assert word in printed
    lines = [line for line in printed.splitlines() if "tile_oracle" in line]
    assert not any("keys" in line or "time" in line for line in lines)  # yardsticks are no choice
    plot_frontier(tmp_path / "deep" / "plot.png", rows)
    assert (tmp_path / "deep" / "plot.png").read_bytes().startswith(b"\x89PNG")
    print_frontier([])
    assert "nothing was measured" in capsys.readouterr().out


def test_pareto_front_by_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    points = [tuple(map(float, p)) for p in torch.randint(0, 6, (30, 2), generator=generator)]
    for point, is_best in zip(points, pareto_front(points), strict=True):  # type: ignore[arg-type]
        better = [q for q in points if q[0] <= point[0] and q[1] <= point[1] and q != point]
        assert is_best == (not better)


def test_layers_of_two_kinds_are_refused() -> None:
    layers = (captured(1), captured(2, is_causal=False))
    with pytest.raises(ArgumentError, match="differ in shape or causality"):
        Problem(file="odd", digest="", layers=layers)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"budgets": [0]}, "budget"),
        ({"budgets": []}, "name one of each"),
        ({"files": []}, "name one at least"),
        ({"causal": "double"}, "causal='double'"),
        ({"window": 0}, "sinks are part of the window"),
        ({"lengths": [512]}, "--lengths 512"),
        ({"heads": 3}, "--heads 3"),
        ({"files": ["nowhere.safetensors"]}, "there is no such file"),
        ({"files": ["a/heads.safetensors", "b/heads.safetensors"]}, "rename one"),
    ],
)
def test_bad_settings_are_refused(file: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        list(run(settings(file, **options)))


def test_unknown_names_are_refused_before_anything_is_measured(file: Path) -> None:
    with pytest.raises(UnknownComponentError, match="Did you mean 'sort_lsh'"):
        list(run(settings(file, detectors=["sort_lhs"])))
    with pytest.raises(UnknownComponentError, match="sampler='uniforn'"):
        list(run(settings(file, samplers=["uniforn"])))


def test_file_of_something_else_is_refused(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    other.write_text("no tensors")
    with pytest.raises(ArgumentError, match="is no safetensors file"):
        list(run(settings(other)))
    out = tmp_path / "rows.jsonl"
    out.write_text('{"suite": "overview"}\n{"half\n')
    with pytest.raises(ArgumentError, match=r"line 2 of .*rows\.jsonl is no JSON object"):
        list(run(settings(file), out=out))


def test_key_fields_are_keys_of_a_row() -> None:
    assert set(KEY_FIELDS) <= set(FRONTIER_KEYS)
