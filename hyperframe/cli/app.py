"""The program: its commands, each in a module of its own, which parse, call the library, print."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from ..benchmarking.memory import out_of_memory
from ..errors import HyperframeError
from . import EXIT_CODES
from .bench import EXAMPLES as BENCH_EXAMPLES
from .bench import bench
from .capture import EXAMPLES as CAPTURE_EXAMPLES
from .capture import capture
from .codes import ExitCode
from .components import EXAMPLES as COMPONENTS_EXAMPLES
from .components import components
from .eval import EXAMPLES as EVAL_EXAMPLES
from .eval import evaluate
from .frontier import EXAMPLES as FRONTIER_EXAMPLES
from .frontier import frontier
from .new import EXAMPLES as NEW_EXAMPLES
from .new import new
from .report import EXAMPLES as REPORT_EXAMPLES
from .report import report
from .tune import EXAMPLES as TUNE_EXAMPLES
from .tune import tune

__all__ = ["app", "run"]

_CODES = "; ".join(f"{code}: {meaning}" for code, meaning in EXIT_CODES.items())


class _Commands(TyperGroup):
    """The commands, each of which Ctrl-C ends with one line and one code in every typer version."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # commands that keep something have caught it themselves
            typer.echo("interrupted", err=True)
            raise typer.Exit(ExitCode.INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


@app.callback()
def _hyperframe() -> None:
    """Near-linear attention with pluggable heavy-entry detectors."""


app.command(epilog=f"{BENCH_EXAMPLES}\n\nExit codes: {_CODES}.")(bench)
app.command(epilog=f"{FRONTIER_EXAMPLES}\n\nExit codes: {_CODES}.")(frontier)
app.command(epilog=f"{COMPONENTS_EXAMPLES}\n\nExit codes: {_CODES}.")(components)
app.command(epilog=f"{NEW_EXAMPLES}\n\nExit codes: {_CODES}.")(new)
app.command(epilog=f"{CAPTURE_EXAMPLES}\n\nExit codes: {_CODES}.")(capture)
app.command(epilog=f"{REPORT_EXAMPLES}\n\nExit codes: {_CODES}.")(report)
app.command("eval", epilog=f"{EVAL_EXAMPLES}\n\nExit codes: {_CODES}.")(evaluate)
app.command(epilog=f"{TUNE_EXAMPLES}\n\nExit codes: {_CODES}.")(tune)


def run(arguments: list[str] | None) -> int:
    """Run the program on a list of arguments (None: the process's) and return its exit code."""
    try:
        app(args=arguments, prog_name="hyperframe")
    except SystemExit as end:
        return int(end.code or ExitCode.DONE)
    except HyperframeError as error:
        said = str(error)
    except OSError as error:  # a full disk, a folder that vanished
        where = "" if error.filename is None else f"{error.filename}: "
        said = f"{where}{error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        full = out_of_memory(error)
        if full is None:
            raise
        said = f"out of memory: {full}; ask for a shorter --length, or --dtype bfloat16"
    else:
        return int(ExitCode.DONE)
    typer.echo(f"hyperframe: {said}", err=True)
    return int(ExitCode.FAILED)
