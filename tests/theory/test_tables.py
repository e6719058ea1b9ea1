"""The tables of docs/theory.md are those of the committed rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_line_of_the_tables_is_in_the_documentation() -> None:
    spec = importlib.util.spec_from_file_location("theory", ROOT / "benchmarks" / "theory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = ROOT / "benchmarks" / "results" / "theory.jsonl"
    table = module.table([json.loads(line) for line in rows.read_text().splitlines()])
    page = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8").splitlines()
    assert len(table.splitlines()) > 20
    for line in table.splitlines():
        assert line in page
