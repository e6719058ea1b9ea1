"""Schemas and shapes of the operators on leaves of keys; `kernels/leaves.py` implements them."""

from __future__ import annotations

import torch

__all__ = ["MEAN_SCHEMA", "SCHEMA"]

SCHEMA = (
    "(Tensor voters, Tensor votes, Tensor mean, Tensor sizes, Tensor far, Tensor near,"
    " Tensor is_near, float scale, SymInt num_far, SymInt num_leaves, bool is_even) -> Tensor"
)
"""Best leaves of tiles; see `kernels.leaves.best_leaves`."""

MEAN_SCHEMA = "(Tensor x, Tensor index, Tensor sizes) -> Tensor"
"""Means of rows; see `kernels.leaves.leaf_means`."""

_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define("hyperframe::best_leaves", SCHEMA, tags=_TAGS)
torch.library.define("hyperframe::leaf_means", MEAN_SCHEMA, tags=_TAGS)


@torch.library.register_fake("hyperframe::best_leaves")
def _leaves(
    voters: torch.Tensor, votes: torch.Tensor, mean: torch.Tensor, sizes: torch.Tensor,
    far: torch.Tensor, near: torch.Tensor, is_near: torch.Tensor, scale: float, num_far: int,
    num_leaves: int, is_even: bool,
) -> torch.Tensor:  # fmt: skip
    count = min(num_leaves, num_far + near.shape[1])
    return torch.empty((*voters.shape[:3], count), dtype=torch.int64, device=voters.device)


@torch.library.register_fake("hyperframe::leaf_means")
def _means(x: torch.Tensor, index: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty((*index.shape[:3], x.shape[-1]), dtype=dtype, device=x.device)
