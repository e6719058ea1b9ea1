"""`python -m hyperframe_attention doctor`: what is installed, and how to repair it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ._doctor import EXIT_CODES, examine, print_json, print_text


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the command and return its exit code.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        For `doctor`: 0 healthy, 1 clash found, 2 broken.
    """
    parser = argparse.ArgumentParser(prog="python -m hyperframe_attention", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    codes = "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())
    doctor = commands.add_parser(
        "doctor",
        help="say which package owns hyperframe/__init__.py and how to repair a clash",
        description="Say which package owns hyperframe/__init__.py, whether our submodules are "
        "intact, which versions are installed, and how to repair what is wrong.",
        epilog=f"exit codes: {codes}",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args(argv)

    report = examine()
    if options.json:
        print_json(report)
    else:
        print_text(report)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
