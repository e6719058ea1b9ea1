"""Leverage sampling: columns drawn by how much of the row space of K they alone hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..component import check_bool, check_choice, check_positive_number
from .base import AbstractSampler

__all__ = ["Leverage", "leverage_scores", "online_leverage_scores"]

BLOCK = 128
"""Keys of a block of `online_leverage_scores`."""

_CHUNK_BYTES = 64 << 20  # of float64 temporaries held at once
_LARGEST = 1e8  # of a squared length within a block: pivots of about 1 keep eight digits


@dataclass(frozen=True, kw_only=True)
class Leverage(AbstractSampler):
    """Keys drawn by their ridge leverage scores `l_j = k_j^T (K^T K + lambda I)^-1 k_j`.

    `l_j` lies in [0, 1) and is large where few other keys point the way of `k_j`; all add up to the
    number of directions in which the keys have more energy than `lambda`, or so. `m` draws of the
    order `d log(d) / eps^2` keep `K^T S^T S K + lambda I` within `1 +- eps` of `K^T K + lambda I`
    in every direction, where row norms (Lemma 2) only keep the directions of most energy. Scores
    change neither with the scale of the keys nor with a rotation, but with a shift of all keys.

    `lambda = ridge ||K||_F^2 / (n d)`: as if `ridge` more keys of mean energy were spread over all
    directions.

    Draws from a prefix must not look at later keys, and `K^T K` of all keys would. There key `j` is
    drawn by `(j + 1) tau_j` with the online score `tau_j`: its leverage among the keys up to itself
    (`online_leverage_scores`). Plain online scores fall as `1 / j`, for they say how new a key was
    when it came; times `j + 1` they are what the key has in any longer prefix, up to a factor
    that all keys of the prefix share, if later keys are spread like the earlier ones.

    Args:
        of: the matrix: `"key"`, `"value"`, or `"key_value"`, both side by side, each with a
            `lambda` of its own.
        ridge: in keys; more of it draws more like row norms.
        replacement: whether draws are independent; see `row_norm` for what they are without.

    Cost: O(n d^2) time in float64; O(n) memory for a head beside chunks of 64 MiB. Random.
    Source: sampling by leverage (Drineas, Mahoney, Muthukrishnan 2008); ridge (Alaoui and Mahoney
    2015); online scores (Cohen, Musco, Pachocki 2016). In place of HyperAttention, Lemma 2.

    Example:
        >>> k = torch.tensor([[1.0, 0.0]] * 9 + [[0.0, 1.0]]).view(1, 1, 10, 2)
        >>> [round(p, 2) for p in Leverage(ridge=1e-6).density(k, k, k)[0, 0, -2:].tolist()]
        [0.11, 1.0]
    """

    of: str = "key"
    ridge: float = 1.0
    replacement: bool = True

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_choice(self, "of", self.of, ("key", "value", "key_value"))
        check_positive_number(self, "ridge", self.ridge)
        check_bool(self, "replacement", self.replacement)

    def density(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        scale: float | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Return the scores where all rows see all keys."""
        return leverage_scores(*self._parts(key, value), ridge=self.ridge)

    def prefix_density(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        scale: float | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Return the online scores, each times the number of keys up to it."""
        scores = online_leverage_scores(*self._parts(key, value), ridge=self.ridge)
        return scores * torch.arange(1, key.shape[2] + 1, device=key.device)

    def _parts(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return {"key": (key,), "value": (value,), "key_value": (key, value)}[self.of]


def leverage_scores(*parts: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return `x_j^T (X^T X + Lambda)^-1 x_j` for the rows of `X`, the parts side by side.

    Args:
        parts: `[batch, heads, n, d]`, any `d`.
        ridge: `Lambda` is `ridge ||X_p||_F^2 / (n d_p)` on the diagonal of part `p`.

    Returns:
        float64 `[batch, heads, n]`, in [0, 1); 0 for a row of zeros.
    """
    read, length, width = _reader(parts)
    batch, heads = parts[0].shape[:2]
    step = max(1, _CHUNK_BYTES // max(1, 8 * 3 * batch * heads * width))
    gram = parts[0].new_zeros((batch, heads, width, width), dtype=torch.float64)
    for start in range(0, length, step):
        rows = read(start, start + step)
        gram = gram + rows.mT @ rows
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    unit = _unit(parts, diagonal, torch.full((1,), length, device=gram.device), ridge)
    factor = _factor(gram, unit)
    scores = [
        _whitened(factor, read(start, start + step) * unit.unsqueeze(-2)).square().sum(dim=-2)
        for start in range(0, length, step)
    ]
    return torch.cat(scores, dim=-1).clamp(max=1.0)


def online_leverage_scores(*parts: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return `x_j^T (X_j^T X_j + Lambda_j)^-1 x_j` for the rows of `X`; `X_j` ends with row `j`.

    `Lambda_j` is that of `leverage_scores` for the rows before the block of `BLOCK` rows that `j`
    lies in (before and with the first row, in the first block). Never below the score among all
    rows with the same `Lambda`.

    Within a block the scores come from one factorisation: with `M = L^-1 X_block^T`, where `L L^T`
    is the Gram matrix of the rows before plus `Lambda`, the squared pivots of `I + M^T M` are
    `1 + x_j^T (X_{j-1}^T X_{j-1} + Lambda)^-1 x_j = 1 / (1 - score_j)`.

    Args:
        parts: `[batch, heads, n, d]`, any `d`.
        ridge: as in `leverage_scores`.

    Returns:
        float64 `[batch, heads, n]`, in [0, 1); entry `j` depends on the rows up to `j`.
        Cost O(n (d + BLOCK)^2) time. A row far above all before it (more than 1e8 `Lambda` in
        squared length) counts as that much while its own block is scored.
    """
    read, length, width = _reader(parts)
    batch, heads = parts[0].shape[:2]
    device = parts[0].device
    size = min(BLOCK, length)
    per_block = 8 * batch * heads * (4 * width * width + 4 * size * width + 2 * size * size)
    group = max(1, _CHUNK_BYTES // per_block)
    before = torch.zeros((batch, heads, width, width), dtype=torch.float64, device=device)
    scores = []
    for start in range(0, length, group * size):
        rows = read(start, start + group * size)
        blocks = -(-rows.shape[2] // size)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, blocks * size - rows.shape[2]))
        rows = rows.unflatten(2, (blocks, size))  # [B, H, blocks, size, D]
        total = before.unsqueeze(2) + (rows.mT @ rows).cumsum(dim=2)
        gram = torch.cat([before.unsqueeze(2), total[:, :, :-1]], dim=2)
        before = total[:, :, -1]
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        count = start + torch.arange(blocks, device=device).unsqueeze(-1) * size
        if start == 0:
            first = rows[:, :, :1, 0].square()
            diagonal = torch.cat([first, diagonal[:, :, 1:]], dim=2)
        unit = _unit(parts, diagonal, count.clamp(min=1), ridge)
        rows = rows * unit.unsqueeze(-2)
        squared = rows.square().sum(dim=-1, keepdim=True)
        rows = rows * (_LARGEST / squared.clamp(min=_LARGEST)).sqrt()
        white = _whitened(_factor(gram, unit), rows)  # [B, H, blocks, D, size]
        inner = white.mT @ white
        inner.diagonal(dim1=-2, dim2=-1).add_(1.0)
        pivots = torch.linalg.cholesky_ex(inner).L.diagonal(dim1=-2, dim2=-1).square()
        scores.append((1 - 1 / pivots.clamp(min=1.0)).flatten(2))
    return torch.cat(scores, dim=-1)[..., :length]


def _reader(
    parts: tuple[torch.Tensor, ...],
) -> tuple[Callable[[int, int], torch.Tensor], int, int]:
    """Return how rows are read, in float64 and side by side; how many; and how wide they are."""

    def read(start: int, stop: int) -> torch.Tensor:
        return torch.cat([part[:, :, start:stop].double() for part in parts], dim=-1)

    return read, parts[0].shape[2], sum(part.shape[3] for part in parts)


def _unit(
    parts: tuple[torch.Tensor, ...], diagonal: torch.Tensor, count: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Return `Lambda^(-1/2)` `[..., D]` for diagonals of Gram matrices of `count` rows."""
    units = []
    for part in diagonal.split([part.shape[3] for part in parts], dim=-1):
        energy = part.sum(dim=-1, keepdim=True)
        # far below rounding a ridge would be none
        least = 1e-12 * energy
        energy = torch.maximum(ridge * energy / (count * part.shape[-1]), least)
        energy = torch.where(energy > 0, energy, 1.0)  # nothing but zeros
        units.append(energy.rsqrt().expand_as(part))
    return torch.cat(units, dim=-1)


def _factor(gram: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Return the Cholesky factor of the Gram matrix in units of `Lambda`, plus the identity."""
    scaled = gram * unit.unsqueeze(-1) * unit.unsqueeze(-2)
    scaled.diagonal(dim1=-2, dim2=-1).add_(1.0)
    # without a check, which would wait for the device
    factor: torch.Tensor = torch.linalg.cholesky_ex(scaled).L
    return factor


def _whitened(factor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return `L^-1 X^T`: `[..., D, rows]`."""
    white: torch.Tensor = torch.linalg.solve_triangular(factor, rows.mT, upper=False)
    return white
