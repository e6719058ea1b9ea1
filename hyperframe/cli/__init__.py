"""The command line: `hyperframe bench` and others, or `python -m hyperframe_attention`.

Needs typer and rich (the extra `cli`), which are imported when a command is given.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["EXIT_CODES", "main"]

EXIT_CODES = {
    0: "done, and every accuracy gate passed",
    1: "could not run; the message says why",
    2: "the command line does not parse",
    3: "measured, and some accuracy gate failed: no speed-up is reported there",
    130: "interrupted; rows that were measured are kept",
}


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
        return 1
    from .app import run

    return run(None if arguments is None else list(arguments))
