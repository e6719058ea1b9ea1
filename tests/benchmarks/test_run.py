"""Rows hold the documented keys, reasons stand where numbers are missing, the gate refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperframe.attention import HyperAttention
from hyperframe.benchmarking import (
    MODES,
    ROW_KEYS,
    SUITES,
    GivenTiles,
    Settings,
    SpecMethod,
    append_rows,
    break_even,
    custom_suite,
    failed_gates,
    plot_rows,
    print_report,
    run_suite,
)
from hyperframe.errors import ArgumentError, BackendUnavailableError

TINY: dict[str, Any] = {
    "device": torch.device("cpu"), "dtype": torch.float32, "lengths": (600,), "head_dims": (16,),
    "heads": 2, "seconds": 0.005, "max_error": 10.0,
}  # fmt: skip

RECURSIVE = SpecMethod(
    label="recursive", is_causal=True,
    attention=HyperAttention(
        detector="sort_lsh(block_size=64)", causal="recursive", min_seq_len=128, num_samples=32
    ),
)  # fmt: skip
WINDOW = SpecMethod(
    label="window", is_causal=True,
    attention=HyperAttention(
        detector="sliding_window(width=16) | sort_lsh(block_size=64)", num_samples=32,
        min_seq_len=0,
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Noise(GivenTiles):
    """A method whose kernel is deliberately wrong; its float64 reference is not."""

    label: str = "noise"

    def prepare(
        self, query: torch.Tensor, key: torch.Tensor, *, backend: str, seed: int
    ) -> Callable[..., torch.Tensor]:
        call = super().prepare(query, key, backend=backend, seed=seed)
        if backend == "torch":
            return call
        return lambda q, k, v: torch.randn_like(q) + 0 * (q + k + v)


def rows_of(*methods: Any, **options: Any) -> list[dict[str, Any]]:
    return list(run_suite(custom_suite(methods), Settings(**{**TINY, **options})))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return rows_of(RECURSIVE, WINDOW, lengths=(300, 600), graphs=True)


def test_rows_hold_the_documented_keys_and_are_json(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    append_rows(path, rows[:2])
    append_rows(path, rows[2:])
    read = [json.loads(line) for line in path.read_text().splitlines()]
    assert read == rows
    for row in read:
        assert list(row) == list(ROW_KEYS)
        assert row["environment"]["torch"] == torch.__version__
        assert row["tensor_bytes"] == 4 * 4 * 2 * row["n"] * 16


def test_times_and_errors_stand_side_by_side(rows: list[dict[str, Any]]) -> None:
    timed = [row for row in rows if row["forward"]]
    assert {row["label"] for row in timed} >= {"sdpa-flash", "recursive", "window"}
    for row in timed:
        assert row["forward_backward"]["median_ms"] > 0
        assert row["error"]["rows"] == min(512, row["n"])
        if row["kind"] == "exact":
            assert row["error"]["worst"] < 1e-4
            assert row["gate"] == {"passed": None, "reasons": []}
            assert row["speed_up"] == dict.fromkeys(MODES)
        else:
            assert row["gate"] == {"passed": True, "reasons": []}
            best = min(
                other["forward"]["median_ms"]
                for other in timed
                if other["kind"] == "exact" and other["n"] == row["n"]
            )
            assert row["speed_up"]["forward"] == best / row["forward"]["median_ms"]
            assert row["backend"] == "torch"
            assert set(row["stages"]) == {"detect", "plan", "attend", "merge"} | (
                {"leaves"} if row["label"] == "recursive" else set()
            )


def test_missing_times_have_reasons(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["kind"] == "masked":
            assert "CUDA" in row["not_timed"]["all"]
        elif row["forward"]:
            assert "CUDA" in row["not_timed"]["forward_graph"]
            assert row["forward_graph"] is None


def test_table_break_even_and_plot_are_made(
    rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(rows, width=200)
    printed = capsys.readouterr().out
    for word in ("sdpa-flash", "recursive", "fwd+bwd ms", "kernel error", "stages of a forward"):
        assert word in printed
    assert "not timed: flex: window" in printed
    assert set(break_even(rows)) == {
        (label, 16, mode)
        for label in ("recursive", "window")
        for mode in ("forward", "forward_backward")
    }
    plot_rows(tmp_path / "p" / "plot.png", rows)
    assert (tmp_path / "p" / "plot.png").read_bytes().startswith(b"\x89PNG")
    print_report([])
    assert "nothing was measured" in capsys.readouterr().out


def test_break_even_is_the_first_length_from_which_all_are_faster() -> None:
    def row(n: int, ratio: float | None) -> dict[str, Any]:
        return {"label": "a", "head_dim": 64, "n": n, "speed_up": {"forward": ratio}}

    measured = [row(1, 2.0), row(2, 0.9), row(4, 1.5), row(8, 3.0), row(16, None)]
    assert break_even(measured) == {("a", 64, "forward"): 4}
    assert break_even(measured[:2]) == {("a", 64, "forward"): None}


def test_wrong_kernel_gets_no_speed_up(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = rows_of(Noise(), backend="reference", max_error=None, inputs="planted")
    (row,) = failed_gates(rows)
    assert row["forward"]["median_ms"] > 0
    assert row["speed_up"] == dict.fromkeys(MODES)
    assert "kernel error" in row["gate"]["reasons"][0]
    assert "relative error" in row["gate"]["reasons"][1]
    print_report(rows, width=200)
    printed = capsys.readouterr().out
    assert "refused: kernel error" in printed
    assert "x /" not in printed
    plot_rows(tmp_path / "plot.png", rows)


def test_large_error_is_refused_on_planted_inputs_only() -> None:
    blind = SpecMethod(
        label="blind", is_causal=False,
        attention=HyperAttention(
            detector="sliding_window(width=1, num_sinks=0)", num_samples=8, min_seq_len=0
        ),
    )  # fmt: skip
    options: dict[str, Any] = {"max_error": None, "forward_only": True}
    (refused,) = failed_gates(rows_of(blind, inputs="planted", **options))
    assert "is above 0.5" in refused["gate"]["reasons"][0]
    assert not failed_gates(rows_of(blind, inputs="normal", **options))


def test_call_that_breaks_fails_the_gate() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Broken(GivenTiles):
        label: str = "broken"

        def prepare(self, query: Any, key: Any, *, backend: str, seed: int) -> Any:
            def call(*tensors: torch.Tensor) -> torch.Tensor:
                raise RuntimeError("illegal memory access")

            return call

    (row,) = failed_gates(rows_of(Broken()))
    assert row["gate"]["reasons"] == ["the call failed: RuntimeError: illegal memory access"]
    assert row["forward"] is None


def test_exact_fallback_is_not_timed_as_an_approximation() -> None:
    rows = rows_of(RECURSIVE, lengths=(128,), forward_only=True)
    (row,) = (row for row in rows if row["kind"] == "approximate")
    assert row["forward"] is None
    assert "exact attention" in row["not_timed"]["all"]
    assert row["gate"]["passed"] is None


@pytest.mark.parametrize("name", SUITES)
def test_suites_run(name: str) -> None:
    settings = Settings(**{**TINY, "lengths": (520,), "heads": 2, "kv_heads": 1})
    rows = list(run_suite(SUITES[name], settings))
    assert not failed_gates(rows)
    assert any(row["kind"] == "exact" and row["forward"] for row in rows)


def test_settings_that_cannot_work_are_refused() -> None:
    for options in ({"kv_heads": 3}, {"lengths": (0,)}, {"seconds": 0.0}):
        with pytest.raises(ArgumentError, match="bench:"):
            Settings(**{**TINY, **options})
    with pytest.raises(ArgumentError, match="inputs='odd'"):
        rows_of(WINDOW, inputs="odd")
    with pytest.raises(BackendUnavailableError, match="numba"):
        rows_of(WINDOW, backend="numba")


@pytest.mark.gpu
def test_graphs_memory_and_kernels_on_a_gpu() -> None:
    settings: dict[str, Any] = {
        "device": torch.device("cuda"), "dtype": torch.bfloat16, "lengths": (4096,),
        "head_dims": (64,), "heads": 4, "graphs": True, "max_error": None, "inputs": "planted",
    }  # fmt: skip
    rows = list(run_suite(SUITES["overview"], Settings(**settings)))
    assert not failed_gates(rows), [row["gate"] for row in rows]
    for row in rows:
        if row["kind"] == "approximate":
            assert row["peak_extra_bytes"] > 0
            assert row["forward_graph"] is not None, row["not_timed"]
            assert row["forward_backward_graph"] is not None, row["not_timed"]
    assert {"sdpa-flash", "sdpa-cudnn"} <= {row["label"] for row in rows if row["forward"]}
