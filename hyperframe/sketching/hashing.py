"""Hash functions of bounded independence: polynomials over the field of a Mersenne prime.

Beside them what hashes when all of a small domain is placed at once: permutations that treat every
pair of places alike, and signs that are independent altogether.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import ArgumentError
from ..randomness import Stream, uniform

__all__ = [
    "PRIME",
    "SIGNS_IN_A_WORD",
    "PolynomialHash",
    "next_prime",
    "pairwise_permutations",
    "random_signs",
]

PRIME = (1 << 31) - 1
"""Mersenne prime: the product of two residues fits int64, and a remainder is a shift and a sum."""

SIGNS_IN_A_WORD = 48
"""Bits taken of a draw, which has 53."""

_BITS = 31


@dataclass(frozen=True, kw_only=True, eq=False)
class PolynomialHash:
    """Independent functions from indices to residues, buckets and signs.

    Each function is a random polynomial of degree `k - 1` over the integers modulo `PRIME`: its
    values at any `k` indices are independent and uniform (k-wise independence). Pairwise buckets
    suffice for the expectation of what collides, four-wise signs for the variance of a squared
    sum of signs.

    Args:
        coefficients: int64 `[*shape, k]`, residues, the constant term last; `shape` is that of
            the family of functions.

    Example:
        >>> import torch
        >>> hashes = PolynomialHash.draw((5,), independence=2, device=torch.device("cpu"),
        ...                              generator=torch.Generator().manual_seed(0))
        >>> index = torch.arange(1000)
        >>> hashes.buckets(index, 16).shape, hashes.signs(index).unique().tolist()
        (torch.Size([5, 1000]), [-1, 1])

    Source: Carter and Wegman, Universal classes of hash functions (1979).
    """

    coefficients: torch.Tensor

    @classmethod
    def draw(
        cls, shape: tuple[int, ...], *, independence: int, device: torch.device,
        generator: torch.Generator | Stream | None = None,
    ) -> PolynomialHash:  # fmt: skip
        """Draw a family of functions, independent of each other.

        Args:
            shape: shape of the family, for example `(batch, heads, rounds)`.
            independence: k, the number of indices whose values are independent.
            device: where the coefficients lie.
            generator: source of the draw; one draw of `prod(shape) * k` numbers.

        Raises:
            ArgumentError: `independence` is less than 1.
        """
        if independence < 1:
            raise ArgumentError(
                f"independence={independence}: a hash function has k >= 1 coefficients; 2 makes "
                "it pairwise, 4 four-wise independent"
            )
        drawn = uniform((*shape, independence), device, generator)
        return cls(coefficients=(drawn * PRIME).long())

    def residues(self, index: torch.Tensor) -> torch.Tensor:
        """Return the values of all functions at all indices.

        Args:
            index: integer tensor of any shape, values `0 <= index < PRIME` (not checked: that
                would read the device).

        Returns:
            int64 `[*shape, *index.shape]`, values from 0 to `PRIME - 1`.
        Cost: k products of int64 for each value. Deterministic.
        """
        x = index.long()
        coefficients = self.coefficients.reshape(
            *self.coefficients.shape[:-1], *(1,) * x.dim(), self.coefficients.shape[-1]
        )
        value = coefficients[..., 0].expand(*self.coefficients.shape[:-1], *x.shape)
        for power in range(1, self.coefficients.shape[-1]):
            # at most (PRIME - 1) * PRIME < 2^62
            value = _reduced(value * x + coefficients[..., power])
        return value

    def buckets(self, index: torch.Tensor, num_buckets: int) -> torch.Tensor:
        """Return a bucket for every function and index: int64 `[*shape, *index.shape]`.

        The residues are cut into `num_buckets` runs whose lengths differ by one at most: a bucket
        has probability `1 / num_buckets` up to `1 / PRIME`.

        Args:
            index: as in `residues`.
            num_buckets: number of buckets, 1 to `PRIME`.

        Raises:
            ArgumentError: `num_buckets` is out of range.
        """
        if not 1 <= num_buckets <= PRIME:
            raise ArgumentError(
                f"num_buckets={num_buckets}: the residues make 1 to {PRIME} buckets"
            )
        # at most (PRIME - 1) * PRIME; the quotient by PRIME, not by 2^31, fills the last bucket
        return (self.residues(index) * num_buckets).div(PRIME, rounding_mode="floor")

    def signs(self, index: torch.Tensor, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Return a sign, -1 or 1, for every function and index: `[*shape, *index.shape]`.

        The parity of the residue: the two signs have probability 1/2 up to `1 / PRIME`.

        Args:
            index: as in `residues`.
            dtype: a signed dtype of the result.
        """
        return (1 - 2 * (self.residues(index) & 1)).to(dtype)

    @property
    def count(self) -> int:
        """Number of functions of the family."""
        return math.prod(self.coefficients.shape[:-1])


def _reduced(x: torch.Tensor) -> torch.Tensor:
    """Return `x` modulo `PRIME` for `0 <= x <= (PRIME - 1) * PRIME`."""
    x = (x & PRIME) + (x >> _BITS)  # less than 2 * PRIME
    return torch.where(x >= PRIME, x - PRIME, x)


def next_prime(number: int) -> int:
    """Return the least prime that is at least `number`; O(sqrt(number)) steps on the host.

    Example:
        >>> [next_prime(number) for number in (0, 8, 13)]
        [2, 11, 13]
    """
    candidate = max(2, number)
    while any(candidate % divisor == 0 for divisor in range(2, math.isqrt(candidate) + 1)):
        candidate += 1
    return candidate


def pairwise_permutations(
    shape: tuple[int, ...], size: int, *, device: torch.device,
    generator: torch.Generator | Stream | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return random permutations of `0 .. p - 1`, where `p = next_prime(size)`.

    Each is `i -> a i + c` modulo `p` with `a != 0`: the places of any two indices are uniform over
    all pairs of different places. Cut into runs of equal length it is a hash into buckets that
    are full alike, which needs neither a sort nor atomic sums to be used.

    Args:
        shape: how many permutations.
        size: the least length, below `PRIME`.
        device: where the result lies.
        generator: source of one draw of two numbers for each permutation.

    Returns:
        int64 `[*shape, p]`.

    Raises:
        ArgumentError: `size` is out of range.
    """
    if not 1 <= size < PRIME:
        raise ArgumentError(f"size={size}: permutations have from 1 to {PRIME - 1} places")
    prime = next_prime(size)
    drawn = uniform((*shape, 2), device, generator)
    factor = 1 + (drawn[..., :1] * (prime - 1)).long()
    shift = (drawn[..., 1:] * prime).long()
    return (torch.arange(prime, device=device) * factor + shift) % prime


def random_signs(
    shape: tuple[int, ...], count: int, length: int, *, device: torch.device,
    generator: torch.Generator | Stream | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return independent signs as the bits of words: int64 `[*shape, words, length]`.

    Args:
        shape: leading dimensions, for example `(heads,)`.
        count: signs for each index; bit `s % 48` of word `s // 48` is sign `s`.
        length: number of indices.
        device: where the result lies.
        generator: source of one draw of a float64 for every word.
    """
    words = -(-count // SIGNS_IN_A_WORD)
    drawn = uniform((*shape, words, length), device, generator)
    return (drawn * (1 << SIGNS_IN_A_WORD)).long()
