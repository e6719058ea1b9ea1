"""The exit codes of all commands, and what they mean."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["EXIT_CODES", "ExitCode"]


class ExitCode(IntEnum):
    """What a command ends with; the same numbers mean the same everywhere.

    Example:
        >>> ExitCode.GATE_FAILED.value, ExitCode(130).meaning
        (3, 'interrupted; what was measured is kept')
    """

    DONE = 0
    FAILED = 1
    USAGE = 2
    GATE_FAILED = 3
    INTERRUPTED = 130

    @property
    def meaning(self) -> str:
        """What it says, in words."""
        return _MEANINGS[self]


_MEANINGS = {
    ExitCode.DONE: "done",
    ExitCode.FAILED: "could not run; the message says why",
    ExitCode.USAGE: "the command line does not parse",
    ExitCode.GATE_FAILED: "measured, and a gate failed: no speed-up is reported there",
    ExitCode.INTERRUPTED: "interrupted; what was measured is kept",
}

EXIT_CODES: dict[int, str] = {code.value: code.meaning for code in ExitCode}
"""Code -> meaning."""
