"""The command `hyperframe components`: what is registered, who offers it, and what it can do."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Optional

import typer

from .. import detectors, estimators, samplers
from ..component import AbstractComponent, check_choice
from ..registry import Registry, RegistryEntry
from ..spec import ParsedSpec
from .output import echo_json

__all__ = ["EXAMPLES", "KINDS", "component_rows", "components"]

KINDS: dict[str, Registry[Any]] = {
    "detector": detectors.registry, "sampler": samplers.registry, "estimator": estimators.registry,
}  # fmt: skip

EXAMPLES = """Examples:

hyperframe components --kind sampler

hyperframe components --json | jq '.[] | select(.status != "ok")'"""

# methods that a class may have a form of its own of, and what it can do then
_FORMS = {
    "find_strict": "strict", "find_rectangle": "rectangles", "find_levels": "levels",
    "prefix_density": "prefixes", "sample_prefixes": "prefixes", "rule": "rule",
}  # fmt: skip


# Optional[...] and not `| None`: typer reads these annotations on Python 3.10 too
def components(
    kind: Annotated[Optional[list[str]], typer.Option(  # noqa: UP045
        help=f"Only these, may be repeated: {', '.join(KINDS)}.")] = None,
    as_json: Annotated[bool, typer.Option(
        "--json", help="Print a JSON array instead of text.")] = False,
) -> None:  # fmt: skip
    """List detectors, samplers and estimators, those of plug-ins included.

    Every plug-in is imported to see whether it works. One that does not is listed with the reason;
    the others are not affected.
    """
    for each in kind or ():
        check_choice("components", "kind", each, tuple(KINDS))
    rows = [row for each in kind or KINDS for row in component_rows(KINDS[each])]
    if as_json:
        echo_json(rows)
        return
    for each in dict.fromkeys(row["kind"] for row in rows):
        usable = [row for row in rows if (row["kind"], row["status"]) == (each, "ok")]
        typer.echo(f"{each}s: {len(usable)}\n")
        for row in usable:
            typer.echo(_text(row))
    unusable = [row for row in rows if row["status"] != "ok"]
    if unusable:
        typer.echo(f"not usable: {len(unusable)}\n")
    for row in unusable:
        typer.echo(
            f"  {row['kind']} {row['name']} = {row['target']}, from {_owner(row)}\n"
            f"      {row['status']}: {row['reason']}\n"
        )


def component_rows(registry: Registry[Any]) -> list[dict[str, Any]]:
    """Return a row for everything that a registry knows, usable or not; raises nothing.

    Returns:
        Of each: `name`, `kind`, `origin`, `status` ("ok", "broken", "duplicate"), `reason`,
        `target`, `distribution`, `version`; and of those that are ok `summary`, `parameters`
        (name -> default, None where it has none), `default_spec` (None where a parameter has no
        default) and `capabilities`: what the class declares, and the forms that it has of its own.
    """
    return [_row(registry, entry) for entry in registry.entries(load=True)]


def _row(registry: Registry[Any], entry: RegistryEntry) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": entry.name, "kind": entry.kind, "origin": entry.origin, "status": entry.status,
        "reason": entry.reason, "target": entry.target, "distribution": entry.distribution,
        "version": entry.version, "summary": "", "parameters": {}, "default_spec": None,
        "capabilities": {},
    }  # fmt: skip
    if entry.status != "ok":
        return row
    try:
        row.update(_described(registry, entry.name))
    except Exception as error:  # whatever a plug-in does, the others are listed
        row.update(status="broken", reason=f"{type(error).__name__}: {error}")
    return row


def _described(registry: Registry[Any], name: str) -> dict[str, Any]:
    cls = registry.get(name)
    lacking = [
        parameter.name for parameter in inspect.signature(cls).parameters.values()
        if parameter.default is parameter.empty
    ]  # fmt: skip
    default = None if lacking else cls()
    parameters = {
        key: None if default is None else _plain(getattr(default, key)) for key in cls.parameters()
    }
    spec = None if default is None else str(ParsedSpec(name, parameters))
    summary = (inspect.getdoc(cls) or "").partition("\n")[0]
    capabilities = _capabilities(cls, default)
    return {
        "summary": summary, "parameters": parameters, "default_spec": spec,
        "capabilities": capabilities,
    }  # fmt: skip


def _capabilities(cls: type[Any], default: Any) -> dict[str, Any]:
    """What the base of its kind lets a class declare, and the forms that it has of its own."""
    base = next(c for c in reversed(cls.__mro__) if "kind" in vars(c))
    found: dict[str, Any] = {}
    for name, annotation in inspect.get_annotations(base).items():
        value = _plain(getattr(cls, name, None))
        is_simple = value is None or isinstance(value, (bool, int, float, str, tuple))
        if str(annotation).startswith("ClassVar") and name != "kind" and is_simple:
            found[name] = value
    for method, form in _FORMS.items():
        if hasattr(base, method):
            own = getattr(cls, method) is not getattr(base, method)
            found[form] = found.get(form, False) or own
    if "strict" in found:
        found["strict"] = found["strict"] or cls.is_row_local
    if hasattr(base, "columns"):
        found["columns"] = None if default is None else _plain(default.columns)
    return found


def _plain(value: Any) -> Any:
    """A parameter as spec strings and JSON have it: components by their specs."""
    if isinstance(value, AbstractComponent):
        return KINDS[value.kind].to_spec(value)
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value


def _owner(row: dict[str, Any]) -> str:
    if row["distribution"] is None:
        return "this process"
    return f"{row['distribution']} {row['version'] or ''}".strip()


def _text(row: dict[str, Any]) -> str:
    words = []
    for name, value in row["capabilities"].items():
        if value is True:
            words.append(name)
        elif value:
            joined = ", ".join(value) if isinstance(value, tuple) else value
            words.append(f"{name}: {joined}")
    spec = row["default_spec"] or f"{row['name']}({', '.join(row['parameters'])})"
    lines = [row["summary"], spec, f"[{'; '.join(words)}]"]
    return f"  {row['name']}  ({_owner(row)})\n" + "".join(f"      {x}\n" for x in lines)
