"""Random draws: only through an explicit generator, seeded and reproducible.

Draws happen on the generator's device and move to the tensors' device, so a CPU generator gives
the same numbers wherever the attention runs.
"""

from __future__ import annotations

import torch

__all__ = ["fold_in", "make_generator", "normal", "uniform"]

_MASK = (1 << 63) - 1


def fold_in(seed: int, *data: int) -> int:
    """Return a seed that depends on `seed` and all of `data` (splitmix64 steps).

    Example:
        >>> fold_in(0, 1) != fold_in(0, 2)
        True
    """
    state = 0
    for value in (seed, *data, 0x9E3779B9):  # the seed is mixed first: (0, 1) is not (1, 0)
        state = (state + 0x9E3779B97F4A7C15 + (value & 0xFFFFFFFFFFFFFFFF)) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _MASK


def make_generator(seed: int | None, device: torch.device | str) -> torch.Generator:
    """Return a new generator on `device`.

    Args:
        seed: the seed; None draws one from torch's global CPU generator, so that
            `torch.manual_seed` governs it and a checkpointed forward is recomputed alike.
        device: where it draws.
    """
    if seed is None:
        seed = int(torch.randint(_MASK, ()).item())
    return torch.Generator(device=device).manual_seed(fold_in(seed))


def uniform(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:  # fmt: skip
    """Return draws from [0, 1)."""
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, dtype=dtype, device=source).to(device)


def normal(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
) -> torch.Tensor:
    """Return float32 draws from the standard normal distribution."""
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device)
