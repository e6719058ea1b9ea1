"""Schema and shapes of `hyperframe::bucket_votes`; `kernels/bucket_votes.py` implements it."""

from __future__ import annotations

import torch

__all__ = ["SCHEMA"]

SCHEMA = (
    "(Tensor voters, Tensor key, Tensor index, Tensor score, Tensor before, SymInt size,"
    " SymInt votes, float scale) -> (Tensor, Tensor)"
)
"""Shares of the softmax that keys found by rows have; see `kernels.bucket_votes`."""

torch.library.define("hyperframe::bucket_votes", SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("hyperframe::bucket_votes")
def _shapes(
    voters: torch.Tensor, key: torch.Tensor, index: torch.Tensor, score: torch.Tensor,
    before: torch.Tensor, size: int, votes: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    shape = (*index.shape[:-1], votes)
    return index.new_empty(shape), score.new_empty(shape)
