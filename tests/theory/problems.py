"""Inputs that meet the assumptions of the theorems, inputs that do not, and a sample size."""

from __future__ import annotations

import math

import torch

from hyperframe.masks import HeavyMask, ListMask

FALSE_ALARM = 1e-6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(
    num_keys: int, *, heads: int, size: float, dim: int = 16, value_dim: int = 2, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and columns that are alike: logits (scale 1) of about standard deviation `size`.

    The heads are copies of one problem, so that a call is one trial a head.
    """
    g = generator(seed)
    query, key = (torch.randn(1, 1, num_keys, dim, generator=g).double() for _ in range(2))
    query = size * torch.nn.functional.normalize(query, dim=-1)
    value = torch.randn(1, 1, num_keys, value_dim, generator=g).double()
    return tuple(x.expand(-1, heads, -1, -1) for x in (query, key, value))  # type: ignore[return-value]


def alman_song(
    num_keys: int, *, heads: int, every: int, size: float = 10.0, dim: int = 256,
    value_dim: int = 2, seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """One entry `exp(size)` (scale 1) at a random column, in some rows; the rest is about 1.

    Rows that are no multiple of `every` have no large entry, and shorter queries.

    Returns:
        Query, key, value, and bool `[n, n]`: which entries are large.
    """
    g = generator(seed)
    key = torch.nn.functional.normalize(
        torch.randn(1, 1, num_keys, dim, generator=g).double(), dim=-1
    )
    query = torch.nn.functional.normalize(
        torch.randn(1, 1, num_keys, dim, generator=g).double(), dim=-1
    )
    rows = torch.arange(0, num_keys, every)
    partner = torch.randperm(num_keys, generator=g)[: len(rows)]
    query = query / 3
    query[:, :, rows] = key[:, :, partner]
    large = torch.zeros(num_keys, num_keys, dtype=torch.bool)
    large[rows, partner] = True
    value = torch.randn(1, 1, num_keys, value_dim, generator=g).double()
    many = [x.expand(-1, heads, -1, -1) for x in (size * query, key, value)]
    return many[0], many[1], many[2], large


def nothing(query: torch.Tensor, key: torch.Tensor) -> HeavyMask:
    """The mask without entries."""
    return ListMask.columns(
        torch.empty(1, query.shape[1], 0, dtype=torch.int64), num_query_heads=query.shape[1],
        num_queries=query.shape[2], num_keys=key.shape[2],
    )  # fmt: skip


def spread(share: torch.Tensor, held: torch.Tensor) -> tuple[float, float]:
    """The largest variance and value, over the rows, of `n P_ij` of an unheld random column.

    Args:
        share: `P`, float64 `[n_q, n]`.
        held: bool, likewise.
    """
    left = share.masked_fill(held, 0.0)
    n = share.shape[-1]
    variance = n * left.square().sum(dim=-1) - left.sum(dim=-1).square()
    return float(variance.max()), float(n * left.max())


def columns_for(
    share: torch.Tensor, held: torch.Tensor, error: float, *, failure: float, trials: int = 1
) -> int:
    """Uniform columns with which every row sum of every trial has at most this relative error.

    Proposition 2 of docs/theory.md: Bernstein's inequality for the mean of m values `n P_ij`, of
    both sides, for all rows of all trials; together they fail with probability `failure`.
    """
    variance, largest = spread(share, held)
    log_term = math.log(2 * share.shape[0] * trials / failure)
    return math.ceil((2 * variance / error**2 + 2 * largest / (3 * error)) * log_term)
