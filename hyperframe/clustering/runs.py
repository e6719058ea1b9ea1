"""Equal runs: an order of `n` things cut into leaves whose sizes differ by one at most."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["EqualRuns", "equal_runs", "gather_runs", "run_means"]


class EqualRuns(NamedTuple):
    """The places of `runs` equal runs of `range(n)`.

    Attributes:
        place: int64 `[runs, longest]`; where a run is shorter, its last slot repeats a place.
        sizes: int64 `[runs]`, places of every run.
        longest: the most places of a run.
        is_even: whether all runs have that many.
    """

    place: torch.Tensor
    sizes: torch.Tensor
    longest: int
    is_even: bool


def equal_runs(length: int, num_runs: int, device: torch.device) -> EqualRuns:
    """Return the runs `[i n / runs, (i + 1) n / runs)`, rounded down, of `n = length` places.

    Example:
        >>> equal_runs(5, 2, torch.device("cpu")).sizes.tolist()
        [2, 3]
    """
    bounds = torch.arange(num_runs + 1, device=device) * length // num_runs
    longest = -(-length // num_runs)
    slot = torch.arange(longest, device=device)
    place = torch.minimum(bounds[:-1, None] + slot, bounds[1:, None] - 1).clamp(min=0)
    return EqualRuns(place, bounds[1:] - bounds[:-1], longest, length % num_runs == 0)


def gather_runs(order: torch.Tensor, runs: EqualRuns) -> torch.Tensor:
    """Return what an order `[..., n]` has in every run: `[..., runs, longest]`."""
    if runs.is_even:
        return order.view(*order.shape[:-1], len(runs.sizes), runs.longest)
    return order[..., runs.place]


def run_means(x: torch.Tensor, index: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Return the mean rows of leaves.

    Args:
        x: `[B, H, n, d]`.
        index: integer `[B, H, leaves, longest]`, the rows of each leaf.
        sizes: int64 `[leaves]`, how many of them there are.

    Returns:
        `[B, H, leaves, d]`, in float32 at least. Cost O(n d).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    flat = index.flatten(2).long().unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
    rows = x.gather(2, flat).to(dtype).view(*index.shape, -1)
    is_there = torch.arange(index.shape[-1], device=x.device) < sizes.unsqueeze(-1)
    sums: torch.Tensor = torch.where(is_there.unsqueeze(-1), rows, 0).sum(dim=-2)
    return sums / sizes.clamp(min=1).unsqueeze(-1)
