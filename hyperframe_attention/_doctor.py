"""The examination behind `hyperframe doctor`, also `python -m hyperframe_attention doctor`.

Three states: healthy; clash (another package owns `hyperframe/__init__.py`: `hyperframe_attention`
works, `import hyperframe` gives somebody else's module); broken (our submodules cannot be imported,
a backend that should run does not, or a plug-in does not load).

Needs no other package than torch and ours, and says so where one of those is missing.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from . import _DISTRIBUTION, _HOMES
from ._installation import (
    NEIGHBOUR,
    REPAIR,
    folders,
    init_file,
    missing_files,
    owner_of,
    try_import,
    what_is_broken,
)
from ._machine import CORE, extras, gpus, old_ones, plugins, try_backends, version, versions

__all__ = ["EXIT_CODES", "Report", "examine", "print_json", "print_text"]

# those of hyperframe.cli, which cannot be imported where the installation is broken
EXIT_CODES = {
    0: "done: healthy",
    1: "found a clash or something broken; the message says what",
    2: "the command line does not parse",
    130: "interrupted",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What the examination found.

    Attributes:
        exit_code: 0 healthy, 1 otherwise.
        status: "healthy", "clash" or "broken".
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
        gpus: all of them, each with `name`, `capability`, `memory_gib`, `driver`, `cuda`.
        backends: what came of a run of each; see `try_backends`.
        extras: of our distribution, with what each lacks and the line that installs it.
        plugins: every one that is installed, with its `status` and `reason`.
    """

    exit_code: int
    status: str
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
    gpus: list[dict[str, Any]]
    backends: list[dict[str, Any]]
    extras: list[dict[str, Any]]
    plugins: list[dict[str, Any]]


def examine() -> Report:
    """Examine the installation that this interpreter sees.

    Returns:
        The report. Imports torch, the submodules of `hyperframe` and every plug-in, and attends to
        64 tokens with each backend; takes seconds.
    """
    found = folders()
    init = init_file()
    owner = owner_of(init) if init is not None else None
    submodules = {name: try_import(name) for name in sorted(set(_HOMES.values()))}
    failures = {name: said for name, said in submodules.items() if said != "ok"}
    missing = missing_files(_DISTRIBUTION)
    neighbour = version(NEIGHBOUR)
    device, gpu_list = gpus()
    backends = [] if failures else try_backends()
    plugin_list = [] if failures else plugins()

    repair: list[str] = []
    notes = [f"{old}: older than anything known to work" for old in old_ones(CORE)]
    status = "healthy"
    verdict = f"healthy: {_DISTRIBUTION} owns hyperframe/__init__.py and its submodules work"
    if failures or missing:
        status = "broken"
        verdict, repair = what_is_broken(failures, missing, found)
    elif owner != _DISTRIBUTION:
        status = "clash"
        whose = (
            "hyperframe/ has no __init__.py (uninstalling the other package takes it away)"
            if init is None
            else f"hyperframe/__init__.py belongs to {owner}"
        )
        verdict = (
            f"clash: {whose}; `import hyperframe` does not give this library's API, "
            "`import hyperframe_attention` does"
        )
        repair = [REPAIR]
    if wrong := _wrong(backends, plugin_list):
        if status == "healthy":
            status, verdict = "broken", f"broken: {wrong[0][0]}"
        repair += dict.fromkeys(remedy for _, remedy in wrong)

    if neighbour is not None:
        notes.append(
            f"the HTTP/2 library hyperframe {neighbour} is installed too; its submodules "
            "(hyperframe.frame, ...) work beside ours in either order"
        )
        gone = missing_files(NEIGHBOUR)
        if gone:
            notes.append(f"files of the HTTP/2 library are missing: {', '.join(gone)}")
    if init is not None and not (init.parent / "py.typed").exists():
        notes.append("hyperframe/py.typed is missing: type checkers will not see our types")
    if len(found) > 1:
        notes.append(f"more than one folder hyperframe/ on the import path: {', '.join(found)}")

    ours = {_DISTRIBUTION: version(_DISTRIBUTION), f"{NEIGHBOUR} (HTTP/2)": neighbour}
    return Report(
        exit_code=0 if status == "healthy" else 1, status=status, verdict=verdict,
        init_file=None if init is None else str(init), init_owner=owner, folders=found,
        submodules=submodules, missing_files=missing, repair=repair, notes=notes,
        versions={**ours, **versions()}, device=device, gpus=gpu_list, backends=backends,
        extras=extras(), plugins=plugin_list,
    )  # fmt: skip


def _wrong(
    backends: list[dict[str, Any]], plugin_list: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    """Return what is broken beside the installation itself, each with what to do."""
    found = []
    for row in backends:
        if row["status"] == "broken":
            name = row["backend"]
            what = f"the backend {name} does not work on {row['device']} ({row['reason']})"
            report = "report it with the output of `hyperframe doctor --json`"
            found.append((what, f"pass another backend than {name!r}, and {report}"))
    for row in plugin_list:
        if row["status"] != "ok":
            what = f"the {row['kind']} {row['name']} of {_owner(row)} is {row['status']}"
            repair = f"repair or uninstall {row['distribution']}; everything else keeps working"
            found.append((f"{what} ({row['reason']})", repair))
    return found


def _owner(row: dict[str, Any]) -> str:
    return f"{row['distribution']} {row['version'] or ''}".strip()


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
    for name, found_version in report.versions.items():
        print(f"{name:<23} {found_version or 'not installed'}")
    print(f"{'device':<23} {report.device}")
    for row in report.backends:
        said = row["reason"] or f"off the reference by {row['error']:.1g}"
        print(f"{'backend ' + row['backend']:<23} {row['status']} on {row['device']}: {said}")
    print(f"{'plug-ins':<23} {len(report.plugins)} installed")
    for row in report.plugins:
        if row["status"] != "ok":
            who = f"{row['kind']} {row['name']} of {_owner(row)}"
            print(f"  {who}: {row['status']}: {row['reason']}")
    lacking = [row for row in report.extras if row["install"] is not None]
    print(f"{'extras':<23} {len(report.extras) - len(lacking)} of {len(report.extras)} complete")
    for row in lacking:
        what = ", ".join([*row["missing"], *row["too_old"]])
        print(f"  {row['extra']} ({row['for']}): lacks {what}: {row['install']}")
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
