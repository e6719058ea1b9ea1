"""`import hyperframe` brings in torch and nothing else that is heavy, in a fresh process."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "triton",
    "numba",
    "sklearn",
    "scipy",
    "transformers",
    "accelerate",
    "gguf",
    "matplotlib",
    "pandas",
    "typer",
    "rich",
)

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)

BLOCKED = set(%r)
sys.meta_path.insert(0, Blocker())
"""

ATTEND = """
import torch
from hyperframe import HyperAttention

query, key, value = (torch.randn(1, 2, 600, 16) for _ in range(3))
attn = HyperAttention(backend="torch", min_seq_len=0)
for is_causal in (False, True):
    out = attn(query, key, value, is_causal=is_causal)
    assert out.shape == query.shape
    assert torch.isfinite(out).all()
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_after(statement: str) -> set[str]:
    out = run(f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))")
    return {name.partition(".")[0] for name in json.loads(out)}


def test_import_adds_nothing_heavy_to_torch() -> None:
    # torch imports what it likes of these; we must not add to it
    added = modules_after("import hyperframe") - modules_after("import torch")
    assert "hyperframe" in added
    assert added.isdisjoint(HEAVY)


def test_second_import_name_is_lazy() -> None:
    found = modules_after("import hyperframe_attention")
    assert "torch" not in found
    assert "hyperframe" not in found


@pytest.mark.parametrize("package", ["hyperframe", "hyperframe_attention"])
def test_torch_backend_works_without_the_optional_packages(package: str) -> None:
    code = ATTEND.replace("from hyperframe import", f"from {package} import")
    run(BLOCK % (HEAVY,) + code)


def test_blocker_blocks() -> None:
    run(
        BLOCK % (HEAVY,)
        + "try:\n    import scipy\nexcept ModuleNotFoundError:\n    pass\nelse:\n    sys.exit(1)"
    )


def test_both_names_export_the_same_api() -> None:
    import hyperframe
    import hyperframe_attention

    assert set(hyperframe_attention.__all__) == {
        name for name in hyperframe.__all__ if not name.startswith("__")
    }
    for name in hyperframe_attention.__all__:
        assert getattr(hyperframe_attention, name) is getattr(hyperframe, name)


def test_sentinel_and_version_agree_with_the_distribution() -> None:
    import hyperframe
    import hyperframe_attention

    assert hyperframe.__distribution__ == "hyperframe-attention"
    assert hyperframe.__version__ == metadata.version("hyperframe-attention")
    assert hyperframe_attention.__version__ == hyperframe.__version__


def test_unknown_name_is_an_attribute_error() -> None:
    import hyperframe_attention

    with pytest.raises(AttributeError, match=r"'hyperframe_attention' has no attribute 'nonsense'"):
        _ = hyperframe_attention.nonsense


def test_neighbours_file_names_are_never_taken() -> None:
    names = {path.name for path in (ROOT / "hyperframe").iterdir()}
    assert names.isdisjoint({"frame.py", "flags.py", "exceptions.py"})


def test_package_imports_itself_relatively_only() -> None:
    # an absolute import could reach a copy of the folder that somebody else put first
    absolute = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "hyperframe").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Import) and any(of_ours(name.name) for name in node.names))
        or (isinstance(node, ast.ImportFrom) and node.level == 0 and of_ours(node.module or ""))
    ]
    assert absolute == []


def of_ours(module: str) -> bool:
    return module.partition(".")[0] in {"hyperframe", "hyperframe_attention"}
