"""How much pooled queries attend to each key: what importance sampling goes by."""

from __future__ import annotations

import torch

from ..precision import without_autocast

__all__ = ["pooled_mass", "pooled_queries"]

_CHUNK_BYTES = 64 << 20  # of logits and their softmax held at once


def pooled_queries(query: torch.Tensor, rows: torch.Tensor, num_runs: int) -> torch.Tensor:
    """Return the mean queries of runs of `ceil(S / num_runs)` consecutive rows.

    Args:
        query: `[..., R, S, d]`, rows that are not there zero; they come last.
        rows: int64 `[R]`, how many rows of each stack are there.
        num_runs: how many runs, at most; the last one may be shorter.

    Returns:
        `[..., R, runs, d]`, in float32 at least; zero for a run without rows. Cost O(S d).
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    length = query.shape[-2]
    size = -(-length // num_runs)
    runs = -(-length // size)
    if runs * size != length:
        query = torch.nn.functional.pad(query, (0, 0, 0, runs * size - length))
    sums: torch.Tensor = query.unflatten(-2, (runs, size)).sum(dim=-2, dtype=dtype)
    return sums / run_lengths(rows, length, num_runs).clamp(min=1).unsqueeze(-1)


def run_lengths(rows: torch.Tensor, length: int, num_runs: int) -> torch.Tensor:
    """Return how many rows the runs of `pooled_queries` have: int64 `[R, runs]`."""
    size = -(-length // num_runs)
    start = torch.arange(-(-length // size), device=rows.device) * size
    return (rows.unsqueeze(-1) - start).clamp(min=0, max=size)


def pooled_mass(
    voters: torch.Tensor, key: torch.Tensor, votes: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean softmax mass of every key over voters, and their log normalisers.

    Args:
        voters: `[N, V, d]`, floating point, float32 at least.
        key: `[N, S, d]`.
        votes: bool `[N, V]`: which voters count.
        scale: factor of the logits.

    Returns:
        Mass `[N, S]`, which adds up to 1, and natural log-sum-exps of the logits `[N, V]`. No entry
        of `N` reads another. Cost O(N V S d) time; memory O(N (S + V)) and one bounded chunk.
    """
    count, num_voters, head_dim = voters.shape
    dtype = voters.dtype
    share = votes.to(dtype) / votes.sum(dim=-1, keepdim=True).clamp(min=1)
    itemsize = torch.finfo(dtype).bits // 8
    step = max(1, _CHUNK_BYTES // (itemsize * key.shape[1] * (2 * num_voters + head_dim)))
    masses, normalisers = [], []
    for start in range(0, count, step):
        part = slice(start, start + step)
        with without_autocast(key):
            logits = (voters[part] * scale) @ key[part].to(dtype).transpose(-1, -2)  # [N, V, S]
            normaliser = logits.logsumexp(dim=-1)
            mass = share[part].unsqueeze(1) @ torch.exp(logits - normaliser.unsqueeze(-1))
        masses.append(mass.squeeze(1))
        normalisers.append(normaliser)
    if len(masses) == 1:
        return masses[0], normalisers[0]
    return torch.cat(masses), torch.cat(normalisers)
