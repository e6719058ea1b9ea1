"""The command line: `hyperframe bench` and others, or `python -m hyperframe_attention`.

One module for each command, joined in `app`; `codes` has the exit codes, the same for all of them.
With `--json` a command prints one JSON document on stdout and nothing else there; whatever is for
people (bars, messages, errors) is on stderr. Ctrl-C ends a command with code 130, and keeps what it
measured: rows go into an `--out` file one whole line at a time.

Needs typer and rich (the extra `cli`), which are imported when a command is given.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .codes import EXIT_CODES, ExitCode

__all__ = ["EXIT_CODES", "ExitCode", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        arguments: what follows the program's name; None takes those of the process.

    Returns:
        A key of `EXIT_CODES`.
    """
    try:
        import rich as rich
        import typer as typer
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        print(
            f"hyperframe: the command line needs {error.name}, which is not installed; "
            "pip install 'hyperframe-attention[cli]'",
            file=sys.stderr,
        )
        return int(ExitCode.FAILED)
    try:
        from .app import run

        return run(None if arguments is None else list(arguments))
    except KeyboardInterrupt:  # while torch and the commands are imported
        print("interrupted", file=sys.stderr)
        return int(ExitCode.INTERRUPTED)
