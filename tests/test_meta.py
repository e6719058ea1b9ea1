"""Laws about the test suite itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# collects with -k and says which tests are property tests, and which the keyword selected
COLLECT = """
import json, sys
import pytest

class Spy:
    def __init__(self):
        self.property_tests, self.selected, self.total = [], [], 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        self.total = len(items)
        for item in items:
            given = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
            if given or item.get_closest_marker("hypothesis") is not None:
                self.property_tests.append(item.nodeid)

    def pytest_collection_finish(self, session):
        self.selected = [item.nodeid for item in session.items]

spy = Spy()
code = pytest.main(
    ["--collect-only", "-qq", "-k", "hypothesis", "-p", "no:cacheprovider", *sys.argv[2:]],
    plugins=[spy],
)
with open(sys.argv[1], "w") as file:
    json.dump({"code": int(code), **vars(spy)}, file)
"""


def collect(tmp_path: Path, *arguments: str) -> dict[str, object]:
    out = tmp_path / "collected.json"
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, str(out), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.exists(), done.stdout + done.stderr
    found = json.loads(out.read_text())
    # 0: some were selected; 5: none were. anything else is an error of the collection
    assert found["code"] in (0, 5), done.stdout + done.stderr
    assert isinstance(found, dict)
    return found


@pytest.mark.slow
def test_keyword_selects_exactly_the_property_tests(tmp_path: Path) -> None:
    found = collect(tmp_path)
    assert found["total"]
    assert found["selected"] == found["property_tests"]


def test_keyword_check_notices_a_misleading_name(tmp_path: Path) -> None:
    # the check itself is checked: a path with the word selects tests that are none
    word = "hypo" + "thesis"
    module = tmp_path / f"test_{word}_like.py"
    module.write_text("def test_plain():\n    assert True\n")
    found = collect(tmp_path, str(module), "--rootdir", str(tmp_path), "-c", "/dev/null")
    assert found["property_tests"] == []
    assert found["selected"] != []
