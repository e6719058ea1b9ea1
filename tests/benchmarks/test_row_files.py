"""Files of rows: what a killed program left is repaired, other rows are skipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hyperframe.benchmarking.memory import out_of_memory
from hyperframe.benchmarking.report import append_rows
from hyperframe.benchmarking.row_files import read_rows
from hyperframe.errors import ArgumentError

KEYS = ("a", "b")
ROWS = [{"a": 1, "b": 2}, {"a": 3, "b": None, "c": "é"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def rows_of(path: Path) -> list[dict[str, object]]:
    return list(read_rows(path, KEYS))


def test_no_file_is_no_rows_and_is_not_made(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "rows.jsonl") == []
    assert not list(tmp_path.iterdir())


def test_rows_come_in_their_order_and_others_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"suite": 1}\n\n' + LINES + "  \n")
    assert rows_of(path) == ROWS
    assert path.read_text().endswith("  \n")


@pytest.mark.parametrize("cut", range(1, len(LINES)))
def test_what_is_cut_anywhere_can_be_gone_on_with(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(LINES[:cut])
    # a row is there if all of it is, its end or not
    whole = [row for row in ROWS if json.dumps(row) in LINES[:cut]]
    assert rows_of(path) == whole
    append_rows(path, [ROWS[1]])
    assert rows_of(path) == [*whole, ROWS[1]]


def test_a_line_that_is_no_object_is_refused_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for wrong in ("{", "[1, 2]", "3"):
        path.write_text(f"{LINES}{wrong}\n")
        with pytest.raises(ArgumentError, match=r"line 3 of .*rows\.jsonl is no JSON object"):
            rows_of(path)
        assert path.read_text() == f"{LINES}{wrong}\n"


def test_errors_of_memory_are_told_from_others() -> None:
    assert out_of_memory(MemoryError()) == "MemoryError"
    assert (
        out_of_memory(RuntimeError("CUDA error: out of memory\nx")) == "CUDA error: out of memory"
    )
    for error in (ValueError("out of memory"), RuntimeError("out of range"), KeyError("x")):
        assert out_of_memory(error) is None
