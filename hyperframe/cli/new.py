"""The command `hyperframe new`: a package with a component of one's own, ready to be changed."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from string import Template
from typing import Annotated, Optional

import typer

from ..component import check_choice
from ..errors import ArgumentError
from ..spec import is_spec_name
from .components import KINDS
from .output import echo_json
from .parsing import check_out_folder

__all__ = ["EXAMPLES", "new", "package_files"]

EXAMPLES = """Examples:

hyperframe new detector my_topk

hyperframe new sampler by_norm --out ~/code --author 'Ada Lovelace'

hyperframe new estimator my_sums --json"""

_FLOOR = (
    "0.1"  # of this distribution: where plug-ins, conformance checks and function detectors are
)
# what the written modules import: a component of that name would hide it
_HIDDEN = frozenset({
    "AbstractEstimator", "AbstractSampler", "HeavyMask", "HyperAttention", "RowSums",
    "check_detector", "dataclass", "detectors", "estimators", "from_scores", "hyperframe",
    "samplers", "torch",
})  # fmt: skip


# Optional[...] and not `| None`: typer reads these annotations on Python 3.10 too
def new(
    kind: Annotated[str, typer.Argument(
        help=f"{', '.join(KINDS)}.", show_default=False)],
    name: Annotated[str, typer.Argument(
        help="Its name in specs: lower case, for example my_topk.", show_default=False)],
    out: Annotated[Path, typer.Option(
        help="The folder that the package's own folder goes into.")] = Path(),
    author: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="Who wrote it, for the package's metadata.")] = None,
    as_json: Annotated[bool, typer.Option(
        "--json", help="Print what was written as one JSON object.")] = False,
) -> None:  # fmt: skip
    """Write a package with a component that works: an entry point, and tests that pass.

    Change the component, then install the package; its name works everywhere.
    """
    files = package_files(kind, name, author=author)
    check_out_folder(out)
    folder = out / f"hyperframe-{name.replace('_', '-')}"
    if folder.exists():
        raise ArgumentError(
            f"new {kind} {name}: {folder} is there already; remove it, choose another name, or "
            "pass --out FOLDER"
        )
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    commands = [
        f"pip install -e '{folder}[test]'", f"pytest {folder}",
        f"hyperframe components --kind {kind}",
    ]  # fmt: skip
    module = _module(kind, name)
    if as_json:
        echo_json({
            "kind": kind, "name": name, "folder": str(folder), "module": module,
            "files": sorted(files), "next": commands,
        })  # fmt: skip
        return
    typer.echo(f"{folder}: {len(files)} files. The {kind} is in {module}. Now:\n")
    for command in commands:
        typer.echo(f"    {command}")


def package_files(kind: str, name: str, *, author: str | None = None) -> dict[str, str]:
    """Return the files of a package with one component.

    Args:
        kind: "detector", "sampler" or "estimator".
        name: its name, in lower case; must be free.
        author: for the metadata.

    Returns:
        Path inside of the package's folder -> text.

    Raises:
        ArgumentError: another kind; a name that cannot be used, or is taken (says by whom).

    Example:
        >>> sorted(package_files("sampler", "by_norm"))[:2]
        ['README.md', 'pyproject.toml']
    """
    check_choice("new", "kind", kind, tuple(KINDS))
    cls = "".join(part.capitalize() for part in name.split("_"))
    _check_name(kind, name, cls)
    words = {
        "kind": kind, "name": name, "package": f"hyperframe_{name}", "floor": _FLOOR,
        "distribution": f"hyperframe-{name.replace('_', '-')}",
        # a detector is a function, which has its name
        "target": name if kind == "detector" else cls,
        "authors": "" if author is None else f"authors = [{{ name = {_toml(author)} }}]\n",
    }  # fmt: skip
    package = f"src/hyperframe_{name}"
    sources = {
        "README.md": "README.md", "pyproject.toml": "pyproject.toml",
        f"{package}/__init__.py": "init.py", _module(kind, name): f"{kind}.py",
        f"tests/test_{name}.py": f"test_{kind}.py",
    }  # fmt: skip
    templates = resources.files(__package__ or "") / "templates"
    files = {
        path: Template((templates / f"{source}.txt").read_text(encoding="utf-8")).substitute(words)
        for path, source in sources.items()
    }
    return files | {f"{package}/py.typed": ""}


def _module(kind: str, name: str) -> str:
    return f"src/hyperframe_{name}/{kind}.py"


def _check_name(kind: str, name: str, cls: str) -> None:
    if not (is_spec_name(name) and re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name)):
        folded = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        hint = f", for example {folded}" if re.match(r"[a-z]", folded) and folded != name else ""
        raise ArgumentError(
            f"new {kind} {name!r}: is no name for a module and a spec; use lower-case ASCII "
            f"letters, digits and single _, and no Python keyword{hint}"
        )
    if hidden := _HIDDEN & {name, cls}:
        raise ArgumentError(
            f"new {kind} {name!r}: {min(hidden)} is something that the package imports; choose "
            "another name"
        )
    if owners := KINDS[kind].owners(name):
        raise ArgumentError(
            f"new {kind} {name!r}: the name belongs to {' and '.join(owners)}; choose another name"
        )


def _toml(text: str) -> str:
    """A basic string of TOML: what JSON writes is one."""
    return json.dumps(text, ensure_ascii=False)
