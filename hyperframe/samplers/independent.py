"""Independent draws by a density, with replacement: inversion of the cumulative density."""

from __future__ import annotations

import torch

from ..samples import KeySample

__all__ = ["SMALLEST_SHARE", "independent_in_prefixes", "independent_sample"]

SMALLEST_SHARE = 1e-2
"""What part of the uniform density every key has at least."""


def independent_sample(density: torch.Tensor, draws: torch.Tensor) -> KeySample:
    """Draw from all keys.

    Args:
        density: positive, float64 `[batch, key_heads, n_k]`.
        draws: float64 `[batch, key_heads, m]` from [0, 1).

    Returns:
        `[batch, key_heads, m]`, weights `-log(m p_j)`. Cost O(n_k + m log n_k).
    """
    cumulative = density.cumsum(dim=-1)
    total = cumulative[..., -1:]
    index = torch.searchsorted(cumulative, draws * total, right=True)
    index = index.clamp(max=density.shape[-1] - 1)
    chosen = density.gather(-1, index)
    log_weight = torch.log(total) - torch.log(chosen * max(1, draws.shape[-1]))
    return KeySample(index=index, log_weight=log_weight.float())


def independent_in_prefixes(
    density: torch.Tensor, length: torch.Tensor, seen: torch.Tensor, draws: torch.Tensor
) -> KeySample:
    """Draw from prefixes, of which the density speaks for the first keys alone.

    Args:
        density: float64 `[batch, key_heads, n_k]`; entries from `seen` on are not looked at.
        length: int64 `[tiles, 1]`, keys of each prefix, at least 1.
        seen: int64 `[tiles, 1]`, how many of them the density speaks for.
        draws: float64 `[batch, key_heads, tiles, m]` from [0, 1).

    Returns:
        `[batch, key_heads, tiles, m]`. Cost O(n_k), and O(m log n_k) for each prefix.
    """
    shape = draws.shape
    cumulative = density.cumsum(dim=-1)
    total = cumulative[..., seen.squeeze(-1).clamp(min=1) - 1].unsqueeze(-1)  # [B, H, T, 1]
    # [0, length) is cut into: seen keys by density | seen keys uniformly | unseen keys
    place = draws * length
    share = (total > 0).double() * (1 - SMALLEST_SHARE) * seen
    by_density = place < share
    target = torch.where(by_density, place / share.clamp(min=1e-300) * total, 0.0)
    index = torch.searchsorted(cumulative, target.flatten(2), right=True).view(shape)
    uniformly = (place - share) / (seen - share).clamp(min=1e-300) * seen
    index = torch.where(by_density, index, torch.where(place < seen, uniformly, place).long())
    is_seen = place < seen
    index = torch.where(is_seen, torch.minimum(index, seen - 1), index)
    index = torch.minimum(index, length - 1)
    density_at = density.gather(-1, index.flatten(2)).view(shape)
    # times length: how much likelier than uniform the key is drawn
    gain = share * density_at / total.clamp(min=1e-300) + (seen - share) / seen.clamp(min=1)
    gain = torch.where(index < seen, gain, 1.0)
    log_weight = torch.log(length / max(1, shape[-1])) - torch.log(gain)
    return KeySample(index=index, log_weight=log_weight.float())
