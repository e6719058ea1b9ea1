"""The examination behind `python -m hyperframe_attention doctor`.

Two distributions write into the folder `hyperframe/`: ours (`hyperframe-attention`) and the HTTP/2
framing library (`hyperframe`). Their submodules have different names, so only `__init__.py` and
`py.typed` are fought over: the last one installed wins, and uninstalling either removes both files.
Three states follow: ours owns `__init__.py` (healthy), it does not but our submodules are there
(clash: `hyperframe_attention` works, `import hyperframe` gives somebody else's module), or our
submodules cannot be imported (broken).

The package's own files are read, not imported, to find the owner; submodules are imported to see
whether they work. Nothing is changed.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import platform
import sys
from base64 import urlsafe_b64encode
from importlib import metadata
from pathlib import Path
from typing import Any

from . import _DISTRIBUTION, _HOMES

__all__ = ["EXIT_CODES", "Report", "examine", "print_json", "print_text"]

EXIT_CODES = {0: "healthy", 1: "clash found", 2: "broken"}

_NEIGHBOUR = "hyperframe"  # the HTTP/2 library's distribution name
_REPAIR = f"pip install --force-reinstall --no-deps {_DISTRIBUTION}"
_PACKAGES = ("torch", "triton", "numpy", "transformers", "numba", "scikit-learn")


@dataclasses.dataclass(frozen=True)
class Report:
    """What the examination found.

    Attributes:
        exit_code: 0 healthy, 1 clash found, 2 broken.
        verdict: one sentence.
        init_file: the `hyperframe/__init__.py` that `import hyperframe` runs, or None.
        init_owner: the distribution that wrote that file, as far as can be told, or None.
        folders: every folder `hyperframe/` on the import path, in the order of the path.
        submodules: `"ok"`, or what importing it raised, for every submodule with a public name.
        missing_files: files of our distribution that are not on the disk.
        repair: what to do, in order; empty when nothing is wrong.
        notes: what is worth knowing and no reason to act.
        versions: of this distribution, the neighbour, Python and the packages that matter.
        device: the GPU that torch sees, or why it sees none.
    """

    exit_code: int
    verdict: str
    init_file: str | None
    init_owner: str | None
    folders: list[str]
    submodules: dict[str, str]
    missing_files: list[str]
    repair: list[str]
    notes: list[str]
    versions: dict[str, str | None]
    device: str


def examine() -> Report:
    """Examine the installation that this interpreter sees.

    Returns:
        The report. Imports torch and the submodules of `hyperframe`; takes seconds.
    """
    folders = _folders()
    init = _init_file()
    owner = _owner(init) if init is not None else None
    submodules = {name: _try_import(name) for name in sorted(set(_HOMES.values()))}
    failures = {name: found for name, found in submodules.items() if found != "ok"}
    missing = _missing_files(_DISTRIBUTION)
    neighbour = _version(_NEIGHBOUR)

    repair: list[str] = []
    notes: list[str] = []
    if failures or missing:
        code = 2
        verdict, repair = _broken(failures, missing, folders)
    elif owner == _DISTRIBUTION:
        code = 0
        verdict = f"healthy: {_DISTRIBUTION} owns hyperframe/__init__.py and its submodules work"
    else:
        code = 1
        found = (
            "hyperframe/ has no __init__.py (uninstalling the other package takes it away)"
            if init is None
            else f"hyperframe/__init__.py belongs to {owner}"
        )
        verdict = (
            f"clash: {found}; `import hyperframe` does not give this library's API, "
            "`import hyperframe_attention` does"
        )
        repair = [_REPAIR]

    if neighbour is not None:
        notes.append(
            f"the HTTP/2 library hyperframe {neighbour} is installed too; its submodules "
            "(hyperframe.frame, ...) work beside ours in either order"
        )
        gone = _missing_files(_NEIGHBOUR)
        if gone:
            notes.append(f"files of the HTTP/2 library are missing: {', '.join(gone)}")
    if init is not None and not (init.parent / "py.typed").exists():
        notes.append("hyperframe/py.typed is missing: type checkers will not see our types")
    if len(folders) > 1:
        notes.append(f"more than one folder hyperframe/ on the import path: {', '.join(folders)}")

    return Report(
        exit_code=code,
        verdict=verdict,
        init_file=None if init is None else str(init),
        init_owner=owner,
        folders=folders,
        submodules=submodules,
        missing_files=missing,
        repair=repair,
        notes=notes,
        versions={
            "python": platform.python_version(),
            _DISTRIBUTION: _version(_DISTRIBUTION),
            f"{_NEIGHBOUR} (HTTP/2)": neighbour,
            **{name: _version(name) for name in _PACKAGES},
        },
        device=_device(),
    )


def print_text(report: Report) -> None:
    """Print a report for people."""
    print(report.verdict)
    print()
    print(f"hyperframe/__init__.py  {report.init_file or 'none'}")
    print(f"  belongs to            {report.init_owner or 'nobody'}")
    failures = {name: found for name, found in report.submodules.items() if found != "ok"}
    working = len(report.submodules) - len(failures)
    print(f"submodules              {working} work, {len(failures)} fail")
    for name, found in failures.items():
        print(f"  {name}: {found}")
    for name in report.missing_files:
        print(f"  missing file: {name}")
    for name, version in report.versions.items():
        print(f"{name:<23} {version or 'not installed'}")
    print(f"{'device':<23} {report.device}")
    for note in report.notes:
        print(f"note: {note}")
    if report.repair:
        print()
        print("to repair:")
        for step in report.repair:
            print(f"  {step}")


def print_json(report: Report) -> None:
    """Print a report as one JSON object, its keys the attributes of `Report`."""
    print(json.dumps(dataclasses.asdict(report), indent=2))


def _folders() -> list[str]:
    found: dict[str, None] = {}
    for entry in sys.path:
        folder = Path(entry or ".").resolve() / "hyperframe"
        if folder.is_dir():
            found[str(folder)] = None
    return list(found)


def _init_file() -> Path | None:
    # for a top-level name find_spec looks and does not import
    try:
        spec = importlib.util.find_spec("hyperframe")
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin)


def _owner(init: Path) -> str:
    """The distribution that wrote `init`: by our sentinel, then by the hashes of pip's records."""
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


def _try_import(name: str) -> str:
    try:
        importlib.import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def _missing_files(name: str) -> list[str]:
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


def _broken(
    failures: dict[str, str], missing: list[str], folders: list[str]
) -> tuple[str, list[str]]:
    if missing:
        return (
            f"broken: {len(missing)} files of {_DISTRIBUTION} are missing, {missing[0]} for one",
            [_REPAIR],
        )
    first = next(iter(failures))
    verdict = f"broken: {first} cannot be imported ({failures[first]})"
    ours = [folder for folder in folders if (Path(folder) / "attention.py").exists()]
    if ours and ours[0] != folders[0]:
        # an editable install, or two site folders: the folder that comes first hides the other
        return (
            f"{verdict}; {folders[0]} comes first on the import path and hides {ours[0]}",
            [
                f"pip uninstall {_NEIGHBOUR}, if nothing needs the HTTP/2 library here",
                f"or, instead of an editable install, a wheel into the same folder: {_REPAIR}",
            ],
        )
    lost = failures[first].startswith("ModuleNotFoundError") and "hyperframe" not in failures[first]
    if lost:
        # one of our dependencies is not there
        return verdict, [f"pip install {_DISTRIBUTION}"]
    return verdict, [_REPAIR]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device() -> str:
    try:
        torch: Any = importlib.import_module("torch")
        if not torch.cuda.is_available():
            cuda = torch.version.cuda
            return f"no GPU (torch is {'a CPU build' if cuda is None else f'built for {cuda}'})"
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"
