"""Texts from files: windows of tokens that losses are measured on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArgumentError
from .model import LanguageModel

__all__ = ["Text", "read_documents", "read_text"]

_GENEROUS = 12  # letters of a token; a text of which that is not enough is read to its end


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """The tokens of a file.

    Attributes:
        name: of the file.
        content: its bytes.
        documents: tokens of each document.
    """

    name: str
    content: bytes
    documents: Sequence[Sequence[int]]

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(map(len, self.documents), default=0)

    def windows(self, length: int, count: int) -> list[Tensor]:
        """Return pieces of the documents, one after the other, that do not overlap.

        Args:
            length: tokens of each.
            count: how many.

        Raises:
            ArgumentError: there are not that many.
        """
        found = [
            torch.tensor(document[start : start + length])
            for document in self.documents
            for start in range(0, len(document) - length + 1, length)
        ][:count]
        if len(found) < count:
            if not found:
                raise ArgumentError(
                    f"--text {self.name}: has {self.longest:,} tokens"
                    f"{' in its longest document' if len(self.documents) > 1 else ''}, fewer than "
                    f"--length {length}; pass a longer text, or ask for at most {self.longest}"
                )
            raise ArgumentError(
                f"--text {self.name}: has {len(found)} windows of {length:,} tokens, not {count}; "
                f"pass a longer text, or --windows {len(found)}"
            )
        return found


def read_text(path: Path | str, model: LanguageModel, *, enough: int) -> Text:
    """Read and tokenize a file.

    Args:
        path: the file, see `read_documents`.
        model: whose tokens are asked for.
        enough: tokens after which the rest need not be read.

    Raises:
        ArgumentError: it cannot be read, or holds no text.
    """
    path = Path(path)
    content = _bytes(path)
    documents = []
    for document in read_documents(path, content):
        tokens = model.tokens(document[: _GENEROUS * enough], starts=True)
        # the last token of a cut text may be half a word
        if len(tokens) < enough + 8 and len(document) > _GENEROUS * enough:
            tokens = model.tokens(document, starts=True)
        documents.append(tokens)
        if sum(map(len, documents)) > 4 * enough and max(map(len, documents)) >= enough:
            break
    if not any(len(document) > 1 for document in documents):  # nothing could be predicted
        raise ArgumentError(f"--text {path}: has no text in it, or one token; name another file")
    return Text(name=path.name, content=content, documents=documents)


def read_documents(path: Path, content: bytes) -> Iterator[str]:
    """Yield the documents of a file.

    Args:
        path: its name; one that ends in `.jsonl` or `.json` holds JSON lines, in each a document
            under "text". Any other is one document.
        content: its bytes.

    Raises:
        ArgumentError: it is not UTF-8, or a line holds no text.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"--text {path}: is not UTF-8 ({error.reason} at byte {error.start}); convert it"
        ) from error
    if path.suffix not in (".jsonl", ".json"):
        yield text
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or not isinstance(found.get("text"), str):
            raise ArgumentError(
                f'--text {path}: line {number} is no JSON object with a field "text", '
                f"{line[:40]!r}; write one document a line, or name a plain text .txt"
            )
        yield found["text"]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArgumentError(
            f"--text {path}: cannot be read ({error.strerror}); name a text file"
        ) from error
