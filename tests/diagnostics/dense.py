"""The diagnostics' definitions on dense float64 matrices."""

from __future__ import annotations

import torch

from hyperframe.masks import HeavyMask
from hyperframe.ragged import spread_heads


def visible(num_queries: int, num_keys: int, *, is_causal: bool, offset: int | None = None):
    position = torch.arange(num_queries) + (num_keys - num_queries if offset is None else offset)
    seen = torch.arange(num_keys) <= position[:, None]
    return seen if is_causal else torch.ones_like(seen)


def logits(
    query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
    is_causal: bool = False, offset: int | None = None,
) -> torch.Tensor:  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * query.double() @ spread_heads(key, query.shape[1]).double().mT
    seen = visible(*scores.shape[-2:], is_causal=is_causal, offset=offset)
    return scores.masked_fill(~seen, float("-inf"))


def softmax(query: torch.Tensor, key: torch.Tensor, **options: object) -> torch.Tensor:
    """`D^-1 A`; rows without keys are 0."""
    return logits(query, key, **options).softmax(dim=-1).nan_to_num(0.0)


def alpha(query: torch.Tensor, key: torch.Tensor, skip_first: int = 0, **options: object):
    columns = softmax(query, key, **options).square().sum(dim=-2)
    return key.shape[2] * columns[..., skip_first:].amax(dim=-1)


def log_kappa(
    query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, scale: float | None = None
) -> torch.Tensor:
    left = logits(
        query, key, scale=scale, is_causal=mask.is_causal, offset=mask.position_offset
    ).masked_fill(mask.to_dense(), float("-inf"))
    sums = left.logsumexp(dim=-1)
    found = torch.zeros(sums.shape[:2], dtype=torch.float64)
    for place in torch.cartesian_prod(*map(torch.arange, sums.shape[:2])).tolist():
        kept = sums[tuple(place)]
        kept = kept[kept > float("-inf")]
        if len(kept):
            found[tuple(place)] = kept.max() - kept.min()
    return found


def operator_norm(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(matrix.double(), ord=2)
