"""The program `hyperframe`, also `python -m hyperframe_attention`.

hyperframe doctor     # what is installed, and how to repair it; needs no other package
hyperframe bench      # times and errors beside the exact kernels; needs the extra `cli`
hyperframe frontier   # detectors x budgets on captured heads; needs the extra `cli`
hyperframe capture    # the heads of a model, into a file; needs the extras `cli` and `hf`
hyperframe report     # pictures of what approximations do to them; needs `cli`, `hf`, `plot`
hyperframe components # what is registered, plug-ins included; needs the extra `cli`
hyperframe new        # writes a package with a component of one's own; needs the extra `cli`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ._doctor import EXIT_CODES, examine, print_json, print_text

_FORWARDED = ("bench", "frontier", "capture", "report", "components", "new")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the command and return its exit code.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        For `doctor`: 0 healthy, 1 clash found, 2 broken. For the others: see `hyperframe.cli`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] and arguments[0] in _FORWARDED:
        return _forward(arguments)
    is_script = Path(sys.argv[0]).stem == "hyperframe"
    parser = argparse.ArgumentParser(
        prog="hyperframe" if is_script else "python -m hyperframe_attention",
        description="Near-linear attention: what is installed, how fast and how good it is.",
    )
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
    commands.add_parser(
        "bench", add_help=False, help="time attention beside the exact kernels, with its errors"
    )
    commands.add_parser(
        "frontier", add_help=False,
        help="measure error against cost of every detector on captured heads",
    )  # fmt: skip
    commands.add_parser(
        "capture", add_help=False, help="write queries, keys and values of a model to a file"
    )
    commands.add_parser(
        "report", add_help=False, help="draw masks, alpha and errors of captured heads"
    )
    commands.add_parser(
        "components", add_help=False, help="list what is registered, plug-ins included"
    )
    commands.add_parser(
        "new", add_help=False, help="write a package with a detector, sampler or estimator"
    )
    options = parser.parse_args(arguments)

    report = examine()
    if options.json:
        print_json(report)
    else:
        print_text(report)
    return report.exit_code


def _forward(arguments: list[str]) -> int:
    """Run a command of `hyperframe.cli`, which may be hidden by another package's folder."""
    try:
        from hyperframe.cli import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("hyperframe", "hyperframe.cli"):
            raise
        print(
            f"hyperframe.cli cannot be imported ({error}); `python -m hyperframe_attention doctor` "
            "says what is wrong and how to repair it",
            file=sys.stderr,
        )
        return 1
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
