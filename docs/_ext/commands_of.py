"""The directives `commands` and `exit-codes`: what `--help` says, from the program itself."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def commands() -> dict[str, Any]:
    """Return the commands of the program by their names, as click has them, `doctor` left out."""
    import typer

    from hyperframe.cli.app import app

    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def exit_codes() -> dict[int, str]:
    """Return what the exit codes mean."""
    from hyperframe.cli import EXIT_CODES

    return EXIT_CODES


def described(name: str, command: Any) -> list[str]:
    """Return the lines of one command's section, in MyST's Markdown."""
    shown = [p for p in command.params if not getattr(p, "hidden", False)]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    usage = " ".join([f"hyperframe {name}", *map(_argument, arguments), "[OPTIONS]"])
    lines = [f"### hyperframe {name}", "", *_help(command.help or ""), "", f"    {usage}", ""]
    for parameter in shown:
        title = _argument(parameter) if parameter in arguments else _option(parameter)
        lines += [f"`{title}`", f": {_escaped(_about(parameter))}", ""]
    # examples, and the exit codes, which are the same for all commands
    for paragraph in (command.epilog or "").split("\n\n"):
        text = " ".join(paragraph.split())
        if text.startswith("hyperframe "):
            lines += [f"    {text}"]
        elif not text.startswith("Exit codes:"):
            lines += [_escaped(text), ""]
    return [*lines, ""]


def _help(text: str) -> list[str]:
    return [_escaped(line) for line in inspect.cleandoc(text).splitlines()]


def _argument(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name or "").upper()
    name = f"{name}..." if parameter.nargs == -1 else name
    return name if parameter.required else f"[{name}]"


def _option(parameter: Any) -> str:
    names = ", ".join(parameter.opts)
    if parameter.secondary_opts:
        names += " / " + ", ".join(parameter.secondary_opts)
    return names if parameter.is_flag else f"{names} {parameter.metavar or _kind(parameter)}"


def _kind(parameter: Any) -> str:
    # click has types; newer versions of typer have annotations
    found = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    if found is None:
        return str(parameter.type.name).upper()
    found = next(iter(typing.get_args(found)), found)
    words = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "FILE"}
    return words.get(found, "VALUE")


def _about(parameter: Any) -> str:
    text = " ".join((getattr(parameter, "help", "") or "").split())
    default = parameter.default
    is_value = isinstance(default, str | int | float) and not isinstance(default, bool)
    if parameter.required or not is_value or default == "":
        return text
    return f"{text} Default: {default}."


def _escaped(text: str) -> str:
    # the double hyphen of an option would become a dash
    text = re.sub(r"(?<![\w`])--[a-z][a-z-]*", r"`\g<0>`", text)
    return re.sub(r"[\\*|<>\[\]{}]", r"\\\g<0>", text)


class Commands(SphinxDirective):
    """Sections for all commands of the program, and the options of each."""

    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for name, command in commands().items():
            lines += described(name, command)
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


class ExitCodes(SphinxDirective):
    """A list of the exit codes of all commands."""

    def run(self) -> list[nodes.Node]:
        lines = [f"- `{code}`: {_escaped(meaning)}" for code, meaning in exit_codes().items()]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("commands", Commands)
    app.add_directive("exit-codes", ExitCodes)
    return {"parallel_read_safe": True}
