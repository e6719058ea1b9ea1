"""What a task asks of every run, and what it finds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .model import LanguageModel
from .settings import Run

__all__ = ["Found", "Problem", "digest_of"]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was measured of one run.

    Attributes:
        value: the number, in the unit of the problem's quantity.
        standard_error: of it, or None.
        blocks: means of blocks, see `hyperframe.evaluation.blocks`; None without.
        exact: the value of exact attention, where it was measured together with this one.
        details: what else is known, in values of JSON.
    """

    value: float
    standard_error: float | None = None
    blocks: Sequence[float] | None = None
    exact: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question to a model, answered by exact attention and by every run.

    Attributes:
        task: a key of rows, see `EVAL_KEYS`, as are the next ones.
        quantity: what the value is.
        n: tokens.
        digest: of all that the answer depends on beside the model and the run.
        measure: answers it.
        input: name of the file, or None.
        depth: of the passkey.
        example: of a task file.
    """

    task: str
    quantity: str
    n: int
    digest: str
    measure: Callable[[LanguageModel, Run], Found]
    input: str | None = None
    depth: float | None = None
    example: str | None = None

    @property
    def label(self) -> str:
        """Words for a progress bar."""
        parts = [self.task, f"n = {self.n:,}", self.input, self.example]
        if self.depth is not None:
            parts.append(f"depth {self.depth:g}")
        return ", ".join(part for part in parts if part is not None)


def digest_of(*parts: object) -> str:
    """Return 12 digits of SHA-256 of some values, bytes as they are and others by their repr."""
    found = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else repr(part).encode()
        found.update(len(content).to_bytes(8, "big") + content)
    return found.hexdigest()[:12]
