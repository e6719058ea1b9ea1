"""The Reed-Solomon code whose symbols are the cells of a row, layer by layer, and its decoding.

The symbols of a word are elements of GF(8), numbers from 0 to 7 whose sum is the exclusive or. All
maps between messages, words and syndromes are linear in their bits, so each is a table of what
every symbol contributes, and numbers are added up by exclusive ors.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..errors import ArgumentError

__all__ = ["FEWEST", "SYMBOL_BITS", "CellCode", "CodeTables"]

SYMBOL_BITS = 3
LENGTH = 1 << SYMBOL_BITS
FEWEST = 4
"""Symbols of a message, at least: with fewer the table of corrections would not fit a cache."""

_MOST = LENGTH - 2
_POLYNOMIAL = 0b1011


def _times(a: int, b: int) -> int:
    """Return the product in GF(8)."""
    found = 0
    while b:
        if b & 1:
            found ^= a
        a <<= 1
        if a & LENGTH:
            a ^= _POLYNOMIAL
        b >>= 1
    return found


def _power(a: int, exponent: int) -> int:
    return functools.reduce(_times, [a] * exponent, 1)


class CodeTables(NamedTuple):
    """What decodes words.

    Attributes:
        contribution: int64 `[8, 256]`: what a set of cells of a layer adds to a word's message (low
            32 bits) and syndrome (above). Sets other than one cell add nothing: they are missing.
        correction: int32 `[256 << 3 radius]`, for the missing layers (a bit each, above) and the
            syndrome: what to add to the message; -1 where no word is near.
    """

    contribution: torch.Tensor
    correction: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class CellCode:
    """The code of length 8 over GF(8): a polynomial of low degree, read at all elements.

    The constant term enters all symbols alike: eight messages in a row that differ in it alone lie
    in eight different cells of every layer, so that cells are filled alike. Two words agree in less
    than `message` places: no two rows of a bucket meet in more layers.

    Words are decoded by one look at a table: of the syndrome, which depends on what is wrong alone,
    and of which symbols are missing. `e` wrong and `s` missing ones are put right whenever
    `2 e + s <= 8 - message`.

    Args:
        message: symbols of a message, 4 to 6: up to 4096, 32,768 or 262,144 messages.

    Source: Reed and Solomon (1960), extended by the point 0; decoding by a standard array.

    Example:
        >>> code = CellCode(message=4)
        >>> code.radius, code.num_words, code.cells(16)[8:10].tolist()
        (4, 4096, [[0, 1, 2, 3, 4, 5, 6, 7], [1, 0, 3, 2, 5, 4, 7, 6]])
    """

    message: int

    def __post_init__(self) -> None:
        """Check the parameter."""
        if not FEWEST <= self.message <= _MOST:
            raise ArgumentError(
                f"cell_code: message={self.message!r} cannot be used; pass {FEWEST} to {_MOST}"
            )

    @classmethod
    def of(cls, num_words: int) -> CellCode:
        """Return the code with the fewest symbols that has so many words."""
        symbols = -(-max(1, num_words - 1).bit_length() // SYMBOL_BITS)
        return cls(message=max(FEWEST, symbols))

    @property
    def radius(self) -> int:
        """What `2 * wrong + missing` may be at most."""
        return LENGTH - self.message

    @property
    def num_words(self) -> int:
        """How many messages there are."""
        return 1 << (SYMBOL_BITS * self.message)

    def cells(self, count: int) -> np.ndarray:
        """Return the words of the first messages: int64 `[count, 8]`."""
        message = np.arange(count)
        found = np.zeros((count, LENGTH), dtype=np.int64)
        for symbol, bit in itertools.product(range(self.message), range(SYMBOL_BITS)):
            is_set = (message >> (SYMBOL_BITS * symbol + bit)) & 1
            for point in range(LENGTH):
                found[:, point] ^= is_set * _times(1 << bit, _power(point, symbol))
        return found

    def words(self, count: int, device: torch.device) -> torch.Tensor:
        """Return the words of the first messages as numbers, 3 bits a layer: int32 `[count]`."""
        return _words(self, count, device)

    def tables(self, device: torch.device) -> CodeTables:
        """Return what decodes words; made once for a device."""
        return _device_tables(self, device)

    def decode(self, sets: torch.Tensor) -> torch.Tensor:
        """Return the messages of words.

        Args:
            sets: int64, of any shape: byte `k` is the set of cells that symbol `k` may be; it is
                missing unless there is just one.

        Returns:
            int64, the same shape, -1 where no word is near.
        """
        tables = self.tables(sets.device)
        total, missing = torch.zeros_like(sets), torch.zeros_like(sets)
        for layer in range(LENGTH):
            cells = (sets >> (LENGTH * layer)) & 255
            total ^= tables.contribution[layer][cells]
            missing |= ((cells & (cells - 1) != 0) | (cells == 0)).long() << layer
        entry = tables.correction[(missing << (SYMBOL_BITS * self.radius)) | (total >> 32)].long()
        return torch.where(entry >= 0, (total & 0xFFFFFFFF) ^ entry, -1)


@functools.lru_cache(maxsize=32)
def _words(code: CellCode, count: int, device: torch.device) -> torch.Tensor:
    shift = SYMBOL_BITS * np.arange(LENGTH)
    return torch.from_numpy((code.cells(count) << shift).sum(axis=1).astype(np.int32)).to(device)


@functools.lru_cache(maxsize=32)
def _device_tables(code: CellCode, device: torch.device) -> CodeTables:
    """Kept: a copy to a GPU would wait for it."""
    contribution, correction = _tables(code)
    return CodeTables(
        contribution=torch.from_numpy(contribution).to(device),
        correction=torch.from_numpy(correction).to(device),
    )


@functools.cache
def _tables(code: CellCode) -> tuple[np.ndarray, np.ndarray]:
    symbol = np.zeros((LENGTH, LENGTH), dtype=np.int64)  # what a symbol adds: [layer, value]
    inverse = _inverse([[_power(x, s) for s in range(code.message)] for x in range(code.message)])
    for layer, value in itertools.product(range(LENGTH), range(LENGTH)):
        message = 0
        if layer < code.message:
            for place in range(code.message):
                message |= _times(inverse[place][layer], value) << (SYMBOL_BITS * place)
        syndrome = 0
        for power in range(code.radius):
            # the multipliers of the dual code are all 1: the nonzero elements' product is
            syndrome |= _times(value, _power(layer, power)) << (SYMBOL_BITS * power)
        symbol[layer, value] = syndrome << 32 | message
    contribution = np.zeros((LENGTH, 256), dtype=np.int64)
    contribution[:, 1 << np.arange(LENGTH)] = symbol
    bits = SYMBOL_BITS * code.radius
    correction = np.full(1 << (LENGTH + bits), -1, dtype=np.int32)
    for missing in range(1 << LENGTH):
        absent = [k for k in range(LENGTH) if missing >> k & 1]
        present = [k for k in range(LENGTH) if not missing >> k & 1]
        for wrong in range(max(0, code.radius - len(absent)) // 2 + 1):
            if len(absent) > code.radius:
                break
            for errors in itertools.combinations(present, wrong):
                total = np.zeros(1, dtype=np.int64)
                for layer in absent:
                    total = (total[:, None] ^ symbol[layer]).ravel()
                for layer in errors:
                    total = (total[:, None] ^ symbol[layer, 1:]).ravel()
                correction[(missing << bits) | (total >> 32)] = total & 0xFFFFFFFF
    return contribution, correction


def _inverse(matrix: list[list[int]]) -> list[list[int]]:
    """Return the inverse of a square matrix over GF(8), by Gauss and Jordan."""
    size = len(matrix)
    rows = [row + [int(i == j) for j in range(size)] for i, row in enumerate(matrix)]
    for column in range(size):
        pivot = next(i for i in range(column, size) if rows[i][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        factor = next(x for x in range(LENGTH) if _times(x, rows[column][column]) == 1)
        rows[column] = [_times(factor, x) for x in rows[column]]
        for i in range(size):
            if i != column and rows[i][column]:
                scale = rows[i][column]
                pairs = zip(rows[i], rows[column], strict=True)
                rows[i] = [x ^ _times(scale, y) for x, y in pairs]
    return [row[size:] for row in rows]
