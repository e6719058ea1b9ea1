"""Who owns `hyperframe/__init__.py`, and whether our own submodules are there and work.

Two distributions write into the folder `hyperframe/`: ours (`hyperframe-attention`) and the HTTP/2
framing library (`hyperframe`). Their submodules have different names, so only `__init__.py` and
`py.typed` are fought over: the last one installed wins, and uninstalling either removes both files.

The package's own files are read, not imported, to find the owner; submodules are imported to see
whether they work. Nothing is changed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from base64 import urlsafe_b64encode
from importlib import metadata
from pathlib import Path

from . import _DISTRIBUTION

__all__ = [
    "NEIGHBOUR", "REPAIR", "folders", "init_file", "missing_files", "owner_of", "try_import",
    "what_is_broken",
]  # fmt: skip

NEIGHBOUR = "hyperframe"
"""The HTTP/2 library's distribution name."""

REPAIR = f"pip install --force-reinstall --no-deps {_DISTRIBUTION}"
"""What gives us our files back."""


def folders() -> list[str]:
    """Return every folder `hyperframe/` on the import path, in its order."""
    found: dict[str, None] = {}
    for entry in sys.path:
        folder = Path(entry or ".").resolve() / "hyperframe"
        if folder.is_dir():
            found[str(folder)] = None
    return list(found)


def init_file() -> Path | None:
    """Return the `hyperframe/__init__.py` that `import hyperframe` runs, or None."""
    # for a top-level name find_spec looks and does not import
    try:
        spec = importlib.util.find_spec("hyperframe")
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin)


def owner_of(init: Path) -> str:
    """Return who wrote `init`: by our sentinel, then by the hashes of pip's records."""
    content = init.read_bytes()
    if _sentinel(content) == _DISTRIBUTION:
        return _DISTRIBUTION
    digest = urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    for distribution in metadata.distributions():
        for file in distribution.files or ():
            if file.name != "__init__.py" or file.hash is None or file.hash.value != digest:
                continue
            if Path(str(distribution.locate_file(file))).resolve() == init.resolve():
                return f"{distribution.name} {distribution.version}"
    if (init.parent / "frame.py").exists():
        return "the HTTP/2 library hyperframe"
    return "an unknown package"


def _sentinel(content: bytes) -> str | None:
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return None
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        names = {target.id for target in targets if isinstance(target, ast.Name)}
        if "__distribution__" in names and isinstance(value, ast.Constant):
            return str(value.value)
    return None


def try_import(name: str) -> str:
    """Return "ok", or what importing a module raised."""
    try:
        importlib.import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def missing_files(name: str) -> list[str]:
    """Return the files of a distribution that are not on the disk."""
    # __init__.py and py.typed are the two that come and go with the neighbour
    try:
        files = metadata.distribution(name).files or []
    except metadata.PackageNotFoundError:
        return []
    shared = {"hyperframe/__init__.py", "hyperframe/py.typed"}
    return [
        file.as_posix()
        for file in files
        if file.suffix == ".py"
        and file.as_posix() not in shared
        and not Path(str(file.locate())).exists()
    ]


def what_is_broken(
    failures: dict[str, str], missing: list[str], found: list[str]
) -> tuple[str, list[str]]:
    """Return what is wrong, in a sentence, and how to repair it.

    Args:
        failures: submodule -> what importing it raised.
        missing: files that are not on the disk.
        found: what `folders` returned.
    """
    if missing:
        return (
            f"broken: {len(missing)} files of {_DISTRIBUTION} are missing, {missing[0]} for one",
            [REPAIR],
        )
    first = next(iter(failures))
    verdict = f"broken: {first} cannot be imported ({failures[first]})"
    ours = [folder for folder in found if (Path(folder) / "attention.py").exists()]
    if ours and ours[0] != found[0]:
        # an editable install, or two site folders: the folder that comes first hides the other
        return (
            f"{verdict}; {found[0]} comes first on the import path and hides {ours[0]}",
            [
                f"pip uninstall {NEIGHBOUR}, if nothing needs the HTTP/2 library here",
                f"or, instead of an editable install, a wheel into the same folder: {REPAIR}",
            ],
        )
    lost = failures[first].startswith("ModuleNotFoundError") and "hyperframe" not in failures[first]
    if lost:
        # one of our dependencies is not there
        return verdict, [f"pip install {_DISTRIBUTION}"]
    return verdict, [REPAIR]
