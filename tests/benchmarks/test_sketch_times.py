"""The script that times the sketching detectors, at sizes of a test."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sketch_times.py"


def test_rows_say_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    main = runpy.run_path(str(SCRIPT))["main"]
    main(["--device", "cpu", "--lengths", "200", "--heads", "1", "--tau", "8", "--repeats", "1",
          "--out", str(out)])  # fmt: skip
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert not [row for row in rows if "failed" in row]
    assert len(rows) == 8
    for row in rows:
        assert row["n"] == 200
        assert row["ms"] > 0
        assert row["torch"]
        if row["what"] == "find":
            assert row["wrong_entries"] == 0
            assert set(row["stages_ms"]) == {
                "columns", "sketch", "candidates", "exact test", "lists",
            }  # fmt: skip
        else:
            assert row["is_finite"]
            assert 0 < row["error"] < 2
    found = [row for row in rows if row["what"] == "find" and row["heavy_entries"]]
    assert {row["method"] for row in found} == {"count_sketch", "expander_sketch"}
    assert all(row["recall"] > 0.9 for row in found)
    assert "expander_sketch" in capsys.readouterr().out


def test_no_row_begins_after_the_limit(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    main = runpy.run_path(str(SCRIPT))["main"]
    main(["--device", "cpu", "--lengths", "64", "--heads", "1", "--limit", "-1", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["failed"].startswith("not begun") for row in rows)
