"""What tests of the sketching detectors share: inputs, and the dense definition."""

from __future__ import annotations

from functools import partial

import torch

from tests.finding_laws import random_heads


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


tensors = partial(random_heads, dim=6, dtype=torch.float64)


def heavy(
    query: torch.Tensor, key: torch.Tensor, tau: float, *, is_causal: bool = False, sign: float = 0
) -> torch.Tensor:
    """The definition, dense, in float64."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query.double() @ key.transpose(-1, -2)
    energy = logits.square().sum(dim=2, keepdim=True)
    found = (logits.square() >= (1 - 1e-9) * energy / tau) & (logits != 0)
    if sign:
        found = found & (sign * logits > 0)
    num_queries, num_keys = logits.shape[-2:]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool)
    return found & visible.tril(num_keys - num_queries) if is_causal else found
