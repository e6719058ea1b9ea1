"""Reed-Solomon codes over small fields: what spreads an index over the layers of a sketch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ..errors import ArgumentError

__all__ = ["ReedSolomon"]

# primitive polynomials of GF(2^bits), lowest bit the constant term
_PRIMITIVE = {2: 0b111, 3: 0b1011, 4: 0b10011, 5: 0b100101, 6: 0b1000011, 7: 0b10001001,
              8: 0b100011101}  # fmt: skip


class _Field:
    """GF(2^bits), elements as ints; addition is exclusive or."""

    def __init__(self, bits: int) -> None:
        self.bits, self.order = bits, (1 << bits) - 1
        self.exp = [1]
        for _ in range(self.order - 1):
            doubled = self.exp[-1] << 1
            self.exp.append(doubled ^ _PRIMITIVE[bits] if doubled >> bits else doubled)
        self.log = {element: power for power, element in enumerate(self.exp)}

    def times(self, a: int, b: int) -> int:
        if a == 0 or b == 0:
            return 0
        return self.exp[(self.log[a] + self.log[b]) % self.order]

    def inverse(self, a: int) -> int:
        """The inverse of `a`; 0 for 0."""
        return self.exp[-self.log[a] % self.order] if a else 0

    def product(self, factors: list[int]) -> int:
        return functools.reduce(self.times, factors, 1)


@functools.cache
def _field(bits: int) -> _Field:
    return _Field(bits)


@functools.lru_cache(maxsize=32)
def _tables(bits: int, length: int, message: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The code's constants on a device: int64."""
    field = _field(bits)
    points = field.exp[:length]
    size = 1 << bits
    # multipliers of the dual code, with which the syndromes are power sums over the errors
    dual = [
        field.inverse(field.product([points[i] ^ points[j] for j in range(length) if j != i]))
        for i in range(length)
    ]
    # Lagrange: the polynomial through the message's symbols, read at all points
    generator = [
        [
            field.product(
                [
                    field.times(points[i] ^ points[j], field.inverse(points[s] ^ points[j]))
                    for j in range(message)
                    if j != s
                ]
            )
            for i in range(length)
        ]
        for s in range(message)
    ]
    parity = length - message
    powers = [[field.exp[i * j % field.order] for j in range(parity + 1)] for i in range(length)]
    inverse_powers = [
        [field.exp[-i * j % field.order] for j in range(parity + 1)] for i in range(length)
    ]
    constants = {
        "times": [field.times(a, b) for a in range(size) for b in range(size)],
        "inverse": [field.inverse(a) for a in range(size)],
        "generator": generator,
        "syndrome": [
            [field.times(dual[i], powers[i][j]) for j in range(parity)] for i in range(length)
        ],
        "points": points,
        "inverse_powers": inverse_powers,
        "error_factor": [field.times(points[i], field.inverse(dual[i])) for i in range(length)],
    }
    return {
        name: torch.tensor(value, dtype=torch.int64, device=device)
        for name, value in constants.items()
    }


@dataclass(frozen=True, kw_only=True)
class ReedSolomon:
    """The systematic Reed-Solomon code over GF(2^bits), decoded up to half its distance.

    A message of `message` symbols is the polynomial of degree below `message` that takes the
    symbols as its first values; the word holds its values at `length` points. Any two words differ
    in `length - message + 1` places, the most a code of that rate can have, so that `e` wrong and
    `s` missing symbols are put right whenever `2 e + s <= length - message`.

    Words are decoded all at once, by fixed steps: syndromes, Berlekamp and Massey's recursion
    begun with the missing places, the roots by trying all places, Forney's values; what comes
    out is encoded again, and refused unless it lies within that radius.

    Args:
        length: symbols of a word, at most `2^bits - 1`.
        message: symbols of a message, at most `length`.
        bits: bits of a symbol, 2 to 8.

    Cost: O(length^2) table look-ups a word. Deterministic; no gradient.
    Source: Reed and Solomon (1960); the decoder is that of Blahut, Theory and Practice of
    Error Control Codes (1983), for a generalised code (points and column multipliers).

    Example:
        >>> code = ReedSolomon(length=8, message=4, bits=4)
        >>> word = code.encode(torch.tensor([51_966]))
        >>> word[0, 2] ^= 7
        >>> missing = torch.zeros(1, 8, dtype=torch.bool)
        >>> missing[0, 5:7] = True
        >>> code.decode(word, missing)
        (tensor([51966]), tensor([True]))
    """

    length: int
    message: int
    bits: int = 4

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.bits not in _PRIMITIVE:
            raise ArgumentError(
                f"reed_solomon: bits={self.bits} names no field here; pass 2 to {max(_PRIMITIVE)}"
            )
        if not 1 <= self.message <= self.length <= (1 << self.bits) - 1:
            raise ArgumentError(
                f"reed_solomon: message={self.message} and length={self.length} do not fit "
                f"bits={self.bits}; 1 <= message <= length <= {(1 << self.bits) - 1} must hold"
            )

    @property
    def radius(self) -> int:
        """What `2 * wrong + missing` may be at most: the symbols beyond the message."""
        return self.length - self.message

    @property
    def num_words(self) -> int:
        """How many indices can be told apart."""
        return 1 << (self.message * self.bits)

    def encode(self, index: torch.Tensor) -> torch.Tensor:
        """Return the words of some indices.

        Args:
            index: integer tensor of any shape, `0 <= index < num_words`.

        Returns:
            int64 `[*index.shape, length]`; the first `message` symbols are the index in base
            `2^bits`, its lowest digit first.
        """
        shift = torch.arange(self.message, device=index.device) * self.bits
        digits = (index.long().unsqueeze(-1) >> shift) & ((1 << self.bits) - 1)
        return self._combined(digits, self._table(index, "generator"))

    def decode(
        self, word: torch.Tensor, missing: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the indices whose words are near.

        Args:
            word: integer `[..., length]`, symbols; any values where they are missing.
            missing: bool, the same shape, or None for none.

        Returns:
            int64 `[...]` indices and bool `[...]`, whether one lies within the radius; the index
            is 0 where none does.
        """
        if missing is None:
            missing = torch.zeros_like(word, dtype=torch.bool)
        word = word.long().masked_fill(missing, 0)
        syndromes = self._combined(word, self._table(word, "syndrome"))
        locator = self._locator(syndromes, missing)
        corrected = word ^ self._errors(syndromes, locator)
        shift = torch.arange(self.message, device=word.device) * self.bits
        index = (corrected[..., : self.message] << shift).sum(dim=-1)
        wrong = (self.encode(index) != word) & ~missing
        is_near = 2 * wrong.sum(dim=-1) + missing.sum(dim=-1) <= self.radius
        return torch.where(is_near, index, 0), is_near

    def _locator(self, syndromes: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
        """The polynomial whose roots are the inverse points of errors: `[..., radius + 1]`."""
        points, size = self._table(missing, "points"), self.radius + 1
        locator = torch.zeros((*missing.shape[:-1], size), dtype=torch.int64, device=missing.device)
        locator[..., 0] = 1
        for place in range(self.length):
            grown = locator ^ _shifted(self._times(locator, points[place]))
            locator = torch.where(missing[..., place, None], grown, locator)
        num_missing = missing.sum(dim=-1)
        length, previous = num_missing, locator
        for step in range(1, self.radius + 1):
            terms = self._times(locator[..., :step], syndromes[..., :step].flip(-1))
            gap = _xor_sum(terms)
            previous_shifted = _shifted(previous)
            updated = locator ^ self._times(previous_shifted, gap.unsqueeze(-1))
            is_longer = (gap != 0) & (2 * length <= step - 1 + num_missing)
            scaled = self._times(locator, self._table(missing, "inverse")[gap].unsqueeze(-1))
            # the first steps only say what the missing places do
            has_begun = step > num_missing
            previous = torch.where(
                has_begun.unsqueeze(-1),
                torch.where(is_longer.unsqueeze(-1), scaled, previous_shifted),
                previous,
            )
            locator = torch.where(has_begun.unsqueeze(-1), updated, locator)
            length = torch.where(has_begun & is_longer, step - length + num_missing, length)
        return locator

    def _errors(self, syndromes: torch.Tensor, locator: torch.Tensor) -> torch.Tensor:
        """What is wrong at every place: int64 `[..., length]`, by Forney's formula."""
        evaluator = torch.zeros_like(syndromes)
        for power in range(self.radius):
            product = self._times(locator[..., power, None], syndromes)
            evaluator[..., power:] ^= product[..., : self.radius - power]
        # in characteristic 2 the derivative keeps the odd powers, one lower
        derivative = locator[..., 1:].clone()
        derivative[..., 1::2] = 0
        powers = self._table(locator, "inverse_powers")
        is_root = self._combined(locator, powers.T) == 0
        shifted = powers[:, : self.radius].T
        slope = self._table(locator, "inverse")[self._combined(derivative, shifted)]
        value = self._times(self._combined(evaluator, shifted), slope)
        value = self._times(value, self._table(locator, "error_factor"))
        return value.masked_fill(~is_root, 0)

    def _combined(self, vector: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """The product over the field of `[..., a]` with `[a, b]`."""
        out = torch.zeros(
            (*vector.shape[:-1], matrix.shape[1]), dtype=torch.int64, device=vector.device
        )
        for row in range(matrix.shape[0]):
            out ^= self._times(vector[..., row, None], matrix[row])
        return out

    def _times(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self._table(a, "times")[(a << self.bits) | b]

    def _table(self, like: torch.Tensor, name: str) -> torch.Tensor:
        return _tables(self.bits, self.length, self.message, like.device)[name]


def _shifted(polynomial: torch.Tensor) -> torch.Tensor:
    """The polynomial times x; its highest power is lost."""
    return torch.cat([torch.zeros_like(polynomial[..., :1]), polynomial[..., :-1]], dim=-1)


def _xor_sum(terms: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(terms[..., 0])
    for place in range(terms.shape[-1]):
        total = total ^ terms[..., place]
    return total
