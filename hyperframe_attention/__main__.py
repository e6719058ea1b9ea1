"""The program `hyperframe`, also `python -m hyperframe_attention`.

hyperframe doctor     # what is installed, what runs, and how to repair it; needs no extra
hyperframe bench      # times and errors beside the exact kernels; needs the extra `cli`
hyperframe frontier   # detectors x budgets on captured heads; needs the extra `cli`
hyperframe capture    # the heads of a model, into a file; needs the extras `cli` and `hf`
hyperframe report     # pictures of what approximations do to them; needs `cli`, `hf`, `plot`
hyperframe eval       # perplexity with layers replaced; needs the extras `cli` and `hf`
hyperframe tune       # detectors and budgets for each layer of a model; needs `cli` and `hf`
hyperframe components # what is registered, plug-ins included; needs the extra `cli`
hyperframe new        # writes a package with a component of one's own; needs the extra `cli`
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from . import _DISTRIBUTION, _version
from ._doctor import EXIT_CODES, examine, print_json, print_text

EXAMPLES = """Examples:

hyperframe doctor

hyperframe doctor --json"""

# commands of hyperframe.cli, which is imported for them only
_FORWARDED = {
    "bench": "time attention beside the exact kernels, with its errors",
    "frontier": "measure error against cost of every detector on captured heads",
    "capture": "write queries, keys and values of a model to a file",
    "report": "draw masks, alpha and errors of captured heads",
    "eval": "perplexity of a model with layers replaced",
    "tune": "choose detectors and budgets for the layers of a model",
    "components": "list what is registered, plug-ins included",
    "new": "write a package with a detector, sampler or estimator",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the command and return its exit code.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        0 done, 1 could not run or found something broken, 2 the command line does not parse, 130
        interrupted; and 3 where `hyperframe.cli` says so.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] and arguments[0] in _FORWARDED:
            return _forward(arguments)
        return _doctor(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has read enough
        # what is left in the buffer must not be written when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _doctor(arguments: Sequence[str]) -> int:
    """Run the command that needs no other package, or say what commands there are."""
    is_script = Path(sys.argv[0]).stem == "hyperframe"
    program = "hyperframe" if is_script else "python -m hyperframe_attention"
    parser = argparse.ArgumentParser(
        prog=program,
        description="Near-linear attention: what is installed, how fast and how good it is.",
        epilog=f"{program} COMMAND --help says more, with examples and exit codes.",
    )
    parser.add_argument("--version", action="version", version=f"{_DISTRIBUTION} {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    codes = "; ".join(f"{code}: {meaning}" for code, meaning in EXIT_CODES.items())
    doctor = commands.add_parser(
        "doctor",
        help="say what is installed, what runs, and how to repair what does not",
        description=textwrap.fill(
            "Say which package owns hyperframe/__init__.py, whether our submodules are intact, "
            "which versions are installed, which GPU there is, which backends run (64 tokens are "
            "tried with each), which extras are missing and which plug-ins do not load; and how to "
            "repair what is wrong. Changes nothing."
        ),
        epilog=f"{EXAMPLES}\n\n{textwrap.fill(f'Exit codes: {codes}.')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    for name, what in _FORWARDED.items():
        commands.add_parser(name, add_help=False, help=what)
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
